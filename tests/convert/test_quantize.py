"""Quantizing while converting: the same as in memory, of the size promised, and back in full."""

import warnings
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers import relative_error
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as mlx_lm_load_model
from quantized import quantized_in_memory
from rodimus_mlx.convert.checkpoint import Checkpoint, open_checkpoint
from rodimus_mlx.convert.convert import convert
from rodimus_mlx.convert.mapping import count_parameters, expected_shapes
from rodimus_mlx.convert.outputs import Wish, prepare
from rodimus_mlx.convert.schemes import MODES, RECIPES, SENSITIVE, Scheme, choose, make_scheme, scheme_of
from rodimus_mlx.convert.tensors import LazyTensor
from rodimus_mlx.convert.writer import write_json
from synthetic import ARCHITECTURES, official_shapes, write_checkpoint

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.errors import RodimusError, RodimusWarning
from rodimus_mlx.loading import load_model

from .conftest import PLAIN, SMALL, logits

SCHEMES = [Scheme(bits, 64) for bits in (2, 3, 4, 5, 6, 8)] + [make_scheme(mode=mode) for mode in MODES]
SCHEMES += [Scheme(4, 32), Scheme(3, 128)]
ROUNDING = 2e-5  # of float32 sums in another order, relative to the logits
# Bits per weight at 4 bit: 4.5 with scales and biases, and what 16 bits for the sensitive parts add. The 1.4B, which
# has only mixers, has twice as many of those.
MOST_BITS = {"1.6b": 4.8, "4b": 4.8, "1.4b": 5.0}

pytestmark = pytest.mark.filterwarnings("ignore:.* has no tokenizer")


def parts_of(model):
    return model.args, dict(tree_flatten(model.parameters()))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_same_as_in_memory(source, out, scheme):
    summary = convert(source(), out, scheme=scheme)
    found, _ = load_model(out)
    model, _ = load_model(source(), dtype=mx.bfloat16)
    expected = quantized_in_memory(*parts_of(model), choose(model.args, scheme, "default"))
    assert found.args.ffn_padding == (80 if scheme.group_size == 128 else 16)
    assert replace(found.args, eos_token_id=1) == expected.args
    ours, theirs = (dict(tree_flatten(each.parameters())) for each in (found, expected))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and mx.array_equal(ours[name], theirs[name]), name
    assert mx.array_equal(logits(found), logits(expected))
    assert summary.quantization == {"bits": scheme.bits, "group_size": scheme.group_size, "mode": scheme.mode}


@pytest.mark.parametrize("config", [SMALL, PLAIN], ids=["plus", "rodimus"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_open_in_mlx_lm(source, out, config, recipe):
    convert(source(config), out, scheme=scheme_of(recipe, None, 64, None), recipe=recipe)
    found, _ = load_model(out)
    theirs, table = mlx_lm_load_model(out, trust_remote_code=True)
    assert mx.array_equal(logits(found), logits(theirs))
    assert table["quantization"] == table["quantization_config"]
    model, _ = load_model(source(config), dtype=mx.bfloat16)
    expected = quantized_in_memory(*parts_of(model), choose(model.args, scheme_of(recipe, None, 64, None), recipe))
    assert mx.array_equal(logits(found), logits(expected))


def test_what_is_sensitive_stays_fine(source, out):
    convert(source(), out, scheme=Scheme(4, 64))
    tensors = open_checkpoint(out).tensors
    fine = {name.split("layers.0.")[-1] for name, tensor in tensors.items() if tensor.stored == "bfloat16"}
    fine = {name for name in fine if not name.startswith("model.") and name.endswith((".weight", "bias", "_weight"))}
    kept = {"mixer.residual_weight", "mixer.gate_bias", "mixer.value_bias", "mixer.conv.weight", "mixer.conv.bias"}
    kept |= {f"{part}.weight" for part in SENSITIVE}
    norms = {f"{name}_norm.weight" for name in ("mixer", "attn", "ffn", "mixer.act")}
    assert fine == kept | norms
    assert tensors["model.norm_f.weight"].stored == "bfloat16"
    assert tensors["model.embeddings.weight"].stored == "uint32"


@pytest.mark.parametrize("given, dtype, kept", [("float32", None, "bfloat16"), ("float16", None, "float16")])
def test_dtype_beside_quantized_weights(source, out, given, dtype, kept):
    assert convert(source(dtype=given), out, dtype, scheme=Scheme(4, 64)).dtype == kept
    assert open_checkpoint(out).config["torch_dtype"] == kept


def test_float32_where_wished(source, out):
    assert convert(source(), out, "float32", scheme=Scheme(4, 64)).dtype == "float32"
    assert open_checkpoint(out).tensors["model.layers.0.mixer.fc.scales"].stored == "float32"


def released(arch, dtype):
    """A released checkpoint's tensors, in a file that is not there: shapes are all that is asked for."""
    config = ARCHITECTURES[arch]
    tensors = {n: LazyTensor(None, dtype, shape, 0) for n, shape in official_shapes(config).items()}
    return Checkpoint(None, config, tensors, ())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ["1.6b", "4b", "1.4b"])
def test_bits_per_weight(arch, dtype):
    prepared = prepare(released(arch, dtype), Wish(scheme=make_scheme()))
    count = count_parameters(prepared.config)
    assert count == count_parameters(RodimusConfig.from_dict(ARCHITECTURES[arch]))
    assert 8 * sum(spec.nbytes for spec in prepared.specs.values()) / count <= MOST_BITS[arch]


def test_padding_changes_no_result(source, out):
    """A padded FFN in 8 bits against the same numbers in full, without padding."""
    convert(source(), out, "float32", scheme=Scheme(8, 64))
    padded, _ = load_model(out)
    convert(out, out.with_name("full"), dequantize=True)
    narrow, _ = load_model(out.with_name("full"))
    assert (padded.args.d_ffn, padded.args.ffn_padding) == (192, 16)
    assert (narrow.args.d_ffn, narrow.args.ffn_padding) == (176, 0)
    assert relative_error(logits(padded), logits(narrow)) < ROUNDING


def test_padding_in_full_precision(source):
    model, _ = load_model(source())
    wide = quantized_in_memory(*parts_of(model), {})
    assert wide.args.ffn_padding == 16
    assert relative_error(logits(wide), logits(model)) < ROUNDING


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_dequantized(source, out, scheme):
    convert(source(), out, scheme=scheme)
    full = out.with_name("full")
    summary = convert(out, full, dequantize=True)
    assert summary.dtype == "bfloat16" and summary.quantization is None
    checkpoint = open_checkpoint(full)
    config = RodimusConfig.from_dict(checkpoint.config)
    assert config == RodimusConfig.from_dict(SMALL) and "quantization" not in checkpoint.config
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == expected_shapes(config)
    packed = {name: tensor.read() for name, tensor in open_checkpoint(out).tensors.items()}
    for path, width in (("model.embeddings", 128), ("model.layers.1.ffn.out_proj", 176)):
        biases = packed.get(f"{path}.biases")
        arguments = (packed[f"{path}.weight"], packed[f"{path}.scales"], biases, scheme.group_size, scheme.bits)
        expected = mx.dequantize(*arguments, scheme.mode, dtype=mx.bfloat16)
        assert mx.array_equal(checkpoint.tensors[f"{path}.weight"].read(), expected[:, :width])


def test_quantized_anew(source, out):
    convert(source(), out, scheme=Scheme(8, 64))
    again = out.with_name("again")
    with pytest.raises(RodimusError, match="quantized already"):
        convert(out, again, scheme=Scheme(4, 32))
    convert(out, again, scheme=Scheme(4, 32), dequantize=True)
    assert open_checkpoint(again).config["quantization"] == Scheme(4, 32)._asdict()
    model, _ = load_model(again)
    assert (model.args.d_ffn, model.args.ffn_padding) == (192, 16)
    logits(model)


def test_trained_padding_is_kept(source, out, tmp_path):
    """A padded model whose padding was trained is a wider model; nothing of it may be lost."""
    convert(source(), out, scheme=Scheme(8, 64))
    mixed = tmp_path / "mixed"
    convert(out, mixed, dequantize=True)
    checkpoint = open_checkpoint(mixed)
    config = {**RodimusConfig.from_dict(SMALL).to_dict(), "ffn_padding": 16}  # 160 features and 16 that are not zero
    arrays = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
    trained = tmp_path / "trained"
    write_checkpoint(trained, config, {}, "safetensors")
    mx.save_safetensors(str(trained / "model.safetensors"), arrays)
    with pytest.warns(RodimusWarning, match=r"padding is no longer zero.*stays 176, not 160"):
        convert(trained, tmp_path / "last")
    found = RodimusConfig.from_dict(open_checkpoint(tmp_path / "last").config)
    assert (found.d_ffn, found.ffn_padding) == (176, 0)


# What does not go together


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((7, None, None), "affine has bits 2, 3, 4, 5, 6, 8, not 7"),
        ((4, 48, None), "affine has group size 32, 64, 128, not 48"),
        ((8, None, "mxfp4"), "mxfp4 has bits 4, not 8"),
        ((None, 64, "nvfp4"), "nvfp4 has group size 16, not 64"),
        ((4, 64, "gguf"), "the mode must be one of affine, mxfp4, mxfp8, nvfp4, not 'gguf'"),
    ],
)
def test_schemes_that_mlx_has_not(arguments, message):
    with pytest.raises(RodimusError) as caught:
        make_scheme(*arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize("rest", [(4, None, None), (None, None, "mxfp8"), (6, None, None)])
def test_mixed_recipes_choose_the_bits(rest):
    assert scheme_of("mixed_3_6", 3, 32, None) == Scheme(3, 32)
    with pytest.raises(RodimusError, match="chooses the bits itself"):
        scheme_of("mixed_3_6", *rest)
    with pytest.raises(RodimusError, match="the recipe must be one of default, all"):
        scheme_of("best", None, None, None)


def test_widths_that_fit_no_group(source, out):
    narrow = {**SMALL, "d_model": 80, "attn_cfg": {**SMALL["attn_cfg"], "num_heads": 4}}
    with pytest.warns(RodimusWarning, match=r"model\.embeddings, .* cannot be quantized"):
        convert(source(narrow), out, scheme=Scheme(4, 64))
    scales = {name.split(".", 3)[-1] for name in open_checkpoint(out).tensors if name.endswith(".scales")}
    assert scales == {"mixer.out_proj.scales", "ffn.out_proj.scales"}  # their rows are 160 and 128 long
    logits(load_model(out)[0])
    tiny = {**PLAIN, "d_model": 8}
    with pytest.raises(RodimusError, match="nothing can be quantized"):
        convert(source(tiny), out.with_name("nothing"), scheme=Scheme(4, 64))


def test_nothing_to_dequantize(source, out):
    with pytest.raises(RodimusError, match="is not quantized: there is nothing to dequantize"):
        convert(source(), out, dequantize=True)
    assert not out.exists()


@pytest.mark.parametrize(
    "table",
    [
        None,
        [],
        {"bits": 4},
        {"bits": 4, "group_size": 32},
        {"bits": 8, "group_size": 64},
        {"bits": "4", "group_size": 64},
        {"bits": 4, "group_size": 32, "mode": "mxfp4"},
        {"bits": 4, "group_size": 64, "model.embeddings": {"bits": 8, "group_size": 64}},
        {"bits": 4, "group_size": 64, "model.embeddings": False},
    ],
    ids=str,
)
def test_a_table_that_does_not_fit(source, out, table):
    convert(source(), out, scheme=Scheme(4, 64))
    config = {**open_checkpoint(out).config, "quantization": table}
    write_json(out / "config.json", config)
    with pytest.raises(RodimusError) as caught:
        load_model(out)
    assert "quantiz" in str(caught.value) and "\n" not in str(caught.value)


def test_an_entry_of_true_means_the_base(source, out):
    convert(source(), out, scheme=Scheme(4, 64))
    config = open_checkpoint(out).config
    table = {"bits": 4, "group_size": 64, "model.embeddings": True}  # of a folder from before there were modes
    write_json(out / "config.json", {**config, "quantization": table})
    assert convert(out, out.with_name("full"), dequantize=True).quantization is None


def test_nan_is_warned_of(tmp_path, arrays):
    config = {**ARCHITECTURES["miniature"], "d_model": 64}
    tensors = {n: np.zeros(shape, np.float32) for n, shape in official_shapes(config).items()}
    tensors["model.embeddings.weight"][2, 3] = np.nan
    folder = tmp_path / "source"
    write_checkpoint(folder, config, {})
    mx.save_safetensors(str(folder / "model.safetensors"), {n: mx.array(a) for n, a in tensors.items()})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert(folder, tmp_path / "out", scheme=Scheme(4, 64))
    assert [str(w.message) for w in caught if "NaN" in str(w.message)] == [
        "model.embeddings.weight has NaN or infinite weights"
    ]
