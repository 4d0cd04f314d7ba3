"""The kernels of the backward pass as functions of arrays, like those of launchers.py."""

from __future__ import annotations

import mlx.core as mx

from .launch import Backend, Kernel
from .launchers import CONV, SHARED, ceil, conv_block, given, row_threads, scalar, tile_size

_conv_gate_backward = Kernel(
    "rodimus_conv_gate_backward",
    inputs=["xz", "u", "value_bias", "tail", "weight", "bias", "marks", "d_c", "d_v"],
    outputs=["d_x", "d_u"],
    body="conv_gate_backward.metal",
    helpers=CONV,
)
_prepare_backward = Kernel(
    "rodimus_prepare_backward",
    inputs=["qkgt", "gate_bias", "norm_floor", "marks", "d_A", "d_q_decayed", "d_k_decayed", "d_total"],
    outputs=["d_qkgt"],
    body="prepare_backward.metal",
    helpers=SHARED,
)
_scan_backward = Kernel(
    "rodimus_scan_backward",
    inputs=["d_before", "before", "total", "d_after"],
    outputs=["d_written", "d_total", "d_state"],
    body="scan_backward.metal",
)
_add_norm_backward = Kernel(
    "rodimus_add_norm_backward",
    inputs=["h", "delta", "weight", "eps", "d_normed", "d_total"],
    outputs=["d_h", "d_delta"],
    body="add_norm_backward.metal",
)
_gate_norm_backward = Kernel(
    "rodimus_gate_norm_backward",
    inputs=["o", "c", "xz", "residual_weight", "weight", "eps", "d_out"],
    outputs=["d_o", "d_c", "d_z"],
    body="gate_norm_backward.metal",
    helpers=SHARED,
)
_swiglu_backward = Kernel(
    "rodimus_swiglu_backward", inputs=["x", "d_out"], outputs=["d_x"], body="swiglu_backward.metal", helpers=SHARED
)


def conv_gate_backward(
    xz: mx.array,
    u: mx.array,
    value_bias: mx.array,
    tail: mx.array,
    weight: mx.array,
    bias: mx.array,
    marks: mx.array | None,
    d_c: mx.array,
    d_v: mx.array,
    backend: Backend,
) -> tuple[mx.array, mx.array]:
    """Gradients of `conv_gate`'s c and v, [B, T, D] each -> those of x and u, [B, T, D], in their types."""
    batch, length, inner = u.shape
    block, threads = conv_block(length)
    d_x, d_u = _conv_gate_backward(
        [xz, u, value_bias, tail, weight, bias, given(marks), d_c, d_v],
        groups=(ceil(inner // 4, threads), ceil(length, block), batch),
        threads=threads,
        output_shapes=[u.shape, u.shape],
        output_dtypes=[xz.dtype, u.dtype],
        template={"D": inner, "K": weight.shape[1], "BLOCK": block, "MARKS": marks is not None},
        backend=backend,
    )
    return d_x, d_u


def prepare_backward(
    qkgt: mx.array,
    gate_bias: mx.array,
    norm_floor: float,
    marks: mx.array | None,
    d_a: mx.array,
    d_q: mx.array,
    d_k: mx.array,
    d_log_total: mx.array,
    backend: Backend,
) -> mx.array:
    """Gradients of `prepare`'s outputs, with chunks of one tile -> that of qkgt, [B, T, 4n] float32."""
    batch, length, width = qkgt.shape
    n = width // 4
    chunk, parts = tile_size(n), 8
    (d_qkgt,) = _prepare_backward(
        [
            qkgt,
            gate_bias,
            scalar(norm_floor),
            given(marks),
            d_a,
            d_q,
            d_k,
            d_log_total,
        ],
        groups=(ceil(length, chunk), batch, 1),
        threads=parts * chunk,
        output_shapes=[qkgt.shape],
        output_dtypes=[mx.float32],
        template={"C": chunk, "TILE": chunk, "PARTS": parts, "N": n, "MARKS": marks is not None},
        backend=backend,
    )
    return d_qkgt


def scan_backward(
    d_before: mx.array, before: mx.array, total: mx.array, d_after: mx.array, backend: Backend
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients of `scan`'s outputs -> those of written, total and state."""
    batch, chunks, n, inner = before.shape
    parts = ceil(inner, 32)
    d_written, d_total, d_state = _scan_backward(
        [d_before, before, total, d_after],
        groups=(ceil(inner, 128), n, batch),
        threads=128,
        output_shapes=[before.shape, (batch, chunks, n, parts), d_after.shape],
        output_dtypes=[mx.float32] * 3,
        template={"N": n, "D": inner, "PARTS": parts},
        backend=backend,
    )
    return d_written, d_total.sum(axis=-1), d_state


def add_norm_backward(
    h: mx.array,
    delta: mx.array | None,
    weight: mx.array,
    eps: float,
    d_normed: mx.array,
    d_total: mx.array | None,
    backend: Backend,
    delta_dtype: mx.Dtype | None = None,
) -> tuple[mx.array, mx.array]:
    """Gradients of `add_norm`'s outputs -> that of h [..., d], and the same in the type of delta.

    Where the sum was kept, it is given as h, without delta but with its `delta_dtype`, and d_total is its gradient.
    """
    width = h.shape[-1]
    threads = row_threads(width)
    delta_dtype = delta_dtype or (h if delta is None else delta).dtype
    both = delta_dtype != h.dtype
    d_h, d_delta = _add_norm_backward(
        [
            h,
            weight if delta is None else delta,
            weight,
            scalar(eps),
            d_normed,
            weight if d_total is None else d_total,
        ],
        groups=(h.size // width, 1, 1),
        threads=threads,
        output_shapes=[h.shape, h.shape if both else (1,)],
        output_dtypes=[h.dtype, delta_dtype],
        template={
            "DELTA": delta_dtype,
            "D": width,
            "WIDTH": threads,
            "ADD": delta is not None,
            "KEEP": d_total is not None,
            "BOTH": both,
        },
        backend=backend,
    )
    return d_h, d_delta if both else d_h


def gate_norm_backward(
    o: mx.array,
    c: mx.array,
    xz: mx.array,
    residual_weight: mx.array,
    weight: mx.array,
    eps: float,
    d_out: mx.array,
    backend: Backend,
) -> tuple[mx.array, mx.array, mx.array]:
    """The gradient of `gate_norm`'s output -> those of o, c and z, [B, T, D] each, in their types."""
    width = c.shape[-1]
    threads = row_threads(width)
    d_o, d_c, d_z = _gate_norm_backward(
        [o, c, xz, residual_weight, weight, scalar(eps), d_out],
        groups=(c.size // width, 1, 1),
        threads=threads,
        output_shapes=[c.shape] * 3,
        output_dtypes=[o.dtype, c.dtype, xz.dtype],
        template={"D": width, "WIDTH": threads},
        backend=backend,
    )
    return d_o, d_c, d_z


def swiglu_backward(x: mx.array, d_out: mx.array, backend: Backend) -> mx.array:
    """The gradient of `swiglu`'s output [..., f] -> that of x [..., 2f], in its type."""
    width = x.shape[-1] // 2
    rows = x.size // (2 * width)
    (d_x,) = _swiglu_backward(
        [x.reshape(rows, 2 * width), d_out],
        groups=(ceil(rows * width // 4, 128), 1, 1),
        threads=128,
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
        template={"F": width},
        backend=backend,
    )
    return d_x
