"""The recurrence as the paper writes it, token by token. Every other implementation is tested against this one."""

from __future__ import annotations

import mlx.core as mx


def sequential_recurrence(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decay: mx.array,
    state: mx.array,
) -> tuple[mx.array, mx.array]:
    """S_t = exp(log_decay_t)[:, None] * S_{t-1} + k_t[:, None] * v_t[None, :];  o_t = (q_t / sqrt(n)) @ S_t.

    Computed in the type of the inputs, float64 included (on the CPU). Paper: equation of the DDTS recurrence.

    Shapes:
        q, k, log_decay: [B, T, n]
        v: [B, T, D]
        state: [B, n, D]

    Returns:
        o [B, T, D] and the state after the last token [B, n, D].
    """
    scale = q.shape[-1] ** -0.5
    outputs = []
    for t in range(q.shape[1]):
        decay = mx.exp(log_decay[:, t, :, None])
        state = decay * state + k[:, t, :, None] * v[:, t, None, :]
        outputs.append((q[:, t, None, :] * scale) @ state)  # [B, 1, D]
    return mx.concatenate(outputs, axis=1), state
