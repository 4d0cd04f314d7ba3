"""Folders of every kind to models that run, here and in mlx-lm."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import make_tiny
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from helpers import TINY_FOLDER
from mlx_lm.tuner.utils import linear_to_lora_layers
from rodimus_mlx.convert.convert import convert

import rodimus_mlx
from rodimus_mlx.errors import RodimusError, RodimusWarning
from rodimus_mlx.loading import DEMO_FOLDER
from rodimus_mlx.tokenizer import is_chat_model

GOLDENS = Path(__file__).parent / "data" / "goldens"
PROMPT = "def f(x):"
FLOAT32_ERROR = 1e-5  # relative to the largest logit: float32 sums in another order than the float64 reference
BFLOAT16_ERROR = 6e-2  # the same, where weights and activations keep 8 bits

CODE = """\
class Point:
    def __init__(self, x, y):
        self.x = x
        self.y = y

    def __repr__(self):
        return f"Point({self.x}, {self.y})"
"""
KNOWS_PYTHON = 2.5  # nats a token of CODE; a model that knows nothing has log 8192 = 9

golden_names = pytest.mark.parametrize("name", ["plus_bin", "plus_fla", "plus_untied_sharded", "rodimus"])


def relative_error(found: mx.array, wanted: np.ndarray) -> float:
    return float(np.abs(np.array(found.astype(mx.float32)) - wanted).max() / np.abs(wanted).max())


class TestLoad:
    @golden_names
    def test_every_format(self, name: str) -> None:
        golden = np.load(GOLDENS / name / "golden.npz")
        model, config = rodimus_mlx.load_model(GOLDENS / name)
        stored = model.model.embeddings.weight.dtype
        error = relative_error(model(mx.array(golden["tokens"])), golden["logits_f64"])
        assert error <= (FLOAT32_ERROR if stored == mx.float32 else BFLOAT16_ERROR)
        assert config["model_type"] == "rodimus"
        assert not model.training

    @golden_names
    def test_converted_equals_source(self, name: str, tmp_path: Path) -> None:
        with pytest.warns(RodimusWarning, match="no tokenizer"):
            convert(GOLDENS / name, tmp_path / "out")
        tokens = mx.array(np.load(GOLDENS / name / "golden.npz")["tokens"])
        (source, _), (converted, _) = rodimus_mlx.load_model(GOLDENS / name), rodimus_mlx.load_model(tmp_path / "out")
        assert mx.array_equal(source(tokens), converted(tokens))

    def test_dtype(self) -> None:
        golden = np.load(GOLDENS / "plus_untied_sharded" / "golden.npz")
        model, _ = rodimus_mlx.load_model(GOLDENS / "plus_untied_sharded", dtype=mx.float32)
        assert relative_error(model(mx.array(golden["tokens"])), golden["logits_f64"]) <= FLOAT32_ERROR

    def test_without_a_tokenizer(self) -> None:
        with pytest.warns(RodimusWarning, match="no tokenizer"):
            model, tokenizer = rodimus_mlx.load(GOLDENS / "rodimus")
        assert tokenizer is None
        assert model(mx.array([[1, 2]])).shape == (1, 2, 300)

    @pytest.mark.parametrize(("place", "expected"), [("chat/base", False), ("base/coder-chat", True)])
    def test_only_the_last_name_says_chat(self, place: str, expected: bool, tmp_path: Path) -> None:
        shutil.copytree(TINY_FOLDER, tmp_path / place)
        (tmp_path / place / "tokenizer_config.json").unlink()
        assert is_chat_model(rodimus_mlx.load(tmp_path / place)[1]) is expected

    def test_not_a_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(RodimusError, match=r"is not a checkpoint: it has no config\.json"):
            rodimus_mlx.load(tmp_path)

    def test_another_models_config(self, tmp_path: Path) -> None:
        shutil.copytree(TINY_FOLDER, tmp_path / "other")
        config = json.loads((tmp_path / "other" / "config.json").read_text()) | {"model_type": "llama"}
        (tmp_path / "other" / "config.json").write_text(json.dumps(config))
        with pytest.raises(RodimusError, match="model_type is 'llama'"):
            rodimus_mlx.load(tmp_path / "other")


class TestTiny:
    def test_the_script_makes_what_is_kept(self, tmp_path: Path) -> None:
        make_tiny.make(tmp_path / "tiny")
        made, kept = ({path.name: path for path in folder.iterdir()} for folder in (tmp_path / "tiny", TINY_FOLDER))
        assert made.keys() == kept.keys()
        for name in made.keys() - {"model.safetensors"}:
            assert made[name].read_text() == kept[name].read_text(), name
        new, old = mx.load(str(made["model.safetensors"])), mx.load(str(kept["model.safetensors"]))
        assert {k: (v.shape, v.dtype) for k, v in new.items()} == {k: (v.shape, v.dtype) for k, v in old.items()}

    def test_is_small(self) -> None:
        assert sum(path.stat().st_size for path in TINY_FOLDER.iterdir()) <= 1_000_000


class TestBundled:
    """What a user gets without --model: trained, so its text is looked at."""

    @pytest.fixture
    def bundled(self) -> tuple[Any, Any]:
        return rodimus_mlx.load(DEMO_FOLDER)

    def test_its_files(self) -> None:
        needed = {"config.json", "generation_config.json", "model.safetensors", "rodimus.py", "README.md"}
        files = {path.name: path.stat().st_size for path in DEMO_FOLDER.iterdir()}
        # no chat template: mlx-lm alone would put prompts into it
        assert files.keys() == needed | {"tokenizer.json", "tokenizer_config.json"}
        assert sum(files.values()) <= 13_000_000

    def test_is_a_base_model_of_code(self, bundled: tuple[Any, Any]) -> None:
        model, tokenizer = bundled
        assert not is_chat_model(tokenizer)
        assert model.args.vocab_size == len(tokenizer.get_vocab())
        for mark in ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>", "<|endoftext|>"):
            assert len(tokenizer.encode(mark, add_special_tokens=False)) == 1

    def test_end_of_text_ends(self, bundled: tuple[Any, Any]) -> None:
        _, tokenizer = bundled
        ends = ("<|endoftext|>", "<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>", "<|fim_pad|>")
        assert tokenizer.eos_token_ids == {tokenizer.convert_tokens_to_ids(end) for end in ends}

    def test_computes_in_float32(self, bundled: tuple[Any, Any]) -> None:
        # without a GPU MLX is six times slower in bfloat16
        model, _ = bundled
        assert model(mx.array([[5]])).dtype == mx.float32

    def test_has_learned_python(self, bundled: tuple[Any, Any]) -> None:
        model, tokenizer = bundled
        tokens = mx.array([tokenizer.encode(CODE)])
        loss = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean").item()
        assert loss < KNOWS_PYTHON


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, quantized by mlx-lm's own convert."""
    out = tmp_path_factory.mktemp("quantized") / "q4"
    rodimus_mlx.register()
    mlx_lm.convert(str(TINY_FOLDER), str(out), quantize=True, q_bits=4, q_group_size=32)
    return out


class TestQuantized:
    def test_equals_mlx_lm(self, quantized: Path) -> None:
        ours, theirs = rodimus_mlx.load(quantized), mlx_lm.load(str(quantized))
        assert type(ours[0].model.layers[0].mixer.fc).__name__ == "QuantizedLinear"
        tokens = mx.array([[1, 2, 3]])
        assert mx.array_equal(ours[0](tokens), theirs[0](tokens))
        assert ours[1].encode(PROMPT) == theirs[1].encode(PROMPT)

    def test_dtype_is_refused(self, quantized: Path) -> None:
        with pytest.raises(RodimusError, match="is quantized: its dtype cannot be changed"):
            rodimus_mlx.load_model(quantized, dtype=mx.float32)

    def test_a_wrong_group_size(self, quantized: Path, tmp_path: Path) -> None:
        shutil.copytree(quantized, tmp_path / "bad")
        config = json.loads((tmp_path / "bad" / "config.json").read_text())
        config["quantization"] = {"group_size": 32}
        (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
        with pytest.raises(RodimusError, match=r"config\.json's quantization does not fit the weights"):
            rodimus_mlx.load_model(tmp_path / "bad")


class TestRegister:
    def test_mlx_lm_loads_without_a_flag(self) -> None:
        rodimus_mlx.register()
        rodimus_mlx.register()  # twice does no harm
        model, tokenizer, config = mlx_lm.load(str(TINY_FOLDER), return_config=True)
        assert type(model) is type(rodimus_mlx.load_model(TINY_FOLDER)[0])
        assert config["model_file"] == "rodimus.py"  # kept, so that what mlx-lm saves still opens in a plain mlx-lm
        assert mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=5) == rodimus_mlx.generate(
            *rodimus_mlx.load(TINY_FOLDER), PROMPT, max_tokens=5
        )

    def test_the_folders_code_does_not_run(self, tmp_path: Path) -> None:
        shutil.copytree(TINY_FOLDER, tmp_path / "trap")
        (tmp_path / "trap" / "rodimus.py").write_text("raise SystemExit('this code must not run')")
        rodimus_mlx.register()
        mlx_lm.load(str(tmp_path / "trap"))
        rodimus_mlx.load(tmp_path / "trap")

    def test_other_models_still_need_the_flag(self, tmp_path: Path) -> None:
        shutil.copytree(TINY_FOLDER, tmp_path / "other")
        config = json.loads((tmp_path / "other" / "config.json").read_text()) | {"model_type": "other"}
        (tmp_path / "other" / "config.json").write_text(json.dumps(config))
        rodimus_mlx.register()
        with pytest.raises(ValueError, match="trust_remote_code"):
            mlx_lm.load(str(tmp_path / "other"))

    def test_stock_mlx_lm_with_its_flag(self) -> None:
        command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(TINY_FOLDER), "--trust-remote-code"]
        options = ["--prompt", PROMPT, "--ignore-chat-template", "--max-tokens", "12"]
        result = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert rodimus_mlx.generate(*rodimus_mlx.load(TINY_FOLDER), PROMPT, max_tokens=12) in result.stdout


class TestAdapter:
    @pytest.fixture
    def adapter(self, tmp_path: Path) -> Path:
        """A LoRA adapter for the tiny checkpoint that changes what it says."""
        model, _ = rodimus_mlx.load_model(TINY_FOLDER)
        parameters = {"rank": 2, "scale": 20.0, "dropout": 0.0, "keys": ["mixer.fc"]}
        linear_to_lora_layers(model, 2, parameters)
        weights: dict[str, Any] = {}
        for i, layer in enumerate(model.layers):
            for name in ("lora_a", "lora_b"):
                weights[f"model.layers.{i}.mixer.fc.{name}"] = mx.random.normal(layer.mixer.fc[name].shape)
        folder = tmp_path / "adapter"
        folder.mkdir()
        config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
        return folder

    def test_changes_the_model(self, adapter: Path) -> None:
        tokens = mx.array([[1, 2, 3]])
        plain, adapted = rodimus_mlx.load(TINY_FOLDER)[0], rodimus_mlx.load(TINY_FOLDER, adapter_path=adapter)[0]
        assert not mx.allclose(plain(tokens), adapted(tokens))
        assert not adapted.training

    def test_for_another_model(self, adapter: Path) -> None:
        with pytest.raises(RodimusError, match=r"adapter does not fit this model"):
            rodimus_mlx.load(GOLDENS / "plus_bin", adapter_path=adapter)

    @pytest.mark.parametrize("content", ["{", "{}", '{"num_layers": 2, "lora_parameters": {"rank": 2}}', "[]"])
    def test_damaged(self, adapter: Path, content: str) -> None:
        (adapter / "adapter_config.json").write_text(content)
        with pytest.raises(RodimusError, match=r"adapter does not fit this model|adapter_config\.json"):
            rodimus_mlx.load(TINY_FOLDER, adapter_path=adapter)

    def test_not_an_adapter(self, tmp_path: Path) -> None:
        with pytest.raises(RodimusError, match=r"is not an adapter: it has no adapter_config\.json"):
            rodimus_mlx.load(TINY_FOLDER, adapter_path=tmp_path)
