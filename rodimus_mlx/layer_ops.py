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

PADDING, TOKEN, START = 0, 1, 2


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
    differentiable: bool = True,
) -> tuple[mx.array, mx.array, mx.array]:
    """c = silu(conv(x) + bias), v = sigmoid(u + value_bias) * x, and the inputs that the next convolution needs.

    The convolution is causal, one filter a feature; no tap reaches beyond the start of a document, and padding is 0.

    Shapes: xz [B, T, 2D], of which x is the first half; u [B, T, D]; value_bias [D]; tail [B, K - 1, D], the inputs
    before x; weight [D, K], whose last tap meets the current token; bias [D].

    Returns: c [B, T, D] in the type of x, v [B, T, D] in float32, and the next tail [B, K - 1, D].
    """
    backend = _backend(u)
    if backend is None:
        return _conv_gate(xz, u, value_bias, tail, weight, bias, marks)
    if not differentiable:
        return launchers.conv_gate(xz, u, value_bias, tail, weight, bias, marks, backend)
    kernel = partial(launchers.conv_gate, marks=marks, backend=backend)
    return _with_gradient_of(partial(_conv_gate, marks=marks), kernel)(xz, u, value_bias, tail, weight, bias)


def gate_norm(
    o: mx.array,
    c: mx.array,
    xz: mx.array,
    residual_weight: mx.array,
    weight: mx.array,
    eps: float,
    differentiable: bool = True,
) -> mx.array:
    """rmsnorm((o + residual_weight * c) * silu(z)) in the type of c: the gate first, then the norm.

    Shapes: o and c [B, T, D]; xz [B, T, 2D], of which z is the second half; residual_weight and weight [D].
    """
    backend = _backend(c)
    if backend is None:
        return _gate_norm(o, c, xz, residual_weight, weight, eps)
    if not differentiable:
        return launchers.gate_norm(o, c, xz, residual_weight, weight, eps, backend)
    kernel = partial(launchers.gate_norm, eps=eps, backend=backend)
    return _with_gradient_of(partial(_gate_norm, eps=eps), kernel)(o, c, xz, residual_weight, weight)


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
    return mx.fast.rms_norm(h, weight, eps).astype(weight.dtype)


def _conv_gate(
    xz: mx.array,
    u: mx.array,
    value_bias: mx.array,
    tail: mx.array,
    weight: mx.array,
    bias: mx.array,
    marks: mx.array | None,
) -> tuple[mx.array, mx.array, mx.array]:
    x = xz[..., : u.shape[-1]]  # slices: mx.split under mx.compile breaks LoRA's gradient
    if marks is not None:
        x = mx.where((marks != PADDING)[..., None], x, 0)
    length, taps = x.shape[1], weight.shape[1]
    inputs = mx.concatenate([tail, x], axis=1)
    shifted = [inputs[:, i : i + length] for i in range(taps)]
    if marks is not None:
        reach = mx.ones(marks.shape, dtype=mx.bool_)  # may a tap that is `back` tokens away still be used
        starts = mx.pad(marks == START, [(0, 0), (taps - 1, 0)])
        for back in range(1, taps):
            reach = reach & ~starts[:, taps - back : taps - back + length]
            shifted[taps - 1 - back] = mx.where(reach[..., None], shifted[taps - 1 - back], 0)
    c = _weighted_sum(shifted, [weight[:, i] for i in range(taps)], bias)
    return c, _gated(u, value_bias, x), mx.contiguous(inputs[:, length:])  # a view would keep all inputs alive


@partial(mx.compile, shapeless=True)
def _weighted_sum(shifted: list[mx.array], weights: list[mx.array], bias: mx.array) -> mx.array:
    total = bias.astype(mx.float32)
    for x, weight in zip(shifted, weights):
        total = total + weight.astype(mx.float32) * x.astype(mx.float32)
    return nn.silu(total).astype(shifted[0].dtype)


@partial(mx.compile, shapeless=True)
def _gated(u: mx.array, bias: mx.array, x: mx.array) -> mx.array:
    return mx.sigmoid(u.astype(mx.float32) + bias.astype(mx.float32)) * x.astype(mx.float32)


def _gate_norm(
    o: mx.array, c: mx.array, xz: mx.array, residual_weight: mx.array, weight: mx.array, eps: float
) -> mx.array:
    y = _gate_output(o, c, residual_weight, xz[..., c.shape[-1] :])
    return mx.fast.rms_norm(y, weight, eps).astype(c.dtype)


@partial(mx.compile, shapeless=True)
def _gate_output(o: mx.array, c: mx.array, weight: mx.array, z: mx.array) -> mx.array:
    out = o.astype(mx.float32) + weight.astype(mx.float32) * c.astype(mx.float32)
    return out * nn.silu(z.astype(mx.float32))


def _swiglu(x: mx.array) -> mx.array:
    width = x.shape[-1] // 2
    return _silu_times(x[..., width:], x[..., :width])


@partial(mx.compile, shapeless=True)
def _silu_times(gate: mx.array, value: mx.array) -> mx.array:
    return (nn.silu(gate.astype(mx.float32)) * value.astype(mx.float32)).astype(value.dtype)
