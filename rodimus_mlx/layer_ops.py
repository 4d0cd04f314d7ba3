"""The layers' work between their matrix products: one launch each on a GPU, plain MLX elsewhere.

Each function computes in float32. Where a kernel ran forward, its gradient is that of the plain form, recomputed from
the inputs, so nothing but the inputs is kept for it; `differentiable` False saves the host that arrangement, which
decoding feels.

marks, where given, are [B, T] uint8: PADDING, TOKEN or START, the first token of a document packed behind another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .kernels import launchers
from .kernels.backend import active_backend
from .kernels.launch import Backend
from .pieces import split

PADDING, TOKEN, START = 0, 1, 2
FEW_ROWS = 8  # tokens of all rows, up to which a narrow product is taken into the kernel behind it


def add_norm(
    h: mx.array, delta: mx.array | None, weight: mx.array, eps: float, differentiable: bool = True
) -> tuple[mx.array, mx.array]:
    """h + delta, and its RMSNorm in the type of the weight, in which the layer behind it computes.

    Shapes: h [..., d], usually the float32 stream; delta [..., d] or None for nothing to add; weight [d].
    """
    if delta is None:
        return h, norm(h, weight, eps, differentiable=differentiable)
    backend = _backend(h)
    if backend is None:
        return _add_norm(h, delta, weight, eps)
    if not differentiable:
        return launchers.add_norm(h, delta, weight, eps, True, backend)

    def kernel(h: mx.array, delta: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
        return launchers.add_norm(h, delta, weight, eps, True, backend)

    return _with_gradient_of(partial(_add_norm, eps=eps), kernel)(h, delta, weight)


def norm(
    h: mx.array, weight: mx.array, eps: float, delta: mx.array | None = None, differentiable: bool = True
) -> mx.array:
    """RMSNorm of h (+ delta, which is not kept) [..., d] in the type of the weight."""
    backend = _backend(h)
    if backend is None:
        return _norm(h, weight, delta, eps=eps)
    if not differentiable:
        return launchers.add_norm(h, delta, weight, eps, False, backend)[1]

    def kernel(h: mx.array, weight: mx.array, delta: mx.array | None = None) -> mx.array:
        return launchers.add_norm(h, delta, weight, eps, False, backend)[1]

    inputs = (h, weight) if delta is None else (h, weight, delta)
    return _with_gradient_of(partial(_norm, eps=eps), kernel)(*inputs)


def conv_gate(
    xz: mx.array,
    u: mx.array,
    value_bias: mx.array,
    tail: mx.array,
    weight: mx.array,
    bias: mx.array,
    marks: mx.array | None,
    x: mx.array | None = None,
    expand: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """c = silu(conv(x) + bias), v = sigmoid(u + value_bias) * x, and the inputs that the next convolution needs.

    The convolution is causal, one filter a feature; no tap reaches beyond the start of a document, and padding is 0.

    Shapes: xz [B, T, 2D], of which x is the first half; u [B, T, D]; value_bias [D]; tail [B, K - 1, D], the inputs
    before x; weight [D, K], whose last tap meets the current token; bias [D]. x [B, T, D], just that half once more, to
    take gradients with respect to it; None: the result has none. expand [D, r]: u is given as [B, T, r], to be
    multiplied with it first.

    Returns: c [B, T, D] in the type of x; v [B, T, D] in float32, or where a kernel's gradient is wanted, for which
    it is kept, in the type of x; and the next tail [B, K - 1, D].
    """
    backend = _backend(tail)
    if expand is not None and (backend is None or x is not None or not _joins(u)):
        u, expand = u @ expand.T, None
    if backend is None:
        return _conv_gate(xz[..., : u.shape[-1]] if x is None else x, u, value_bias, tail, weight, bias, marks)
    if x is None:
        return launchers.conv_gate(xz, u, value_bias, tail, weight, bias, marks, backend, expand)

    @mx.custom_function
    def function(
        x: mx.array, u: mx.array, value_bias: mx.array, tail: mx.array, weight: mx.array, bias: mx.array
    ) -> tuple[mx.array, mx.array]:
        return launchers.conv_gate(xz, u, value_bias, tail, weight, bias, marks, backend, values=x.dtype)[:2]

    @function.vjp
    def gradient(primals: Any, cotangents: Any, _: Any) -> tuple[mx.array, ...]:
        return _conv_gate_gradient(*primals, *cotangents, marks=marks)

    run: Any = function
    return *run(x, u, value_bias, tail, weight, bias), _next_tail(x, tail, marks)


def gate_norm(
    o: mx.array,
    c: mx.array,
    xz: mx.array,
    residual_weight: mx.array,
    weight: mx.array,
    eps: float,
    z: mx.array | None = None,
) -> mx.array:
    """rmsnorm((o + residual_weight * c) * silu(z)) in the type of c: the gate first, then the norm.

    Shapes: o and c [B, T, D]; xz [B, T, 2D], of which z is the second half; residual_weight and weight [D].
    z [B, T, D], just that half once more, to take gradients with respect to it; None: the result has none.
    """
    backend = _backend(c)
    if backend is None:
        return _gate_norm(o, c, xz[..., c.shape[-1] :] if z is None else z, residual_weight, weight, eps)
    if z is None:
        return launchers.gate_norm(o, c, xz, residual_weight, weight, eps, backend)

    def kernel(o: mx.array, c: mx.array, z: mx.array, residual_weight: mx.array, weight: mx.array) -> mx.array:
        return launchers.gate_norm(o, c, xz, residual_weight, weight, eps, backend)

    return _with_gradient_of(partial(_gate_norm, eps=eps), kernel)(o, c, z, residual_weight, weight)


def swiglu(x: mx.array, differentiable: bool = True) -> mx.array:
    """silu(gate) * value of x = value | gate, [..., 2f] -> [..., f]."""
    backend = _backend(x)
    if backend is None:
        return _swiglu(x)
    if not differentiable:
        return launchers.swiglu(x, backend)
    return _with_gradient_of(_swiglu, partial(launchers.swiglu, backend=backend))(x)


def _backend(x: mx.array) -> Backend | None:
    """The kernels' backend, where they can take rows as wide as x's: they read four values at a time."""
    return active_backend() if x.shape[-1] % 8 == 0 else None


def _joins(low: mx.array) -> bool:
    """Whether a kernel makes u of low [B, T, r] itself: for some tokens, as in decoding, that saves a launch."""
    batch, length, rank = low.shape
    return batch * length <= FEW_ROWS and rank % 4 == 0


def _with_gradient_of(plain: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, differentiated as `plain`, the same function of the same arrays."""
    function = mx.custom_function(kernel)

    def vjp(primals: Any, cotangents: Any, _: Any) -> tuple[mx.array, ...]:
        primals = primals if isinstance(primals, (list, tuple)) else (primals,)
        cotangents = cotangents if isinstance(cotangents, (list, tuple)) else (cotangents,)
        return tuple(mx.vjp(plain, list(primals), list(cotangents))[1])

    function.vjp(vjp)
    return function


def _add_norm(h: mx.array, delta: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    total = h + delta
    return total, _norm(total, weight, eps=eps)


def _norm(h: mx.array, weight: mx.array, delta: mx.array | None = None, *, eps: float) -> mx.array:
    h = h if delta is None else h + delta
    return _rms_norm(h, weight, eps).astype(weight.dtype)


def _rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """The weight apart: MLX's gradient would make an array as large as x for the weight's, also where it is frozen."""
    return mx.fast.rms_norm(x, None, eps) * weight


def _conv_gate(
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
    return c, _gated(u, value_bias, x), _next_tail(x, tail, marks)


def _without_padding(x: mx.array, marks: mx.array | None) -> mx.array:
    return x if marks is None else mx.where((marks != PADDING)[..., None], x, 0)


def _next_tail(x: mx.array, tail: mx.array, marks: mx.array | None) -> mx.array:
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


def _conv_gate_gradient(
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
    """The gradients of `_conv_gate`'s c and v in its first six arguments.

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


def _gate_norm(
    o: mx.array, c: mx.array, z: mx.array, residual_weight: mx.array, weight: mx.array, eps: float
) -> mx.array:
    return _rms_norm(_gate_output(o, c, residual_weight, z), weight, eps).astype(c.dtype)


@partial(mx.compile, shapeless=True)
def _gate_output(o: mx.array, c: mx.array, weight: mx.array, z: mx.array) -> mx.array:
    out = o.astype(mx.float32) + weight.astype(mx.float32) * c.astype(mx.float32)
    return out * nn.silu(z.astype(mx.float32))


def _swiglu(x: mx.array) -> mx.array:
    value, gate = split(x, x.shape[-1] // 2)
    return _silu_times(gate, value)


@partial(mx.compile, shapeless=True)
def _silu_times(gate: mx.array, value: mx.array) -> mx.array:
    return (nn.silu(gate.astype(mx.float32)) * value.astype(mx.float32)).astype(value.dtype)
