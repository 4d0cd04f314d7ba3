"""The public recurrence: one function whatever computes it.

The state is [B, n, D] float32, one head: n key features by D value features. q is scaled by 1/sqrt(n) here, so callers
pass it unscaled; k comes with its input gate applied; log_decay is the log of the forget gate, <= 0.
"""

from __future__ import annotations

import mlx.core as mx

from .kernels.chunked import chunked_recurrence


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
