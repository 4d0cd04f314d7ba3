"""What each method trains, what its adapter holds, and that the adapter gives back what was trained."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from helpers import largest_difference, random_model, random_tokens, run_in_steps, tiny_config
from training import random_samples, small_model

import rodimus_mlx
from rodimus_mlx.errors import RodimusError
from rodimus_mlx.finetune.adapters import apply
from rodimus_mlx.finetune.fuse import fuse
from rodimus_mlx.finetune.methods import prepare
from rodimus_mlx.finetune.parameters import named
from rodimus_mlx.finetune.saving import save_checkpoint
from rodimus_mlx.finetune.settings import METHODS, Settings
from rodimus_mlx.finetune.trainer import train
from rodimus_mlx.loading import load_model

SAME = 2e-5  # float32 sums in another order
FUSED = 1e-3  # a fused weight is rounded once more, and logits are of order 10
every_method = pytest.mark.parametrize("method", METHODS)


def trained(tmp_path, model, **choices):
    """Train for a few large steps; the logits of the trained model for some tokens, and the adapter's folder."""
    out = tmp_path / "adapter"
    base = {"iters": 3, "seq_len": 40, "learning_rate": 0.02, "batch_size": 2}
    train(model, random_samples(8), Settings(**{**base, **choices}), out=out)
    tokens = random_tokens(model, 2, 23)
    return model(tokens), tokens, out


@every_method
def test_an_adapter_gives_back_what_was_trained(method, tmp_path):
    logits, tokens, out = trained(tmp_path, small_model(), method=method)
    model = small_model()
    before = model(tokens)
    assert apply(model, out) == method
    assert largest_difference(model(tokens), logits) <= SAME
    assert largest_difference(before, logits) > 0.1
    steps = run_in_steps(model, tokens, [9, 1, 1, 12])  # the adapter also holds while generating
    assert largest_difference(steps, logits) <= 10 * SAME


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_stock_mlx_lm_reads_the_adapter(method, tmp_path):
    logits, tokens, out = trained(tmp_path, small_model(), method=method)
    model = small_model()
    mlx_lm.utils.load_adapters(model, str(out))
    model.eval()
    assert largest_difference(model(tokens), logits) <= SAME


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_a_fused_model_is_the_model_with_its_adapter(method, tmp_path):
    save_checkpoint(small_model(), None, tmp_path / "base", "Random.")
    logits, tokens, out = trained(tmp_path, small_model(), method=method)
    with pytest.warns(rodimus_mlx.errors.RodimusWarning, match="needs a tokenizer"):
        fuse(tmp_path / "base", out, tmp_path / "fused")
    fused, config = load_model(tmp_path / "fused")
    assert largest_difference(fused(tokens), logits) <= FUSED
    assert config["torch_dtype"] == "float32"
    with pytest.raises(RodimusError, match="not empty"):
        fuse(tmp_path / "base", out, tmp_path / "fused")


def test_a_state_cannot_be_fused(tmp_path):
    save_checkpoint(small_model(), None, tmp_path / "base", "Random.")
    _, _, out = trained(tmp_path, small_model(), method="state")
    with pytest.raises(RodimusError, match="holds initial states"):
        fuse(tmp_path / "base", out, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def quantized(tmp_path):
    """A 4-bit checkpoint and the model in it; its sizes are multiples of the group."""
    sizes = {"d_model": 64, "mixer_cfg": {"expand_ratio": 2, "mem_size": 16, "input_gate_low_rank": 32}}
    model = random_model(tiny_config(**sizes, attn_cfg={"num_heads": 4, "ffn_expand_ratio": 1}))
    nn.quantize(model, group_size=32, bits=4)
    save_checkpoint(model, None, tmp_path / "base", "Random.", {"group_size": 32, "bits": 4, "mode": "affine"})
    return load_model(tmp_path / "base")[0]


@pytest.mark.filterwarnings("ignore:.*needs a tokenizer")
@pytest.mark.parametrize("method", ["lora", "dora", "state"])
def test_quantized_models_train_the_same_way(method, tmp_path):
    model = quantized(tmp_path)
    logits, tokens, out = trained(tmp_path, model, method=method)
    loaded = load_model(tmp_path / "base")[0]
    apply(loaded, out)
    assert largest_difference(loaded(tokens), logits) <= SAME
    if method == "lora":
        fuse(tmp_path / "base", out, tmp_path / "full", dequantize=True)
        plain, config = load_model(tmp_path / "full")
        assert "quantization" not in config
        assert largest_difference(plain(tokens), logits) <= FUSED
        fuse(tmp_path / "base", out, tmp_path / "packed")
        packed, config = load_model(tmp_path / "packed")
        assert config["quantization"]["bits"] == 4 and isinstance(packed.layers[0].mixer.fc, nn.QuantizedLinear)


def test_a_quantized_model_cannot_be_trained_in_full(tmp_path):
    with pytest.raises(RodimusError, match="--method full cannot train a quantized model"):
        prepare(quantized(tmp_path), Settings(method="full"))


@pytest.mark.parametrize("layers", [-1, 1], ids=["all", "last"])
@every_method
def test_what_is_trained(method, layers):
    model = small_model()
    names = set(prepare(model, Settings(method=method, num_layers=layers)))
    assert any(".layers.1." in name for name in names)
    assert any(".layers.0." in name for name in names) == (layers == -1)
    leaves = {name.rsplit(".", 1)[-1] for name in names}
    expected = {
        "lora": {"lora_a", "lora_b"},
        "dora": {"lora_a", "lora_b", "m"},
        "state": {"initial_state", "gate_bias"},
    }
    assert leaves == expected.get(method, leaves)
    if method == "full":
        assert (names == set(named(small_model().parameters()))) == (layers == -1)


def test_a_state_adapter_is_no_larger_than_a_state_and_its_biases(tmp_path):
    _, _, out = trained(tmp_path, small_model(), method="state")
    arrays = mx.load(str(out / "adapters.safetensors"))
    c = small_model().args
    assert sum(a.size for a in arrays.values()) == c.n_layer * (c.mem_size * c.d_inner + 2 * c.mem_size)


def test_an_initial_state_is_what_a_text_before_would_have_left(tmp_path):
    """A model whose initial states are those after a prefix goes on as after it, but for window and convolution."""
    model = small_model("rodimus", mixer_cfg={"d_conv": 1})  # neither window nor convolution: the state is all
    tokens = random_tokens(model, 1, 30)
    expected = model(tokens)[:, 20:]
    cache = model.make_cache()
    model(tokens[:, :20], cache=cache)
    parameters = prepare(model, Settings(method="state"))
    states = {f"model.layers.{i}.mixer.initial_state": layer[1][0] for i, layer in enumerate(cache)}
    assert states.keys() < parameters.keys()
    model.load_weights(list(states.items()), strict=False)
    assert largest_difference(model(tokens[:, 20:]), expected) <= SAME


def test_chosen_layers_alone():
    names = prepare(small_model(), Settings(keys=("mixer.fc",)))
    assert {name.split(".", 3)[-1] for name in names} == {"mixer.fc.lora_a", "mixer.fc.lora_b"}
    assert "lm_head.lora_a" in prepare(small_model(tie_word_embeddings=False), Settings(keys=("lm_head",)))
    with pytest.raises(RodimusError, match=r"the model has no layer 'q_proj'; blocks have attn\.out_proj, "):
        prepare(small_model(), Settings(keys=("q_proj",)))


def test_too_many_layers():
    with pytest.raises(RodimusError, match="--num-layers is 3, but the model has 2 layers"):
        prepare(small_model(), Settings(num_layers=3))


def test_low_rank_matrices_follow_the_models_type(tmp_path):
    _, _, out = trained(tmp_path, small_model())
    half = small_model()
    half.set_dtype(mx.bfloat16)
    apply(half, out)
    assert half.layers[0].mixer.fc.lora_a.dtype == mx.bfloat16
    assert half(mx.array([[1, 2, 3]])).dtype == mx.bfloat16


@every_method
def test_an_adapter_of_another_model_is_one_line(method, tmp_path):
    _, _, out = trained(tmp_path, small_model(), method=method)
    with pytest.raises(RodimusError, match="the adapter does not fit this model: ") as error:
        apply(small_model(mixer_cfg={"mem_size": 12}, d_model=36), out)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("layers", [-1, 1], ids=["all", "last"])
@pytest.mark.parametrize(("own", "other"), [(2, 4), (4, 2)], ids=["deeper", "shallower"])
@every_method
def test_an_adapter_of_a_model_of_another_depth_is_one_line(method, own, other, layers, tmp_path):
    _, _, out = trained(tmp_path, small_model(n_layer=own), method=method, num_layers=layers)
    message = rf"{out}: the adapter does not fit this model: .*model\.layers\.\d\."
    with pytest.raises(RodimusError, match=message) as error:
        apply(small_model(n_layer=other), out)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("leaf", [".norm_f.weight", ".embeddings.weight"])
def test_all_weights_must_be_in_an_adapter_of_all(leaf, tmp_path):
    _, _, out = trained(tmp_path, small_model(), method="full")
    file = str(out / "adapters.safetensors")
    weights = {name: p for name, p in mx.load(file).items() if not name.endswith(leaf)}
    mx.eval(weights)
    mx.save_safetensors(file, weights)
    model = small_model()
    with pytest.raises(RodimusError, match=f"{out}: .*: the adapter has no model{leaf}"):
        apply(model, out)
    assert mx.array_equal(model.layers[0].mixer.fc.weight, small_model().layers[0].mixer.fc.weight)
    config = json.loads((out / "adapter_config.json").read_text())
    del config["settings"]  # as mlx-lm's own training writes it, which takes the blocks alone
    (out / "adapter_config.json").write_text(json.dumps(config))
    assert apply(model, out) == "full"


def test_an_adapter_takes_the_place_of_another(tmp_path):
    logits, tokens, out = trained(tmp_path, small_model())
    model = small_model()
    for _ in range(2):
        apply(model, out)
        assert largest_difference(model(tokens), logits) <= SAME


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        (None, True, "is not an adapter: it has no adapter_config.json"),
        ("{", True, "adapter_config.json cannot be read"),
        ("[]", True, "adapter_config.json must hold a JSON object"),
        ('{"fine_tune_type": "magic"}', True, "fine_tune_type 'magic' is not one of lora, dora, full, state"),
        ('{"fine_tune_type": "lora"}', True, "the adapter does not fit this model"),
        ('{"lora_parameters": {"scale": "x"}}', True, "lora_parameters.scale must be a number, not 'x'"),
        ('{"lora_parameters": {"scale": NaN}}', True, "lora_parameters.scale must be a number, not nan"),
        ("{}", False, "has no adapters.safetensors"),
    ],
)
def test_folders_that_are_no_adapters(config, weights, message, tmp_path):
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(config)
    if weights:
        mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {"x": mx.zeros(1)})
    with pytest.raises(RodimusError, match=message):
        apply(small_model(), tmp_path)


def test_the_adapters_config_has_mlx_lms_entries(tmp_path):
    _, _, out = trained(tmp_path, small_model(), rank=3, scale=5.0, keys=("mixer.fc",), num_layers=1)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == 1
    assert config["lora_parameters"] == {"rank": 3, "scale": 5.0, "dropout": 0.0, "keys": ["mixer.fc"]}
    assert np.array(mx.load(str(out / "adapters.safetensors"))["model.layers.1.mixer.fc.lora_a"]).shape == (48, 3)
