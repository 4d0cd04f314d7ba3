"""What `inspect` tells from headers alone, and how near its predictions come."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from rodimus_mlx.convert.convert import convert
from rodimus_mlx.convert.inspection import finetuning, inspect, open_headers
from rodimus_mlx.convert.mapping import count_parameters
from rodimus_mlx.convert.schemes import Scheme
from rodimus_mlx.convert.tensors import LazyTensor
from synthetic import ARCHITECTURES, REPEATS_HEAD, random_tensors, write_checkpoint

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.errors import RodimusError
from rodimus_mlx.generation import PREFILL_STEP
from rodimus_mlx.hub import find_folder
from rodimus_mlx.loading import load_model

from .conftest import PLAIN, SMALL

NEAR = (0.7, 1.4)  # predicted over measured: buffers come and go in an order that is MLX's own

pytestmark = pytest.mark.filterwarnings("ignore:.* has no tokenizer")


@pytest.fixture
def no_reading(monkeypatch):
    """Nothing but headers may be read."""

    def refuse(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(LazyTensor, "_rows", refuse)


@pytest.mark.parametrize("format", ["bin", "safetensors"])
def test_official(tmp_path, no_reading, format):
    config = ARCHITECTURES["tiny"]
    write_checkpoint(tmp_path, config, random_tensors(config, "float16", "tiny" in REPEATS_HEAD), format)
    found = inspect(open_headers(tmp_path), 100)
    count = count_parameters(RodimusConfig.from_dict(config))
    assert (found["parameters"], found["bytes"], found["bits_per_weight"]) == (count, 2 * count, 16)
    assert (found["format"], found["tied"], found["repeats_head"]) == ("official", True, True)
    assert found["container"] == ("PyTorch" if format == "bin" else "safetensors")
    assert found["dtypes"] == {"float16": 2 * count + 2 * 300 * 64}  # in the file, the head too
    assert sum(part["parameters"] for part in found["parts"]) == count
    assert sum(part["bytes"] for part in found["parts"]) == found["bytes"]
    sizes = found["architecture"]
    assert (sizes["type"], sizes["layers"], sizes["window"], sizes["FFN width"]) == ("Rodimus+", 2, 9, 88)
    assert found["quantization"] is None
    memory = found["memory"]
    assert memory["as it is"]["weights"] == 2 * count > memory["8 bit"]["weights"] > memory["4 bit"]["weights"]


@pytest.mark.parametrize("config", [SMALL, PLAIN], ids=["plus", "rodimus"])
def test_quantized(source, out, config, monkeypatch):
    summary = convert(source(config), out, scheme=Scheme(4, 64))
    monkeypatch.setattr(LazyTensor, "_rows", None)
    found = inspect(open_headers(out), 100)
    assert found["bytes"] == summary.weight_bytes and found["bits_per_weight"] == summary.bits_per_weight
    assert found["quantization"]["bits"] == 4 and list(found["memory"]) == ["as it is"]
    count = count_parameters(RodimusConfig.from_dict(config))
    assert sum(part["parameters"] for part in found["parts"]) == found["parameters"] == count
    before = inspect(open_headers(source(config)), 100)
    assert before["memory"]["4 bit"]["weights"] == summary.weight_bytes


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("block", ["rodimus", "rodimus_plus"])
def test_memory_to_run(tmp_path, block, bits):
    config = {**ARCHITECTURES["1.6b" if block == "rodimus_plus" else "1.4b"], "d_model": 256, "n_layer": 3}
    config["vocab_size"] = 3000
    if block == "rodimus_plus":
        config["attn_cfg"] = {**config["attn_cfg"], "num_heads": 4, "num_heads_v": 4, "window_size": 512}
    write_checkpoint(tmp_path / "source", config, random_tensors(config, "float32"))
    convert(tmp_path / "source", tmp_path / "out", "float32", scheme=Scheme(bits, 64) if bits else None)
    context = 1500
    predicted = inspect(open_headers(tmp_path / "out"), context)["memory"]["as it is"]
    model, _ = load_model(tmp_path / "out")
    mx.eval(model.parameters())
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    tokens = mx.array(np.random.default_rng(0).integers(0, 3000, context))
    for _ in zip(range(3), generate_step(tokens, model, max_tokens=3, prefill_step_size=PREFILL_STEP)):
        pass
    used = mx.get_peak_memory() - before  # other tests' arrays may still be there
    assert NEAR[0] <= (predicted["cache"] + predicted["work"]) / used <= NEAR[1]
    assert predicted["weights"] == sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def test_cache_does_not_grow_beyond_the_window(source):
    checkpoint = open_headers(source(PLAIN))
    short, long = (inspect(checkpoint, n)["memory"]["as it is"]["cache"] for n in (100, 10**6))
    assert short == long
    checkpoint = open_headers(source(SMALL))
    sizes = [inspect(checkpoint, n)["memory"]["as it is"]["cache"] for n in (100, 10**5, 10**6)]
    assert sizes[0] < sizes[1] == sizes[2]


@pytest.mark.parametrize("bits", [None, 4])
def test_memory_to_finetune(source, out, bits, monkeypatch):
    convert(source(), out, scheme=Scheme(bits, 64) if bits else None)
    monkeypatch.setattr(LazyTensor, "_rows", None)
    checkpoint = open_headers(out)
    small = finetuning(checkpoint, {"batch_size": 1, "seq_len": 128})
    large = finetuning(checkpoint, {"batch_size": 8, "seq_len": 128})
    assert small["trained"] == large["trained"] > 0 and small["memory"] < large["memory"]
    assert small["settings"] == {"method": "lora", "batch_size": 1, "seq_len": 128}
    assert small["advice"] is None
    if bits:
        with pytest.raises(RodimusError, match="cannot train a quantized model"):
            finetuning(checkpoint, {"method": "full"})
    else:
        assert finetuning(checkpoint, {"method": "full"})["trained"] == count_parameters(RodimusConfig.from_dict(SMALL))


def test_on_the_hub_alone(tmp_path, monkeypatch):
    """A repository of which only the small files are here."""
    config = {**ARCHITECTURES["1.6b"], "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = []
    monkeypatch.setattr(
        "rodimus_mlx.convert.inspection.find_folder", lambda source, weights: asked.append(weights) or tmp_path
    )
    found = inspect(open_headers("owner/name"), 4096)
    assert asked == [False]
    assert (found["container"], found["files"], found["parameters"]) == ("not downloaded", [], 1_607_095_296)
    assert found["bytes"] == 4 * 1_607_095_296
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization": {"bits": 4, "group_size": 64}}))
    with pytest.raises(RodimusError, match="is not downloaded, and its config"):
        open_headers("owner/name")


def test_an_empty_folder(tmp_path):
    with pytest.raises(RodimusError, match=r"has no config\.json"):
        open_headers(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RodimusError, match="it has no weights"):
        open_headers(tmp_path)
    assert find_folder(tmp_path, weights=False) == tmp_path
