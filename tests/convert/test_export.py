"""Back to PyTorch's formats: every bit as it came."""

import mlx.core as mx
import pytest
from helpers import largest_difference, relative_error
from rodimus_mlx.convert.checkpoint import open_checkpoint
from rodimus_mlx.convert.convert import convert
from rodimus_mlx.convert.mapping import expected_shapes
from rodimus_mlx.convert.schemes import Scheme
from synthetic import write_checkpoint

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.errors import RodimusError
from rodimus_mlx.loading import load_model

from .conftest import PLAIN, SMALL, logits

pytestmark = pytest.mark.filterwarnings("ignore:.* has no tokenizer")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("format", ["bin", "safetensors"])
@pytest.mark.parametrize("config", [SMALL, PLAIN], ids=["plus", "rodimus"])
def test_official_there_and_back(source, out, config, format, dtype):
    folder = source(config, dtype, format)
    back = out.with_name("back")
    convert(folder, out)
    convert(out, back, to="official")
    before, after = open_checkpoint(folder), open_checkpoint(back)
    assert before.tensors.keys() == after.tensors.keys()
    for name, tensor in before.tensors.items():
        found = after.tensors[name]
        assert (found.shape, found.stored) == (tensor.shape, tensor.stored)
        assert mx.array_equal(found.read().view(mx.uint8), tensor.read().view(mx.uint8))
    assert RodimusConfig.from_dict(after.config) == RodimusConfig.from_dict(before.config)
    assert "model_file" not in after.config and not (back / "rodimus.py").exists()
    assert b'"format":"pt"' in (back / "model.safetensors").read_bytes()[:200]


@pytest.mark.parametrize("config", [SMALL, PLAIN], ids=["plus", "rodimus"])
def test_fla_there_and_back(source, out, config):
    folder = source(config)
    fla, ours, back = (out.with_name(name) for name in ("fla", "ours", "back"))
    convert(folder, fla, to="fla")
    assert convert(fla, ours).format == "fla"
    convert(ours, back, to="fla")
    assert (fla / "model.safetensors").read_bytes() == (back / "model.safetensors").read_bytes()
    assert (fla / "config.json").read_bytes() == (back / "config.json").read_bytes()
    expected, _ = load_model(folder)
    for each in (fla, ours):
        model, _ = load_model(each)
        assert model.args == expected.args
        assert largest_difference(logits(model), logits(expected)) == 0


def test_golden_of_fla(goldens, out):
    convert(goldens / "plus_fla", out, to="official")
    fla, official = open_checkpoint(goldens / "plus_bin"), open_checkpoint(out)
    shared = official.tensors.keys() & fla.tensors.keys()
    assert len(shared) > 20 and all(
        mx.array_equal(official.tensors[name].read(), fla.tensors[name].read()) for name in shared
    )


@pytest.mark.parametrize("to", ["official", "fla"])
def test_quantized_export(source, out, to):
    convert(source(), out, scheme=Scheme(8, 64))
    back = out.with_name("back")
    with pytest.raises(RodimusError, match=f"which the {to} format does not know: add --dequantize"):
        convert(out, back, to=to)
    convert(out, back, dequantize=True, to=to)
    model, _ = load_model(back)
    expected, _ = load_model(source(), dtype=mx.bfloat16)
    assert model.args == expected.args
    assert relative_error(logits(model), logits(expected)) < 0.1  # 8 bits of each weight


@pytest.mark.parametrize(
    "change, option",
    [
        ({"use_scale_embedding": True}, "use_scale_embedding"),
        ({"mixer_cfg": {**SMALL["mixer_cfg"], "expand_ratio": 3}}, "mixer_cfg.expand_ratio"),
        ({"attn_cfg": {**SMALL["attn_cfg"], "rotary_emb_dim": 0}}, "attn_cfg.rotary_emb_dim"),
    ],
)
def test_what_fla_has_not(tmp_path, change, option):
    config = {**SMALL, **change}
    shapes = expected_shapes(RodimusConfig.from_dict(config))
    folder = tmp_path / "source"
    write_checkpoint(folder, config, {})
    mx.save_safetensors(str(folder / "model.safetensors"), {name: mx.zeros(shape) for name, shape in shapes.items()})
    with pytest.raises(RodimusError, match=f"the fla format has no {option}"):
        convert(folder, tmp_path / "out", to="fla")
    assert not (tmp_path / "out").exists()
