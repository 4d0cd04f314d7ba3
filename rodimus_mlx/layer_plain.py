"""The functions of layer_ops.py in plain MLX: what runs on a CPU, and what the kernels are compared with.

Arguments and shapes are those of the functions of the same name there; x and z stand for the halves of xz.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import mlx.nn as nn

from .marks import PADDING, START
from .pieces import split


def add_norm(h: mx.array, delta: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    total = h + delta
    return total, norm(total, weight, eps)


def norm(h: mx.array, weight: mx.array, eps: float, delta: mx.array | None = None) -> mx.array:
    h = h if delta is None else h + delta
    return _rms_norm(h, weight, eps).astype(weight.dtype)


def _rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """The weight apart: MLX's gradient would make an array as large as x for the weight's, also where it is frozen."""
    return mx.fast.rms_norm(x, None, eps) * weight


def conv_gate(
    x: mx.array,
    u: mx.array,
    value_bias: mx.array,
    tail: mx.array,
    weight: mx.array,
    bias: mx.array,
    marks: mx.array | None,
) -> tuple[mx.array, mx.array, mx.array]:
    x = _without_padding(x, marks)
    shifted, _ = _shifted(x, tail, marks, weight.shape[1])
    c = _convolved(shifted, [weight[:, i] for i in range(weight.shape[1])], bias)
    return c, _gated(u, value_bias, x), next_tail(x, tail, marks)


def _without_padding(x: mx.array, marks: mx.array | None) -> mx.array:
    return x if marks is None else mx.where((marks != PADDING)[..., None], x, 0)


def next_tail(x: mx.array, tail: mx.array, marks: mx.array | None) -> mx.array:
    """The last K - 1 inputs, in memory of their own: a view would keep all inputs alive."""
    count, length = tail.shape[1], x.shape[1]
    last = max(0, length - count)
    x = _without_padding(x[:, last:], None if marks is None else marks[:, last:])
    return mx.contiguous(x if length >= count else mx.concatenate([tail[:, length:], x], axis=1))


def _shifted(
    x: mx.array, tail: mx.array, marks: mx.array | None, taps: int
) -> tuple[list[mx.array], list[mx.array | None]]:
    """What each tap meets, [B, T, D], and where it may reach: [B, T, 1] bool, None: everywhere."""
    length = x.shape[1]
    inputs = mx.concatenate([tail, x], axis=1)
    shifted = [inputs[:, i : i + length] for i in range(taps)]
    reaches: list[mx.array | None] = [None] * taps
    if marks is not None:
        reach = mx.ones(marks.shape, dtype=mx.bool_)  # may a tap that is `back` tokens away still be used
        starts = mx.pad(marks == START, [(0, 0), (taps - 1, 0)])
        for back in range(1, taps):
            reach = reach & ~starts[:, taps - back : taps - back + length]
            tap = taps - 1 - back
            reaches[tap] = reach[..., None]
            shifted[tap] = mx.where(reach[..., None], shifted[tap], 0)
    return shifted, reaches


def conv_gate_gradient(
    x: mx.array,
    u: mx.array,
    value_bias: mx.array,
    tail: mx.array,
    weight: mx.array,
    bias: mx.array,
    d_c: mx.array,
    d_v: mx.array,
    *,
    marks: mx.array | None,
) -> tuple[mx.array, ...]:
    """The gradients of `conv_gate`'s c and v in its first six arguments.

    The convolution's is a convolution, reversed in time. MLX computes none that nobody asks for, like those of frozen
    filters.
    """
    taps, length = weight.shape[1], x.shape[1]
    x = _without_padding(x, marks)
    shifted, reaches = _shifted(x, tail, marks, taps)
    filters = [weight[:, i] for i in range(taps)]
    d_sum = _silu_gradient(_weighted_sum(shifted, filters, bias), d_c)
    # What a token gave each tap comes back from the tokens behind it, in the type of x.
    ahead = [(0, 0), (0, taps - 1), (0, 0)]
    behind = mx.pad(d_sum.astype(x.dtype), ahead)
    returned = []
    for tap, reach in enumerate(reaches):
        place = slice(taps - 1 - tap, taps - 1 - tap + length)
        each = behind[:, place]
        returned.append(each if reach is None else mx.where(mx.pad(reach, ahead)[:, place], each, 0))
    d_x, d_u = _gated_gradient(u, value_bias, x, d_v, _weighted_sum(returned, filters, mx.zeros_like(bias)))
    d_tail = mx.zeros(tail.shape, mx.float32)
    for tap in range(taps - 1):
        count = min(taps - 1 - tap, length)  # tokens whose tap meets the tail, the first of them its input `tap`
        first, reach = d_sum[:, :count], reaches[tap]
        if reach is not None:
            first = mx.where(reach[:, :count], first, 0)
        d_tail = d_tail + mx.pad(filters[tap] * first, [(0, 0), (tap, taps - 1 - tap - count), (0, 0)])
    return (
        _without_padding(d_x.astype(x.dtype), marks),
        d_u.astype(u.dtype),
        d_u.sum(axis=(0, 1)).astype(value_bias.dtype),
        d_tail.astype(tail.dtype),
        mx.stack([(d_sum * each).sum(axis=(0, 1)) for each in shifted], axis=1).astype(weight.dtype),
        d_sum.sum(axis=(0, 1)).astype(bias.dtype),
    )


@partial(mx.compile, shapeless=True)
def _weighted_sum(shifted: list[mx.array], weights: list[mx.array], bias: mx.array) -> mx.array:
    total = bias.astype(mx.float32)
    for x, weight in zip(shifted, weights):
        total = total + weight.astype(mx.float32) * x.astype(mx.float32)
    return total


@partial(mx.compile, shapeless=True)
def _convolved(shifted: list[mx.array], weights: list[mx.array], bias: mx.array) -> mx.array:
    return nn.silu(_weighted_sum(shifted, weights, bias)).astype(shifted[0].dtype)


@partial(mx.compile, shapeless=True)
def _silu_gradient(x: mx.array, cotangent: mx.array) -> mx.array:
    gate = mx.sigmoid(x)
    return cotangent.astype(mx.float32) * gate * (1 + x * (1 - gate))


@partial(mx.compile, shapeless=True)
def _gated(u: mx.array, bias: mx.array, x: mx.array) -> mx.array:
    return mx.sigmoid(u.astype(mx.float32) + bias.astype(mx.float32)) * x.astype(mx.float32)


@partial(mx.compile, shapeless=True)
def _gated_gradient(
    u: mx.array, bias: mx.array, x: mx.array, d_v: mx.array, d_x: mx.array
) -> tuple[mx.array, mx.array]:
    gate = mx.sigmoid(u.astype(mx.float32) + bias.astype(mx.float32))
    return d_x + d_v * gate, d_v * x.astype(mx.float32) * gate * (1 - gate)


def gate_norm(
    o: mx.array, c: mx.array, z: mx.array, residual_weight: mx.array, weight: mx.array, eps: float
) -> mx.array:
    return _rms_norm(_gate_output(o, c, residual_weight, z), weight, eps).astype(c.dtype)


@partial(mx.compile, shapeless=True)
def _gate_output(o: mx.array, c: mx.array, weight: mx.array, z: mx.array) -> mx.array:
    out = o.astype(mx.float32) + weight.astype(mx.float32) * c.astype(mx.float32)
    return out * nn.silu(z.astype(mx.float32))


def split_heads(
    qkv: mx.array, offset: mx.array, counts: tuple[int, int, int], rope_dims: int, base: float, differentiable: bool
) -> tuple[mx.array, mx.array, mx.array]:
    batch, length, width = qkv.shape
    num_heads, num_k, _ = counts
    head = width // sum(counts)
    qk, v = split(qkv, (num_heads + num_k) * head, -1, differentiable)
    qk = qk.reshape(batch, length, num_heads + num_k, head).swapaxes(1, 2)  # [B, H + Hk, T, F]
    if rope_dims:
        qk = mx.fast.rope(qk, rope_dims, traditional=False, base=base, scale=1.0, offset=offset)
    q, k = split(qk, num_heads, 1, differentiable)
    k = k if num_k == 1 else k.swapaxes(1, 2).reshape(batch, 1, length, -1)
    return q, k, v[:, None]


def join_heads(
    qkv: mx.array,
    offset: mx.array,
    counts: tuple[int, int, int],
    rope_dims: int,
    base: float,
    past: tuple[mx.array, ...],
    window: int,
    rows: int,
) -> tuple[mx.array, mx.array, mx.array]:
    q, *kv = split_heads(qkv, offset, counts, rope_dims, base, False)
    padding = [(0, 0), (0, 0), (0, rows - qkv.shape[1]), (0, 0)]
    old = [x[:, :, max(0, x.shape[2] - window) :] for x in past]
    k, v = (mx.concatenate([*old[i : i + 1], mx.pad(x, padding)], axis=2) for i, x in enumerate(kv))
    return mx.pad(q, padding), k, v


def swiglu(x: mx.array) -> mx.array:
    value, gate = split(x, x.shape[-1] // 2)
    return _silu_times(gate, value)


@partial(mx.compile, shapeless=True)
def _silu_times(gate: mx.array, value: mx.array) -> mx.array:
    return (nn.silu(gate.astype(mx.float32)) * value.astype(mx.float32)).astype(value.dtype)
