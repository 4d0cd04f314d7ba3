"""The recurrence in plain MLX: chunks of tokens, so that nearly all work on the D-wide values is matrix products.

With a_t the log decay (<= 0) and b its running sum, unrolling the recurrence over a chunk that starts at state S gives

    o_t = sum_{s <= t} A[t, s] v_s + (q_t * exp(b_t)) @ S        A[t, s] = sum_n q_tn k_sn exp(b_tn - b_sn)

Safe at any decay: exp(b_t - b_s) is never the exp of a difference of two longer sums (after a decay of -50 a step, such
a difference has lost its digits) but a product of decays over pieces of what it spans, each at most 1. So A is built by
doubling: a block of 2s tokens is two blocks of s, and in the quadrant that joins them b_t - b_s = (b_t - b_m) +
(b_m - b_s), split at the middle m. The queries carry exp(b_t - b_m), from their block's start, the keys exp(b_m - b_s),
to their block's end; both grow with their block by the decay over the other half. One block is a chunk in the end.
"""

from __future__ import annotations

import mlx.core as mx

CHUNK = 64  # tokens in a chunk: a power of two
PRODUCTS = 4  # decays over blocks of up to so many tokens are products: MLX's exp is slow on the CPU


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
    batch, length, n = q.shape
    chunk = min(CHUNK, 1 << (length - 1).bit_length())
    padding = -length % chunk
    if padding:  # k = 0 and decay 1 leave the state as it is
        q, k, v, log_decay = (mx.pad(x, [(0, 0), (0, padding), (0, 0)]) for x in (q, k, v, log_decay))
    q, k, v, log_decay = (
        x.reshape(batch, -1, chunk, x.shape[-1]) for x in (q * n**-0.5, k, v.astype(mx.float32), log_decay)
    )

    # Chunk by chunk, as temporaries of one chunk stay in the cache. Each term that needs the state comes first and the
    # others are added to it: MLX would compute those of all chunks ahead, and hold them.
    per_chunk = (one_by_one(x) for x in (*within_chunks(q, k, log_decay), v))
    state, outputs = state[:, None], []
    for matrix, queries, keys, total, values in zip(*per_chunk):
        outputs.append(mx.addmm(queries @ state, matrix, values))  # [B, 1, C, D]
        state = mx.addmm(total * state, keys.swapaxes(2, 3), values)  # [B, 1, n, D]
    o = mx.concatenate(outputs, axis=1)
    return o.reshape(batch, -1, o.shape[-1])[:, :length], state[:, 0]


def one_by_one(x: mx.array) -> list[mx.array]:
    """[B, N, ...] -> N views [B, 1, ...], by steps of at most 8: the gradient of a slice is an array of the size of x,
    and mx.split makes slices where there are more than 10 pieces, else has one concatenation as its gradient."""
    count = x.shape[1]
    if count == 1:
        return [x]
    step = -(-count // 8)
    return [one for part in mx.split(x, list(range(step, count, step)), axis=1) for one in one_by_one(part)]


def within_chunks(q: mx.array, k: mx.array, log_decay: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """What the tokens of each chunk are to each other, and to what is before and after it.

    Shapes: q, k, log_decay: [B, N, C, n], C a power of two

    Returns:
        the lower triangular matrix A [B, N, C, C]; q decayed from before the chunk [B, N, C, n]; k decayed to the
        chunk's end [B, N, C, n]; the decay over the whole chunk [B, N, n, 1]
    """
    batch, chunks, chunk, n = q.shape
    log_total = log_decay.reshape(batch, -1, 1, n)  # over each block; blocks of one token to begin with
    total = mx.exp(log_total)
    queries, keys = q.reshape(batch, -1, 1, n) * total, k.reshape(batch, -1, 1, n)
    matrix = (q * k).sum(axis=-1).reshape(batch, -1, 1, 1)
    size = 1
    while size < chunk:
        matrix, queries, keys, total, log_total = (
            x.reshape(batch, -1, 2, *x.shape[2:]) for x in (matrix, queries, keys, total, log_total)
        )
        corner = queries[:, :, 1] @ keys[:, :, 0].swapaxes(-1, -2)
        upper = mx.pad(matrix[:, :, 0], [(0, 0), (0, 0), (0, 0), (0, size)])
        lower = mx.concatenate([corner, matrix[:, :, 1]], axis=-1)
        matrix = mx.concatenate([upper, lower], axis=-2)
        size *= 2
        first, second = total[:, :, 0], total[:, :, 1]
        one = mx.ones_like(first)
        queries = (queries * mx.stack([one, first], axis=2)).reshape(batch, -1, size, n)
        keys = (keys * mx.stack([second, one], axis=2)).reshape(batch, -1, size, n)
        log_total = log_total.sum(axis=2)
        # Equal decays near 1 all round the same way: in a product of many of them the errors would add up.
        total = first * second if size <= PRODUCTS else mx.exp(log_total)
    shape = (batch, chunks, chunk, -1)
    return matrix.reshape(shape), queries.reshape(shape), keys.reshape(shape), total.reshape(batch, chunks, n, 1)
