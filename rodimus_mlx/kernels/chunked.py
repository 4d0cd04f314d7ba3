"""The recurrence in plain MLX: chunks of tokens, so that all work on the D-wide values is matrix products.

With a_t the log decay (<= 0) and b its running sum, unrolling the recurrence over a chunk that starts at state S gives

    o_t = sum_{s <= t} A[t, s] v_s + (q_t * exp(b_t)) @ S        A[t, s] = sum_n q_tn k_sn exp(b_tn - b_sn)

Safe at any decay: no exponent is ever positive, and each is a sum of the decays it spans, never a difference of two
longer sums (after a decay of -50 a step, such a difference has lost its digits). So A is built by doubling: a block
of 2s tokens is two blocks of s, and for the quadrant that joins them b_t - b_s = (b_t - b_m) + (b_m - b_s), split at
the middle m, where both parts are sums that start or end there.
"""

from __future__ import annotations

import mlx.core as mx

CHUNK = 64  # tokens in a chunk: a power of two


def chunked_recurrence(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decay: mx.array,
    state: mx.array,
) -> tuple[mx.array, mx.array]:
    """The function of `sequential_recurrence`, in chunks.

    Shapes:
        q, k, log_decay: [B, T, n] float32
        v: [B, T, D]
        state: [B, n, D] float32

    Returns:
        o [B, T, D] in float32 and the state after the last token [B, n, D] in float32.
    """
    length, n = q.shape[1:]
    chunk = min(CHUNK, 1 << (length - 1).bit_length())
    padding = -length % chunk
    if padding:  # k = 0 and decay 1 leave the state as it is
        q, k, v, log_decay = (mx.pad(x, [(0, 0), (0, padding), (0, 0)]) for x in (q, k, v, log_decay))
    q, k, v, log_decay = (blocks(x, chunk) for x in (q * n**-0.5, k, v.astype(mx.float32), log_decay))

    queries = q * from_start(log_decay)  # [B, N, C, n]
    keys = k * to_end(log_decay)
    total = mx.exp(log_decay.sum(axis=2))[..., None]  # [B, N, n, 1]: decay over a whole chunk
    written = keys.swapaxes(2, 3) @ v  # [B, N, n, D]: what each chunk adds to the state
    before = []
    for i in range(written.shape[1]):
        before.append(state)
        state = total[:, i] * state + written[:, i]
    o = mx.addmm(within_chunk(q, k, log_decay) @ v, queries, mx.stack(before, axis=1))  # [B, N, C, D]
    return o.reshape(o.shape[0], -1, o.shape[-1])[:, :length], state


def blocks(x: mx.array, size: int) -> mx.array:
    """[B, T, F] -> [B, T / size, size, F]."""
    return x.reshape(x.shape[0], -1, size, x.shape[-1])


def from_start(log_decay: mx.array) -> mx.array:
    """Decay from before each block's first token through each of its tokens, [B, N, C, n]."""
    return mx.exp(mx.cumsum(log_decay, axis=2))


def to_end(log_decay: mx.array) -> mx.array:
    """Decay from after each token through its block's last, [B, N, C, n]."""
    return mx.exp(mx.cumsum(log_decay, axis=2, reverse=True, inclusive=False))


def within_chunk(q: mx.array, k: mx.array, log_decay: mx.array) -> mx.array:
    """The lower triangular matrix A of each chunk, [B, N, C, n] -> [B, N, C, C], by doubling; C is a power of two."""
    batch, chunks, chunk, n = q.shape
    matrix = (q * k).sum(axis=-1).reshape(batch, -1, 1, 1)
    size = 1
    while size < chunk:
        qs, ks, decays = (x.reshape(batch, -1, size, n) for x in (q, k, log_decay))
        queries = qs[:, 1::2] * from_start(decays[:, 1::2])
        keys = ks[:, 0::2] * to_end(decays[:, 0::2])
        upper = mx.pad(matrix[:, 0::2], [(0, 0), (0, 0), (0, 0), (0, size)])
        lower = mx.concatenate([queries @ keys.swapaxes(-1, -2), matrix[:, 1::2]], axis=-1)
        matrix = mx.concatenate([upper, lower], axis=-2)
        size *= 2
    return matrix.reshape(batch, chunks, chunk, chunk)
