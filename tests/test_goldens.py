"""The goldens: what the official code and float64 make of four small checkpoints."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy_model
import pytest
from helpers import GOLDEN_NAMES, as_float64, golden, golden_model, relative_error, worst_position
from mlx.utils import tree_flatten
from rodimus_mlx.convert.mapping import parts

LOGITS = 1e-5  # float32 through 2 or 3 layers; the official float32 code is 2e-6 from the same float64 values
GRADIENT = 1e-4  # the goldens' gradients are float32 themselves
LOSS = 1e-6
BFLOAT16 = 3e-2  # 8 bits of mantissa through 2 layers
FORMULA = 1e-9  # float64 by the same formulas in another order

every_golden = pytest.mark.parametrize("name", GOLDEN_NAMES)


@every_golden
def test_logits(name):
    expected = golden(name)
    actual = golden_model(name)(mx.array(expected["tokens"]))
    assert actual.dtype == mx.float32
    assert worst_position(actual, expected["logits_f64"]) <= LOGITS


@every_golden
def test_logits_with_left_padding(name):
    expected = golden(name)
    mask = expected["mask"]
    actual = golden_model(name)(mx.array(expected["tokens"]), mask=mx.array(mask))
    assert worst_position(as_float64(actual)[mask], expected["logits_masked_f64"][mask]) <= LOGITS


@every_golden
def test_last_hidden_state(name):
    """`hidden/0` is the output of the last norm, which the head turns into logits."""
    expected = golden(name)
    actual = golden_model(name).model(mx.array(expected["tokens"]))
    assert worst_position(actual, expected["hidden/0"]) <= LOGITS


@every_golden
def test_loss_and_gradients(name):
    expected = golden(name)
    model = golden_model(name)
    tokens = mx.array(expected["tokens"])

    def loss(model):
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")

    value, gradients = nn.value_and_grad(model, loss)(model)
    assert value.item() == pytest.approx(float(expected["loss"]), rel=LOSS)
    gradients = dict(tree_flatten(gradients))
    official = parts(model.args, "official")
    errors = {}
    for key in expected:
        if key.startswith("grad/"):
            part = official[key.removeprefix("grad/").replace("/", ".")]
            actual = gradients[part.ours][part.start : part.stop].reshape(part.shape)
            errors[key] = relative_error(actual, expected[key])
    assert len(errors) >= 13
    assert {key: error for key, error in errors.items() if error > GRADIENT} == {}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_logits_in_bfloat16(padded):
    expected = golden("plus_untied_sharded")
    mask = expected["mask"] if padded else np.ones_like(expected["mask"])
    model = golden_model("plus_untied_sharded", mx.bfloat16)
    actual = model(mx.array(expected["tokens"]), mask=mx.array(mask) if padded else None)
    assert actual.dtype == mx.bfloat16
    reference = expected["logits_masked_f64" if padded else "logits_f64"]
    assert relative_error(as_float64(actual)[mask], reference[mask]) <= BFLOAT16


@every_golden
def test_numpy_model_is_the_model(name):
    """What tests of other configs compare with agrees with the goldens itself."""
    expected = golden(name)
    model = golden_model(name)
    weights = {key: as_float64(value) for key, value in tree_flatten(model.parameters())}
    actual = [numpy_model.logits(weights, model.args, row) for row in expected["tokens"]]
    assert worst_position(np.stack(actual), expected["logits_f64"]) <= FORMULA
