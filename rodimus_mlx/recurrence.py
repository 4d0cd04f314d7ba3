"""The recurrence: one function whatever computes it, and the DDTS selection around it.

The state is [B, n, D] float32, one head: n key features by D value features. q is scaled by 1/sqrt(n) inside, so
callers pass it unscaled; log_decay is the log of the forget gate, <= 0. marks are those of marks.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

from .kernels import launchers, launchers_backward
from .kernels.backend import active_backend
from .kernels.chunked import chunked_recurrence
from .kernels.launch import Backend
from .layer_ops import gate_norm, norm
from .marks import PADDING, START

FEW_TOKENS = 8  # up to here the state stays in one kernel's registers, token by token
SMALLEST = 1e-37  # a selection gate that underflows: its logarithm, and the gradient of that, must stay finite
FORGET = -1e4  # a log decay after which nothing is left: exp of it is 0 in float32


def recurrence(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decay: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """S_t = exp(log_decay_t)[:, None] * S_{t-1} + k_t[:, None] * v_t[None, :];  o_t = (q_t / sqrt(n)) @ S_t.

    Differentiable in every floating input. Any cut of the tokens into calls that pass the state on gives the same
    result as one call. Source: the DDTS recurrence of the Rodimus paper (arXiv 2410.06577, section 3).

    Shapes:
        q, k, log_decay: [B, T, n], computed in float32; log_decay <= 0
        v: [B, T, D], float32, float16 or bfloat16
        state: [B, n, D] float32, the state before the first token; None: zeros
        mask: [B, T] bool, False for padding, which leaves the state as it is (what o holds there means nothing);
            None: every token is real

    Returns:
        o [B, T, D] in the type of v, and the state after the last token [B, n, D] in float32.

    Raises:
        ValueError: on shapes that do not fit together, naming them.
    """
    _check_shapes(q, k, v, log_decay, state, mask)
    q, k, log_decay = (x.astype(mx.float32) for x in (q, k, log_decay))
    if state is None:
        state = mx.zeros((q.shape[0], q.shape[2], v.shape[2]), mx.float32)
    if mask is not None:
        k, log_decay = (mx.where(mask[..., None], x, 0.0) for x in (k, log_decay))
    o, state = chunked_recurrence(q, k, v, log_decay, state)
    return o.astype(v.dtype), state


def selective_recurrence(
    qkgt: mx.array,
    gate_bias: mx.array,
    v: mx.array,
    norm_floor: float,
    state: mx.array | None = None,
    marks: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """`recurrence` from the projections before their gates (paper, section 3.2): the function that has kernels.

    g = softplus(.), t = sigmoid(.);  log_decay = -g t;  k <- k / max(|k|, norm_floor) * g**t

    Shapes:
        qkgt: [B, T, 4n], the projections q | k | g | t of the convolved input
        gate_bias: [2n], of g | t, added in float32
        v: [B, T, D], computed in float32
        state: [B, n, D] float32; None: zeros
        marks: [B, T] uint8; padding leaves the state, a document's start forgets it

    Returns:
        o [B, T, D] in the type of v, and the state after the last token [B, n, D] in float32.
    """
    if state is None:
        state = mx.zeros((v.shape[0], gate_bias.shape[0] // 2, v.shape[2]), mx.float32)
    backend = active_backend()
    if backend is None or not launchers.tile_size(state.shape[1]):
        return _plain(qkgt, gate_bias, v, state, norm_floor=norm_floor, marks=marks)
    return _with_kernels(norm_floor, marks, backend)(qkgt, gate_bias, v, state)


def type_of_values(x: mx.array, n: int) -> mx.Dtype:
    """The type in which a kernel best makes the values of x [B, T, D] for `mix`, beside n key features."""
    fused = x.shape[1] > FEW_TOKENS and launchers.recurs(x.dtype, n, x.shape[2])
    return x.dtype if fused else mx.float32


def mix(
    qkgt: mx.array,
    gate_bias: mx.array,
    v: mx.array,
    c: mx.array,
    xz: mx.array,
    residual_weight: mx.array,
    norm_weight: mx.array,
    *,
    norm_floor: float,
    norm_epsilon: float,
    state: mx.array | None,
    marks: mx.array | None,
    z: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """The mixer from its projections to the input of out_proj: selection, recurrence, residual, output gate, norm.

    A few tokens, as in decoding, stay in one kernel with their state; that kernel has no gradient, so it is not taken
    where z, the second half of xz, is given to differentiate with respect to it.

    Shapes: qkgt, gate_bias, v, state and marks as in `selective_recurrence`; the others as in `gate_norm`.

    Returns: [B, T, D] in the type of c, and the state after the last token [B, n, D] in float32.
    """
    backend = active_backend()
    few = qkgt.shape[1] <= FEW_TOKENS and gate_bias.shape[0] <= 2 * launchers.STEP_KEYS
    if backend is not None and z is None and few:
        if state is None:
            state = mx.zeros((v.shape[0], gate_bias.shape[0] // 2, v.shape[2]), mx.float32)
        y, state = launchers.step(qkgt, gate_bias, norm_floor, v, c, xz, residual_weight, state, marks, backend)
        return norm(y, norm_weight, norm_epsilon, differentiable=False), state
    if backend is not None and z is None and launchers.recurs(v.dtype, gate_bias.shape[0] // 2, v.shape[2]):
        o, state = _in_one_kernel(qkgt, gate_bias, v, norm_floor, state, marks, backend)
    else:
        o, state = selective_recurrence(qkgt, gate_bias, v, norm_floor, state, marks)
    return gate_norm(o, c, xz, residual_weight, norm_weight, norm_epsilon, z), state


def gates(qkgt: mx.array, bias: mx.array, norm_floor: float) -> tuple[mx.array, mx.array, mx.array]:
    """The gates of `selective_recurrence` in plain MLX: qkgt [B, T, 4n] -> q, k and log_decay, [B, T, n] float32."""
    n = bias.shape[0] // 2
    qkgt, bias = qkgt.astype(mx.float32), bias.astype(mx.float32)
    gate = qkgt[..., 2 * n : 3 * n] + bias[:n]
    temperature = qkgt[..., 3 * n :] + bias[n:]
    key, log_decay = _select(qkgt[..., n : 2 * n], gate, temperature, mx.array(norm_floor))
    return qkgt[..., :n], key, log_decay


@partial(mx.compile, shapeless=True)
def _select(k: mx.array, gate: mx.array, temperature: mx.array, floor: mx.array) -> tuple[mx.array, mx.array]:
    gate = mx.maximum(mx.logaddexp(gate, 0.0), SMALLEST)
    temperature = mx.sigmoid(temperature)
    k = k * mx.rsqrt(mx.maximum((k * k).sum(axis=-1, keepdims=True), floor * floor))
    return k * mx.exp(temperature * mx.log(gate)), -gate * temperature


def _plain(
    qkgt: mx.array,
    gate_bias: mx.array,
    v: mx.array,
    state: mx.array,
    *,
    norm_floor: float,
    marks: mx.array | None,
) -> tuple[mx.array, mx.array]:
    q, k, log_decay = gates(qkgt, gate_bias, norm_floor)
    if marks is None:
        return recurrence(q, k, v, log_decay, state)
    log_decay = mx.where((marks == START)[..., None], FORGET, log_decay)
    return recurrence(q, k, v, log_decay, state, marks != PADDING)


def _in_one_kernel(
    qkgt: mx.array,
    gate_bias: mx.array,
    v: mx.array,
    norm_floor: float,
    state: mx.array | None,
    marks: mx.array | None,
    backend: Backend,
) -> tuple[mx.array, mx.array]:
    chunk = launchers.tile_size(gate_bias.shape[0] // 2)
    prepared = launchers.prepare(qkgt, gate_bias, norm_floor, marks, chunk, backend, tiled=True)
    return launchers.recur(*prepared, v, state, backend)


def _with_kernels(norm_floor: float, marks: mx.array | None, backend: Backend) -> Callable[..., Any]:
    """(qkgt, gate_bias, v, state) -> (o, next state) by kernels and matrix products, with their gradient.

    Where one kernel can, it goes through all chunks; else, and for gradients, the same is matrix products of all chunks
    and a scan between. All in float32: rounding A, the decayed q and k, and the states between chunks to bfloat16 would
    each cost as much accuracy as rounding o does.
    """

    def chunks(qkgt: mx.array, gate_bias: mx.array, v: mx.array, state: mx.array, chunk: int) -> tuple[mx.array, ...]:
        a, q, k, total = launchers.prepare(qkgt, gate_bias, norm_floor, marks, chunk, backend)
        values = _in_chunks(v.astype(mx.float32), chunk)  # [B, N, C, D]
        before, after = launchers.scan(k @ values, total, state, backend)
        return a, q, k, total, values, before, after

    @mx.custom_function
    def function(qkgt: mx.array, gate_bias: mx.array, v: mx.array, state: mx.array) -> tuple[mx.array, mx.array]:
        n = state.shape[1]
        if launchers.recurs(v.dtype, n, v.shape[2]):
            return _in_one_kernel(qkgt, gate_bias, v, norm_floor, state, marks, backend)
        chunk = launchers.chunk_size(qkgt.shape[1], n)
        a, q, _, _, values, before, after = chunks(qkgt, gate_bias, v, state, chunk)
        o = mx.addmm(a @ values, q, before)
        return _out_of_chunks(o, qkgt.shape[1]).astype(v.dtype), after

    @function.vjp
    def gradient(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple[mx.array, ...]:
        qkgt, gate_bias, v, state = primals
        # not before the backward pass: mx.compile would share the float32 copy with the forward pass and keep it
        (v,) = mx.depends([v], [cotangents[0]])
        chunk = launchers.tile_size(state.shape[1])
        a, q, k, total, values, before, *_ = chunks(qkgt, gate_bias, v, state, chunk)
        d_o, d_after = _in_chunks(cotangents[0].astype(mx.float32), chunk), cotangents[1]
        d_written, d_total, d_state = launchers_backward.scan_backward(
            q.swapaxes(2, 3) @ d_o, before, total, d_after, backend
        )
        d_qkgt = launchers_backward.prepare_backward(
            qkgt,
            gate_bias,
            norm_floor,
            marks,
            d_o @ values.swapaxes(2, 3),  # of A; what lies above its diagonal is not read
            d_o @ before.swapaxes(2, 3),  # of the decayed q
            values @ d_written.swapaxes(2, 3),  # of the decayed k
            d_total * total,  # of the log of total
            backend,
        )
        d_v = mx.addmm(a.swapaxes(2, 3) @ d_o, k.swapaxes(2, 3), d_written)
        d_bias = d_qkgt[..., gate_bias.shape[0] :].sum(axis=(0, 1))
        return (
            d_qkgt.astype(qkgt.dtype),
            d_bias.astype(gate_bias.dtype),
            _out_of_chunks(d_v, v.shape[1]).astype(v.dtype),
            d_state,
        )

    run: Callable[..., Any] = function
    return run


def _in_chunks(x: mx.array, chunk: int) -> mx.array:
    """[B, T, F] -> [B, N, chunk, F], zeros behind."""
    padding = -x.shape[1] % chunk
    if padding:
        x = mx.pad(x, [(0, 0), (0, padding), (0, 0)])
    return x.reshape(x.shape[0], -1, chunk, x.shape[2])


def _out_of_chunks(x: mx.array, length: int) -> mx.array:
    """[B, N, chunk, F] -> [B, T, F]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])[:, :length]


def _check_shapes(
    q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array, state: mx.array | None, mask: mx.array | None
) -> None:
    if q.ndim != 3 or v.ndim != 3 or q.shape[1] == 0:
        raise ValueError(f"q and v must be [B, T, n] and [B, T, D] with T >= 1, not {q.shape} and {v.shape}")
    batch, length, n = q.shape
    for name, x, shape in (
        ("k", k, (batch, length, n)),
        ("log_decay", log_decay, (batch, length, n)),
        ("v", v, (batch, length, v.shape[2])),
        ("state", state, (batch, n, v.shape[2])),
        ("mask", mask, (batch, length)),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must have shape {shape} beside q of {q.shape}, not {x.shape}")
