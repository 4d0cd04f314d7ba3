"""The model in every config option, against the same formulas in numpy and float64."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy_model
import pytest
from helpers import (
    VARIANTS,
    as_float64,
    largest_difference,
    random_model,
    random_tokens,
    relative_error,
    tiny_config,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map

from rodimus_mlx.attention import QUERY_BLOCK

LOGITS = 1e-5  # float32 against float64, as for the goldens
SAME = 1e-4  # float32 logits of size 1 to 5, summed in another order
BFLOAT16 = 5e-2  # 8 bits of mantissa, 48 features to average over


def numpy_logits(model, tokens):
    weights = {name: as_float64(value) for name, value in tree_flatten(model.parameters())}
    return np.stack([numpy_model.logits(weights, model.args, row) for row in np.array(tokens)])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option(variant):
    model = random_model(tiny_config(**VARIANTS[variant]))
    tokens = random_tokens(model, 2, 30)
    assert relative_error(model(tokens), numpy_logits(model, tokens)) <= LOGITS


@pytest.mark.parametrize("window", [10, 2 * QUERY_BLOCK + 6, None], ids=["short", "beyond_a_block", "full"])
def test_long_prompt(window):
    """Attention goes through more than one block of queries, with windows inside and beyond a block."""
    model = random_model(tiny_config(n_layer=1, attn_cfg={"window_size": window, "num_heads": 3}))
    tokens = random_tokens(model, 1, QUERY_BLOCK + 131)
    expected = numpy_logits(model, tokens)
    assert relative_error(model(tokens), expected) <= LOGITS
    cache = model.make_cache()
    pieces = [model(tokens[:, :77], cache=cache), model(tokens[:, 77:], cache=cache)]
    assert relative_error(mx.concatenate(pieces, axis=1), expected) <= LOGITS


@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_bfloat16(residual_in_fp32):
    """The stream between the layers is float32 or the weights' type; the logits are the weights'."""
    model = random_model(tiny_config(residual_in_fp32=residual_in_fp32))
    model.update(tree_map(lambda x: x.astype(mx.bfloat16), model.parameters()))
    streams = []

    class Spy:
        def __init__(self, layer):
            self.layer = layer

        def __call__(self, h, *rest):
            streams.append(h.dtype)
            return self.layer(h, *rest)

    tokens = random_tokens(model, 2, 30)
    expected = numpy_logits(model, tokens)
    model.model.layers = [Spy(layer) for layer in model.layers]
    actual = model(tokens)
    assert streams == [mx.float32 if residual_in_fp32 else mx.bfloat16] * 2
    assert actual.dtype == mx.bfloat16
    assert relative_error(actual, expected) <= BFLOAT16


@settings(max_examples=10)
@given(paddings=st.lists(st.integers(0, 29), min_size=1, max_size=4), seed=st.integers(0, 9))
@pytest.mark.parametrize("variant", ["keys3_values2", "full", "conv7", "rodimus"])
def test_left_padding(variant, paddings, seed):
    """Each row of a left-padded batch gets the logits that it gets alone, whatever the padding holds."""
    model = random_model(tiny_config(**VARIANTS[variant]))
    tokens = random_tokens(model, len(paddings), 30, seed)
    actual = model(tokens, mask=mx.arange(30) >= mx.array(paddings)[:, None])
    assert mx.all(mx.isfinite(actual)).item()
    for row, padding in enumerate(paddings):
        alone = model(tokens[row : row + 1, padding:])
        assert largest_difference(actual[row, padding:], alone[0]) <= SAME


def test_left_padding_beyond_a_block():
    model = random_model(tiny_config(n_layer=1))
    padding, length = QUERY_BLOCK + 5, QUERY_BLOCK + 40
    tokens = random_tokens(model, 2, length)
    actual = model(tokens, mask=mx.arange(length) >= mx.array([[0], [padding]]))
    assert mx.all(mx.isfinite(actual)).item()
    assert largest_difference(actual[1, padding:], model(tokens[1:, padding:])[0]) <= SAME


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_gradients_where_keys_are_zero(padded):
    """Convolutions of zeros give keys of length 0: their direction is undefined, the model's gradient is not."""
    model = random_model(tiny_config())
    for layer in model.layers:
        layer.mixer.conv.bias = mx.zeros_like(layer.mixer.conv.bias)
        if not padded:
            layer.mixer.conv.weight = mx.zeros_like(layer.mixer.conv.weight)
    tokens = random_tokens(model, 2, 12)
    mask = mx.arange(12) >= mx.array([[0], [6]]) if padded else None
    _, gradients = nn.value_and_grad(model, lambda model: model(tokens, mask=mask)[:, 6:].sum())(model)
    assert [name for name, gradient in tree_flatten(gradients) if not mx.all(mx.isfinite(gradient)).item()] == []


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (3,)])
def test_there_must_be_tokens(shape):
    with pytest.raises(ValueError, match="at least one row and one token"):
        random_model(tiny_config())(mx.zeros(shape, mx.int32))


@pytest.mark.parametrize("floor", [1e-12, 1e-30])
def test_keys_of_zeros_are_numbers_whatever_the_floor(floor):
    model = random_model(tiny_config(mixer_cfg={"normalize_epsilon": floor}))
    for layer in model.layers:
        layer.mixer.conv.weight, layer.mixer.conv.bias = (mx.zeros_like(x) for x in layer.mixer.conv.values())
    assert mx.all(mx.isfinite(model(random_tokens(model, 1, 5)))).item()


def test_padding_belongs_to_the_cache():
    model = random_model(tiny_config())
    tokens = random_tokens(model, 1, 3)
    with pytest.raises(ValueError, match="without a cache"):
        model(tokens, cache=model.make_cache(), mask=mx.ones((1, 3), mx.bool_))
    with pytest.raises(ValueError, match="without a cache"):
        model(tokens, cache=model.make_cache(), documents=mx.zeros((1, 3), mx.int32))
