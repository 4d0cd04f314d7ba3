"""The tables of names: complete, exact there and back, and clear about what does not fit."""

import json
from dataclasses import replace

import mlx.core as mx
import pytest
from rodimus_mlx.convert.checkpoint import open_checkpoint
from rodimus_mlx.convert.mapping import count_parameters, expected_shapes, map_weights, parts, unmap_weights
from synthetic import ARCHITECTURES, official_shapes

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.errors import RodimusError, RodimusWarning

RELEASED_COUNTS = {"1.6b": 1_607_095_296, "4b": 4_786_527_232, "1.4b": 1_531_551_744}


@pytest.fixture
def weights(arrays):
    return {name: mx.array(array) for name, array in arrays.items()}


@pytest.fixture
def config():
    return RodimusConfig.from_dict(ARCHITECTURES["miniature"])


def load(folder):
    checkpoint = open_checkpoint(folder)
    config = RodimusConfig.from_dict(checkpoint.config)
    return {name: tensor.read() for name, tensor in checkpoint.tensors.items()}, config


def same(a, b):
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and mx.array_equal(a[name], b[name]) for name in a
    )


@pytest.mark.parametrize("arch, count", RELEASED_COUNTS.items())
def test_released_parameter_counts(arch, count):
    assert count_parameters(RodimusConfig.from_dict(ARCHITECTURES[arch])) == count


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_official_names_and_shapes(arch):
    found = parts(RodimusConfig.from_dict(ARCHITECTURES[arch]), "official")
    assert {name: part.shape for name, part in found.items()} == official_shapes(ARCHITECTURES[arch])


def test_other_head_counts(config):
    shapes = expected_shapes(replace(config, d_model=32, num_heads=4, num_heads_k=2, num_heads_v=1))
    assert shapes["model.layers.0.attn.qkv_proj.weight"] == (32 + 16 + 8, 32)
    assert shapes["model.layers.0.attn.out_proj.weight"] == (32, 32)


def test_norm_of_the_embedding(config):
    assert "model.embed_norm.weight" not in expected_shapes(config)
    with_norm = replace(config, use_norm_embedding=True)
    assert expected_shapes(with_norm)["model.embed_norm.weight"] == (8,)
    assert parts(with_norm, "fla")["model.embed_norm.weight"].shape == (8,)


def test_official_and_fla_twins_map_to_the_same(goldens):
    official, fla = (map_weights(*load(goldens / name)) for name in ("plus_bin", "plus_fla"))
    assert same(official, fla)


@pytest.mark.parametrize("golden", ["plus_bin", "plus_fla", "plus_untied_sharded", "rodimus"])
@pytest.mark.parametrize("format", ["official", "fla"])
def test_there_and_back(goldens, golden, format):
    weights, config = load(goldens / golden)
    ours = map_weights(weights, config)
    back = unmap_weights(ours, config, format)
    assert same(map_weights(back, config), ours)
    if (golden == "plus_fla") == (format == "fla"):
        kept = {name for name in weights if "cache" not in name and "state" not in name}
        kept -= {"lm_head.weight"} if config.tie_word_embeddings else set()
        assert same(back, {name: weights[name] for name in kept})


def test_our_own_names_pass_through(weights, config):
    ours = map_weights(weights, config)
    assert ours.keys() == expected_shapes(config).keys()
    assert same(map_weights(ours, config), ours)


def test_quantized_parameters_pass_through(weights, config):
    ours = map_weights(weights, config)
    name = "model.layers.0.mixer.fc"
    packed = mx.zeros((32, 1), mx.uint32), mx.ones((32, 1)), mx.zeros((32, 1))
    ours |= dict(zip((f"{name}.weight", f"{name}.scales", f"{name}.biases"), packed))
    assert same(map_weights(ours, config), ours)
    with pytest.raises(RodimusError, match=r"mixer\.fc\.scales.*dequantize"):
        unmap_weights(ours, config, "official")
    ours[f"{name}.weight"] = packed[0][:16]
    with pytest.raises(RodimusError, match=r"mixer\.fc\.weight has shape \[16, 1\]"):
        map_weights(ours, config)


def test_stray_buffers_are_dropped(weights, config):
    stray = {
        "model.layers.0.mixer.inner_mixer.conv_state_0": mx.zeros((1, 16, 4)),
        "model.layers.0.mixer.inner_mixer.ssm_state_0": mx.zeros((1, 4, 16)),
        "model.layers.12.attn.key_cache_12": mx.zeros((1, 8)),
        "model.layers.12.attn.value_cache_12": mx.zeros((1, 8)),
    }
    assert same(map_weights({**weights, **stray}, config), map_weights(weights, config))


def test_redundant_head_is_dropped(weights, config):
    head = {"lm_head.weight": weights["model.embeddings.weight"] + 0}
    assert same(map_weights({**weights, **head}, config), map_weights(weights, config))


def test_head_that_differs_in_one_bit_is_kept(weights, config):
    bits = weights["model.embeddings.weight"].view(mx.uint32)
    bits[10, 7] = bits[10, 7] ^ 1
    with pytest.warns(RodimusWarning, match=r"lm_head\.weight differs.*untied"):
        found = map_weights({**weights, "lm_head.weight": bits.view(mx.float32)}, config)
    assert mx.array_equal(found["lm_head.weight"].view(mx.uint32), bits)


def refused(weights, config) -> str:
    with pytest.raises(RodimusError) as caught:
        map_weights(weights, config, "FILE")
    message = str(caught.value)
    assert message.startswith("FILE: ") and "\n" not in message
    return message


def test_missing_and_unknown_names(weights, config):
    for name in list(weights)[1:6]:
        weights[f"odd.{name}"] = weights.pop(name)
    message = refused(weights, config)
    assert "missing model.layers.0.mixer_norm.weight, " in message and "unknown odd.model.layers.0." in message
    assert message.count("and 2 more") == 2


def test_head_missing_from_an_untied_model(weights, config):
    assert "missing lm_head.weight" in refused(weights, replace(config, tie_word_embeddings=False))


def test_names_of_two_formats(weights, config):
    weights["model.layers.0.mixer.up_proj.weight"] = weights["model.norm_f.weight"]
    assert "unknown model.layers.0.mixer.up_proj.weight" in refused(weights, config)


def test_another_models_weights(config):
    assert "no Rodimus weights" in refused({"transformer.wte.weight": mx.zeros((2, 2))}, config)


def test_shape_that_is_not_the_configs(weights, config):
    message = refused(weights, replace(config, vocab_size=12))
    assert "model.embeddings.weight has shape [11, 8], but by config.json it is [12, 8]" in message


CONTRADICTIONS = {
    "more layers": {"n_layer": 2},
    "forged number of layers": {"n_layer": 10**9},
    "no attention": {"block_type": "rodimus", "attn_cfg": {}},
    "wider": {"d_model": 16},
    "larger state": {"mixer_cfg": {**ARCHITECTURES["miniature"]["mixer_cfg"], "mem_size": 8}},
    "longer convolution": {"mixer_cfg": {**ARCHITECTURES["miniature"]["mixer_cfg"], "d_conv": 3}},
    "more key heads": {"attn_cfg": {**ARCHITECTURES["miniature"]["attn_cfg"], "num_heads_k": 2}},
}


@pytest.mark.parametrize("change", CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_config_that_disagrees_with_the_weights(weights, change):
    other = RodimusConfig.from_dict(json.loads(json.dumps({**ARCHITECTURES["miniature"], **change})))
    assert "config" in refused(weights, other)
