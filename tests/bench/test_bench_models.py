"""The models that `bench` builds: the released sizes and their peers, with random weights."""

from __future__ import annotations

import importlib
import json
import math

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers import TINY_FOLDER, config_dict
from mlx.utils import tree_flatten
from rodimus_mlx.convert.mapping import count_parameters

from rodimus_mlx.bench.models import PEERS, SHAPES, load_subject, parameter_bytes, random_model, random_subject
from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.errors import RodimusError
from rodimus_mlx.model import Model

# As counted in the released files; the peers' as their authors give them.
RELEASED = {"1.6b": 1_607_095_296, "4b": 4_786_527_232, "1.4b": 1_531_551_744}
PEER_SIZES = {"qwen2.5-1.5b": 1.54e9, "mamba2-1.3b": 1.34e9}


@pytest.mark.parametrize("name", SHAPES)
def test_released_sizes(name):
    assert count_parameters(RodimusConfig.from_dict(SHAPES[name])) == RELEASED[name]


@pytest.mark.parametrize("name", PEERS)
def test_peers_sizes(name):
    module = importlib.import_module(f"mlx_lm.models.{PEERS[name]['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(PEERS[name]))  # nothing is evaluated
    count = sum(math.prod(x.shape) for _, x in tree_flatten(model.parameters()))
    assert count == pytest.approx(PEER_SIZES[name], rel=0.01)


def small(name: str) -> dict:
    """A built-in shape or peer, a few layers of it and narrow; the FFN cannot be quantized as it is."""
    if name in SHAPES:
        config = SHAPES[name] | {"d_model": 192, "n_layer": 2, "vocab_size": 300}
        attention = {"num_heads": 3, "num_heads_v": 3, "ffn_expand_ratio": 1.25}
        return config | ({"attn_cfg": config["attn_cfg"] | attention} if "attn_cfg" in config else {})
    sizes = {"qwen2.5-1.5b": {"hidden_size": 192, "intermediate_size": 256}}.get(name, {})
    return PEERS[name] | {"num_hidden_layers": 1, "vocab_size": 300} | sizes


@pytest.mark.parametrize("bits", [None, 4], ids=["bf16", "4 bit"])
@pytest.mark.parametrize("name", [*SHAPES, *PEERS])
def test_random_models_run(name, bits):
    model = random_model(small(name), bits)
    logits = model(mx.array([[3, 1, 200, 4]]))
    assert logits.shape == (1, 4, 300)
    assert mx.isfinite(logits).all()
    assert mx.abs(logits[0, 0] - logits[0, 1]).max() > 0  # it looks at its input
    assert {x.dtype for _, x in tree_flatten(model.parameters())} == {mx.bfloat16} | ({mx.uint32} if bits else set())


def test_quantized_like_a_converted_checkpoint():
    model = random_model(small("1.6b"), 4)
    assert (model.args.d_ffn, model.args.ffn_padding) == (256, 16)
    quantized = {path for path, module in model.named_modules() if hasattr(module, "scales")}
    layer = ("mixer.fc", "mixer.out_proj", "attn.qkv_proj", "attn.out_proj", "ffn.fc", "ffn.out_proj")
    expected = {f"model.layers.{i}.{part}" for i in range(2) for part in layer}
    assert quantized == {"model.embeddings"} | expected


def test_a_peer_keeps_what_cannot_be_quantized():
    model = random_model(PEERS["qwen2.5-1.5b"] | small("qwen2.5-1.5b") | {"intermediate_size": 200}, 8)
    mlp = model.model.layers[0].mlp
    assert isinstance(mlp.gate_proj, nn.QuantizedLinear)
    assert not isinstance(mlp.down_proj, nn.QuantizedLinear)


def test_of_a_folder_only_the_config_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_dict("plus_bin")))
    subject = random_subject(str(tmp_path), None)
    assert isinstance(subject.model, Model)
    assert subject.weight_bytes == parameter_bytes(subject.model) > 0


def test_a_quantized_folder_stays_so(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(small("1.6b") | {"quantization": {"bits": 8, "group_size": 64}}))
    subject = random_subject(str(tmp_path))
    assert subject.name == f"{tmp_path}, 8 bit"
    assert subject.model.model.layers[0].mixer.fc.bits == 8


def test_weights_of_a_checkpoint_are_its_own():
    subject = load_subject(TINY_FOLDER)
    assert subject.name == "tiny"
    weights = mx.load(str(TINY_FOLDER / "model.safetensors"))
    assert mx.array_equal(subject.model.model.embeddings.weight, weights["model.embeddings.weight"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param('{"model_type": "nonsense"}', "mlx-lm does not know the architecture 'nonsense'", id="unknown"),
        pytest.param("{}", "does not know the architecture 'None'", id="none"),
        pytest.param('{"model_type": "qwen2"}', "mlx-lm's qwen2 cannot be made from its config.json", id="incomplete"),
        pytest.param('{"model_type": ', "is not valid JSON", id="json"),
        pytest.param("[1]", "must hold a JSON object", id="list"),
        pytest.param(None, "it has no config.json", id="missing"),
    ],
)
def test_configs_that_make_no_model(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(RodimusError, match=message):
        random_subject(str(tmp_path), None)


def test_unknown_name():
    with pytest.raises(RodimusError, match=r"no model 2b: choose one of 1\.6b, 4b, 1\.4b, qwen2\.5-1\.5b, mamba2"):
        random_subject("2b")


def test_bits_that_mlx_lacks():
    for name in ("1.6b", "qwen2.5-1.5b"):
        with pytest.raises(RodimusError, match="affine has bits 2, 3, 4, 5, 6, 8, not 7"):
            random_model(small(name), 7)
