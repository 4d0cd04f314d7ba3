"""The gradient of convolution and gate, written out, against MLX's own of the plain form."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rodimus_mlx import layer_plain
from rodimus_mlx.pieces import split, windows

TOLERANCE = 5e-6  # float32 sums of some tens of terms of about 1
FEATURES, TAPS = 8, 4


@settings(max_examples=40, deadline=None)
@given(data=st.data(), batch=st.integers(1, 2), length=st.integers(1, 20), marked=st.booleans())
def test_conv_gate_gradient(data: st.DataObject, batch: int, length: int, marked: bool) -> None:
    rows = st.lists(st.integers(0, 2), min_size=length, max_size=length)
    marks = mx.array([data.draw(rows) for _ in range(batch)], mx.uint8) if marked else None
    mx.random.seed(length)
    x, u, d_c, d_v = mx.random.normal((4, batch, length, FEATURES))
    value_bias, bias = mx.random.normal((2, FEATURES))
    tail, weight = mx.random.normal((batch, TAPS - 1, FEATURES)), mx.random.normal((FEATURES, TAPS))
    inputs = [x, u, value_bias, tail, weight, bias]
    _, expected = mx.vjp(lambda *inputs: layer_plain.conv_gate(*inputs, marks)[:2], inputs, [d_c, d_v])
    found = layer_plain.conv_gate_gradient(*inputs, d_c, d_v, marks=marks)
    for theirs, ours in zip(expected, found):
        assert ours.shape == theirs.shape
        assert mx.abs(ours - theirs).max() <= TOLERANCE


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_next_tail_is_the_last_inputs(length: int) -> None:
    x, tail = mx.random.normal((2, length, FEATURES)), mx.random.normal((2, TAPS - 1, FEATURES))
    marks = mx.array([[1] * length, [0] * length], mx.uint8)
    expected = mx.concatenate([tail, mx.where((marks != 0)[..., None], x, 0)], axis=1)[:, length:]
    assert mx.array_equal(layer_plain.next_tail(x, tail, marks), expected)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 12),
    cuts=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=4),
    axis=st.sampled_from([0, 1, -1]),
)
def test_windows_have_the_gradient_of_slices(size: int, cuts: list[tuple[int, int]], axis: int) -> None:
    bounds = [(min(pair), max(pair)) for pair in cuts if min(pair) < max(pair) <= size]
    shape = [2, 3, 4]
    shape[axis] = size
    x = mx.random.normal(shape)

    def total(slices: Callable[[mx.array], list[mx.array]]) -> Callable[[mx.array], mx.array]:
        return lambda x: sum(((i + 1) * each**2).sum() for i, each in enumerate(slices(x))) + mx.array(0.0)

    def plain(x: mx.array) -> list[mx.array]:
        return [mx.take(x, mx.arange(begin, end), axis=axis) for begin, end in bounds]

    if not bounds:
        return
    ours, expected = mx.grad(total(lambda x: windows(x, bounds, axis)))(x), mx.grad(total(plain))(x)
    assert mx.allclose(ours, expected, atol=TOLERANCE)


def test_split_is_two_slices() -> None:
    x = mx.random.normal((2, 5))
    first, second = split(x, 2)
    assert mx.array_equal(first, x[:, :2]) and mx.array_equal(second, x[:, 2:])
