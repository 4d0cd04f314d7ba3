"""The layers' work between their matrix products: one launch each on a GPU, plain MLX elsewhere.

Each function computes in float32. Where a kernel ran forward, a kernel makes the gradients of all but the weights, from
arrays that the layers around it keep anyway; those of weights come from the plain form, and only if they are wanted.
`differentiable` False saves the host that arrangement, which decoding feels.

marks, where given, are [B, T] uint8, as in marks.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

from . import layer_plain as plain
from .kernels import launchers, launchers_backward
from .kernels.backend import active_backend
from .kernels.launch import Backend

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
        return plain.add_norm(h, delta, weight, eps)
    if not differentiable:
        return launchers.add_norm(h, delta, weight, eps, True, backend)

    @mx.custom_function
    def function(h: mx.array, delta: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
        return launchers.add_norm(h, delta, weight, eps, True, backend)

    @function.vjp
    def gradient(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        (_, delta, weight), (d_total, d_normed) = primals, cotangents
        total = outputs[0]  # kept for the layers above anyway, unlike delta
        big = launchers_backward.add_norm_backward(
            total, None, weight, eps, d_normed, d_total, backend, delta_dtype=delta.dtype
        )
        return *big, *_gradients(partial(plain.norm, total, eps=eps), d_normed, weight)

    run: Any = function
    return run(h, delta, weight)


def norm(
    h: mx.array, weight: mx.array, eps: float, delta: mx.array | None = None, differentiable: bool = True
) -> mx.array:
    """RMSNorm of h (+ delta, which is not kept) [..., d] in the type of the weight."""
    backend = _backend(h)
    if backend is None:
        return plain.norm(h, weight, eps, delta)
    if not differentiable:
        return launchers.add_norm(h, delta, weight, eps, False, backend)[1]

    @mx.custom_function
    def function(h: mx.array, weight: mx.array, delta: mx.array | None = None) -> mx.array:
        return launchers.add_norm(h, delta, weight, eps, False, backend)[1]

    @function.vjp
    def gradient(primals: Any, d_normed: mx.array, _: Any) -> tuple[mx.array, ...]:
        h, weight, *rest = primals
        delta = rest[0] if rest else None
        d_h, d_delta = launchers_backward.add_norm_backward(h, delta, weight, eps, d_normed, None, backend)
        (d_weight,) = _gradients(partial(plain.norm, h, eps=eps, delta=delta), d_normed, weight)
        return (d_h, d_weight, d_delta)[: len(primals)]

    run: Any = function
    return run(h, weight) if delta is None else run(h, weight, delta)


def low_rank(xz: mx.array, down: mx.array, up: mx.array) -> mx.array:
    """x @ down.T @ up.T for x, the first half of xz [B, T, 2D]; down [r, D], up [D, r]. Not for gradients.

    One kernel takes the half as it lies, where a product would copy it first.
    """
    backend = _backend(xz)
    if backend is None or not launchers.joins(xz, down):
        return xz[..., : down.shape[1]] @ down.T @ up.T
    return launchers.low_rank(xz, down, up, backend)


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
    values: mx.Dtype = mx.float32,
) -> tuple[mx.array, mx.array, mx.array]:
    """c = silu(conv(x) + bias), v = sigmoid(u + value_bias) * x, and the inputs that the next convolution needs.

    The convolution is causal, one filter a feature; no tap reaches beyond the start of a document, and padding is 0.

    Shapes: xz [B, T, 2D], of which x is the first half; u [B, T, D]; value_bias [D]; tail [B, K - 1, D], the inputs
    before x; weight [D, K], whose last tap meets the current token; bias [D]. x [B, T, D], just that half once more, to
    take gradients with respect to it; None: the result has none. expand [D, r]: u is given as [B, T, r], to be
    multiplied with it first.

    Returns: c [B, T, D] in the type of x; v [B, T, D], from a kernel in the type `values`, or where its gradient is
    wanted, for which it is kept, in the type of x; and the next tail [B, K - 1, D].
    """
    backend = _backend(tail) if tail.size else None  # Metal takes an array without elements for another kind of memory
    if expand is not None and (backend is None or x is not None or not _joins(u)):
        u, expand = u @ expand.T, None
    if backend is None:
        return plain.conv_gate(xz[..., : u.shape[-1]] if x is None else x, u, value_bias, tail, weight, bias, marks)
    if x is None:
        return launchers.conv_gate(xz, u, value_bias, tail, weight, bias, marks, backend, expand, values)

    @mx.custom_function
    def function(
        x: mx.array, u: mx.array, value_bias: mx.array, tail: mx.array, weight: mx.array, bias: mx.array
    ) -> tuple[mx.array, mx.array]:
        return launchers.conv_gate(xz, u, value_bias, tail, weight, bias, marks, backend, values=x.dtype)[:2]

    @function.vjp
    def gradient(primals: Any, cotangents: Any, _: Any) -> tuple[mx.array, ...]:
        backward: Any = launchers_backward.conv_gate_backward
        big = backward(xz, *primals[1:], marks, *cotangents, backend)
        return *big, *plain.conv_gate_gradient(*primals, *cotangents, marks=marks)[2:]

    run: Any = function
    return *run(x, u, value_bias, tail, weight, bias), plain.next_tail(x, tail, marks)


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
        return plain.gate_norm(o, c, xz[..., c.shape[-1] :] if z is None else z, residual_weight, weight, eps)
    if z is None:
        return launchers.gate_norm(o, c, xz, residual_weight, weight, eps, backend)

    @mx.custom_function
    def function(o: mx.array, c: mx.array, z: mx.array, residual_weight: mx.array, weight: mx.array) -> mx.array:
        return launchers.gate_norm(o, c, xz, residual_weight, weight, eps, backend)

    @function.vjp
    def gradient(primals: Any, d_out: mx.array, _: Any) -> tuple[mx.array, ...]:
        o, c, z, residual_weight, weight = primals
        big = launchers_backward.gate_norm_backward(o, c, xz, residual_weight, weight, eps, d_out, backend)
        return *big, *_gradients(partial(plain.gate_norm, o, c, z, eps=eps), d_out, residual_weight, weight)

    run: Any = function
    return run(o, c, z, residual_weight, weight)


def split_heads(
    qkv: mx.array,
    offset: mx.array,
    counts: tuple[int, int, int],
    rope_dims: int,
    base: float,
    differentiable: bool = True,
) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, keys and values of one projection, the former two with rotary positions.

    Shapes: qkv [B, T, (H + Hk + Hv) F], counts = H, Hk, Hv; offset: the place of the first token, one number or [B].

    Returns: q [B, H, T, F], k [B, 1, T, Hk F] and v [B, 1, T, Hv F].
    """
    backend = active_backend()
    head = qkv.shape[-1] // sum(counts)
    if differentiable or backend is None or not launchers.turns(head, rope_dims):
        return plain.split_heads(qkv, offset, counts, rope_dims, base, differentiable)
    q, k, v = launchers.heads(qkv, offset, counts, rope_dims, base, backend)
    return q.swapaxes(1, 2), k, v


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
    """`split_heads`, keys and values behind those of tokens before, and all padded with zeros. Not for gradients.

    Shapes: past: keys [B, 1, S, Hk F] and values [B, 1, S, Hv F], of which the last M, at most `window`, are taken; or
    nothing, so that M = 0. rows: P, at least T.

    Returns: q [B, H, P, F], k [B, 1, M + P, Hk F] and v [B, 1, M + P, Hv F].
    """
    backend = active_backend()
    head = qkv.shape[-1] // sum(counts)
    if backend is None or not launchers.turns(head, rope_dims):
        return plain.join_heads(qkv, offset, counts, rope_dims, base, past, window, rows)
    old = (past[0], past[1]) if past else None
    q, k, v = launchers.heads(qkv, offset, counts, rope_dims, base, backend, old, window, rows)
    return q.swapaxes(1, 2), k, v


def swiglu(x: mx.array, differentiable: bool = True) -> mx.array:
    """silu(gate) * value of x = value | gate, [..., 2f] -> [..., f]."""
    backend = _backend(x)
    if backend is None:
        return plain.swiglu(x)
    if not differentiable:
        return launchers.swiglu(x, backend)

    @mx.custom_function
    def function(x: mx.array) -> mx.array:
        return launchers.swiglu(x, backend)

    @function.vjp
    def gradient(x: mx.array, d_out: mx.array, _: Any) -> mx.array:
        return launchers_backward.swiglu_backward(x, d_out, backend)

    run: Any = function
    return run(x)


def _backend(x: mx.array) -> Backend | None:
    """The kernels' backend, where they can take rows as wide as x's: they read four values at a time."""
    return active_backend() if x.shape[-1] % 8 == 0 else None


def _joins(low: mx.array) -> bool:
    """Whether a kernel makes u of low [B, T, r] itself: for some tokens, as in decoding, that saves a launch."""
    batch, length, rank = low.shape
    return batch * length <= FEW_ROWS and rank % 4 == 0


def _gradients(form: Callable[..., mx.array], cotangent: mx.array, *weights: mx.array) -> list[mx.array]:
    """The gradients of form(*weights) in the weights."""
    return mx.vjp(form, list(weights), [cotangent])[1]
