"""States' files: what goes in comes out, in mlx-lm too; what does not fit is refused."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers import TINY_FOLDER, random_model, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import load_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers

import rodimus_mlx
from rodimus_mlx.errors import RodimusError
from rodimus_mlx.states import State, StateInfo, cache_bytes, fingerprint, load_state, read_info, save_state, snapshot
from rodimus_mlx.states.file import VERSION
from rodimus_mlx.states.reading import read_tokens

TEXT = "def f(x):\n    return x + 1\n" * 20
MESSAGES = [{"role": "user", "content": "naïve — 漢字"}, {"role": "assistant", "content": "</role>"}]


def state_of(owner: Any, tokens: list[int], **info: Any) -> State:
    cache = owner.make_cache()
    read_tokens(owner, cache, tokens)
    return State(cache, StateInfo(tokens=len(tokens), **info))


@pytest.fixture
def saved(tiny: tuple[Any, Any], tmp_path: Path) -> Path:
    model, tokenizer = tiny
    path = tmp_path / "kept.safetensors"
    save_state(path, model, state_of(model, tokenizer.encode(TEXT), model=str(TINY_FOLDER), messages=MESSAGES))
    return path


class TestFile:
    def test_comes_back_as_it_went(self, tiny: tuple[Any, Any], saved: Path) -> None:
        model, tokenizer = tiny
        state = load_state(saved, model)
        assert state.info.tokens == len(tokenizer.encode(TEXT))
        assert state.info.messages == MESSAGES
        assert state.info.created.endswith("+00:00")
        expected = rodimus_mlx.generate(*tiny, TEXT + "def", max_tokens=20)
        assert expected != rodimus_mlx.generate(*tiny, "def", max_tokens=20)
        for _ in range(2):  # a snapshot leaves the state as it is
            assert expected == rodimus_mlx.generate(*tiny, "def", max_tokens=20, prompt_cache=snapshot(state.cache))

    def test_is_an_mlx_lm_prompt_cache(self, tiny: tuple[Any, Any], saved: Path) -> None:
        cache = load_prompt_cache(str(saved))
        expected = rodimus_mlx.generate(*tiny, TEXT + "def", max_tokens=20)
        assert rodimus_mlx.generate(*tiny, "def", max_tokens=20, prompt_cache=cache) == expected

    def test_mlx_lms_command_reads_it(self, saved: Path, tiny: tuple[Any, Any]) -> None:
        command = [sys.executable, "-m", "mlx_lm", "generate", "--prompt-cache-file", str(saved), "--prompt", "def"]
        command += ["--ignore-chat-template", "--max-tokens", "20", "--trust-remote-code"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert rodimus_mlx.generate(*tiny, TEXT + "def", max_tokens=20) in result.stdout

    @pytest.mark.parametrize("block", ["rodimus", "rodimus_plus"])
    def test_size_is_constant(self, block: str, tmp_path: Path) -> None:
        model = random_model(tiny_config(block))
        sizes = []
        for length in (40, 3000):
            info = {"source": "x", "created": "2000-01-01T00:00:00+00:00"}
            path = tmp_path / f"{length}.safetensors"
            save_state(path, model, state_of(model, [length % 60] * length, **info))
            sizes.append(path.stat().st_size)
        assert sizes[0] == sizes[1]
        assert cache_bytes(load_state(path, model).cache) < sizes[1]

    def test_a_failed_write_leaves_what_was(self, tiny: tuple[Any, Any], saved: Path) -> None:
        before = saved.read_bytes()
        with pytest.raises(RodimusError, match="cannot be written"):
            save_state(saved / "below-a-file.safetensors", tiny[0], state_of(tiny[0], [1, 2]))
        assert saved.read_bytes() == before
        assert [path.name for path in saved.parent.iterdir() if path.is_file()] == [saved.name]

    @pytest.mark.parametrize("keep", [0, 5, 100, -1], ids="cut at {}".format)
    def test_cut_short(self, tiny: tuple[Any, Any], saved: Path, keep: int) -> None:
        saved.write_bytes(saved.read_bytes()[:keep])
        with pytest.raises(RodimusError, match=r"empty|cut short"):
            load_state(saved, tiny[0])

    def test_not_a_state(self, tiny: tuple[Any, Any]) -> None:
        with pytest.raises(RodimusError, match=r"is not a state's file: rodimus-mlx state make writes them"):
            load_state(TINY_FOLDER / "model.safetensors", tiny[0])

    def test_newer(self, tiny: tuple[Any, Any], saved: Path) -> None:
        arrays, metadata = mx.load(str(saved), return_metadata=True)
        text = metadata["0.rodimus_state"].replace(f'"version": {VERSION}', f'"version": {VERSION + 1}')
        mx.save_safetensors(str(saved), dict(arrays), {**metadata, "0.rodimus_state": text})
        with pytest.raises(RodimusError, match="newer rodimus-mlx: update"):
            read_info(saved)

    def test_other_caches_inside(self, tiny: tuple[Any, Any], saved: Path) -> None:
        arrays, metadata = mx.load(str(saved), return_metadata=True)
        for kind, message in (("KVCache", "damaged"), ("copy", "damaged"), ("Path", "damaged")):
            mx.save_safetensors(str(saved), dict(arrays), {**metadata, "1.0": kind})
            with pytest.raises(RodimusError, match=message):
                load_state(saved, tiny[0])

    def test_nothing(self, tiny: tuple[Any, Any], tmp_path: Path) -> None:
        with pytest.raises(RodimusError, match="nothing was read yet"):
            save_state(tmp_path / "x.safetensors", tiny[0], State(tiny[0].make_cache(), StateInfo(0)))

    # of a layer's tail, state, keys and values
    @pytest.mark.parametrize("name", ["0.0.0.0.0", "0.0.0.0.1", "1.1.0.0", "1.1.0.1"])
    def test_arrays_of_other_sizes(self, tiny: tuple[Any, Any], saved: Path, name: str) -> None:
        arrays, metadata = mx.load(str(saved), return_metadata=True)
        arrays = dict(arrays)
        assert name in arrays, sorted(arrays)
        arrays[name] = arrays[name].swapaxes(-1, -2)
        mx.save_safetensors(str(saved), arrays, metadata)
        with pytest.raises(RodimusError, match=r"its arrays are not of the model's sizes"):
            load_state(saved, tiny[0])

    @pytest.mark.parametrize("window", [None, 10, 500])
    @pytest.mark.parametrize(("length", "taps"), [(1, 4), (7, 1), (40, 4)])
    def test_every_kind_fits(self, window: int | None, length: int, taps: int, tmp_path: Path) -> None:
        model = random_model(tiny_config(attn_cfg={"window_size": window}, mixer_cfg={"d_conv": taps}))
        tokens = list(range(length))
        for cache in (model.make_cache(), model.make_cache()):
            for token in tokens:
                model(mx.array([[token]]), cache=cache)
            save_state(tmp_path / "x.safetensors", model, State(cache, StateInfo(length)))
            loaded = load_state(tmp_path / "x.safetensors", model)
            more = [[1, 2, 3]]
            assert mx.allclose(model(mx.array(more), cache=loaded.cache), model(mx.array(more), cache=cache), atol=1e-4)


class TestFingerprint:
    def changed(self, kind: str) -> Any:
        model = rodimus_mlx.load_model(TINY_FOLDER)[0]
        if kind == "quantization":
            nn.quantize(model, group_size=32, bits=4, class_predicate=lambda path, _: path.endswith("mixer.fc"))
        elif kind == "precision":
            model.set_dtype(mx.bfloat16)
        elif kind == "adapter":
            linear_to_lora_layers(model, 1, {"rank": 4, "scale": 2.0, "dropout": 0.0})
        elif kind == "weights":
            model.model.layers[1].mixer.fc.weight = model.model.layers[1].mixer.fc.weight * 1.01
        return model

    def test_the_same_model_loaded_again(self, saved: Path) -> None:
        load_state(saved, self.changed("not at all"))

    @pytest.mark.parametrize("kind", ["quantization", "precision", "adapter", "weights"])
    def test_another_is_refused(self, kind: str, saved: Path) -> None:
        with pytest.raises(RodimusError, match=rf"the state k belongs to another model: its {kind} is .*; use the"):
            load_state(saved, self.changed(kind), "the state k")

    def test_other_sizes(self, saved: Path) -> None:
        with pytest.raises(RodimusError, match="its architecture is"):
            load_state(saved, random_model(tiny_config()))

    def test_adapters_differ_by_weights_and_scale(self) -> None:
        found = set()
        for scale, factor in ((2.0, 1.0), (3.0, 1.0), (2.0, 1.5)):
            model = self.changed("not at all")
            mx.random.seed(0)
            linear_to_lora_layers(model, 1, {"rank": 4, "scale": scale, "dropout": 0.0})
            fc = model.model.layers[1].mixer.fc
            fc.lora_b = fc.lora_b + factor
            entries = fingerprint(model)
            assert entries["weights"] == fingerprint(self.changed("not at all"))["weights"]
            found.add(entries["adapter"])
        assert len(found) == 3


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_a_clear_line(tiny: tuple[Any, Any], saved: Path, data: st.DataObject) -> None:
    content = bytearray(saved.read_bytes())
    header = int.from_bytes(content[:8], "little") + 8
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, header - 1))
        content[place] = data.draw(st.integers(0, 255))
    broken = saved.with_name("broken.safetensors")
    broken.write_bytes(bytes(content))
    with contextlib.suppress(RodimusError):  # some damage does not show, such as a letter of a message
        load_state(broken, tiny[0])
