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

import math

import mlx.core as mx

CHUNK = 64  # tokens in a chunk: a power of two
PRODUCTS = 4  # decays over blocks of up to so many tokens are products, which cost less than powers


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
    _, length, n = q.shape
    chunk = min(CHUNK, 1 << (length - 1).bit_length())
    padding = -length % chunk
    if padding:  # k = 0 and decay 1 leave the state as it is
        q, k, v, log_decay = (mx.pad(x, [(0, 0), (0, padding), (0, 0)]) for x in (q, k, v, log_decay))
    chunks = q.shape[1] // chunk

    # Chunk by chunk: its values and temporaries stay in the cache. Each term that needs the state comes first and the
    # others are added to it: MLX would compute those of all chunks ahead, and hold them. So it would the states, were
    # they not made to wait for the outputs of the chunk before.
    per_chunk = (in_order(x, chunks) for x in (*within_chunks(q * n**-0.5, k, log_decay, chunk), v.astype(mx.float32)))
    outputs = []
    for matrix, queries, keys, total, values in zip(*per_chunk):
        outputs.append(mx.addmm(queries @ state, matrix, values))  # [B, C, D]
        (state,) = mx.depends([state], [outputs[-1]])
        state = mx.addmm(total * state, keys.swapaxes(1, 2), values)  # [B, n, D]
    return mx.concatenate(outputs, axis=1)[:, :length], state


def in_order(x: mx.array, count: int) -> list[mx.array]:
    """[B, count * S, F] -> count views [B, S, F].

    By steps of at most 8: the gradient of a slice is an array of the size of x, and mx.split makes slices where there
    are more than 10 pieces, else has one concatenation as its gradient.
    """
    if count == 1:
        return [x]
    size, step = x.shape[1] // count, -(-count // 8)
    parts = mx.split(x, [size * i for i in range(step, count, step)], axis=1)
    return [one for part in parts for one in in_order(part, part.shape[1] // size)]


def exp(x: mx.array) -> mx.array:
    """e to the power of x, float32. On a Linux CPU mx.exp takes 2.6 times as long and is no more exact."""
    return mx.power(math.e, x)


def within_chunks(
    q: mx.array, k: mx.array, log_decay: mx.array, chunk: int
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """What the tokens of each chunk are to each other, and to what is before and after it.

    Shapes: q, k, log_decay: [B, T, n], T = N * chunk, chunk a power of two

    Returns:
        the rows of each chunk's lower triangular matrix A [B, T, chunk]; q decayed from before the chunk [B, T, n];
        k decayed to the chunk's end [B, T, n]; the decay over each whole chunk [B, N * n, 1]
    """
    batch, length, n = q.shape
    log_total = log_decay  # over each block; blocks of one token to begin with
    total = exp(log_total)
    queries, keys = q * total, k
    matrix = (q * k).sum(axis=-1)
    size = 1
    while size < chunk:
        pair = (batch, -1, 2, size)  # pairs of blocks; a decay over a whole block is like one token's
        queries, keys, matrix = queries.reshape(*pair, n), keys.reshape(*pair, n), matrix.reshape(*pair, size)
        total, log_total = total.reshape(batch, -1, 2, 1, n), log_total.reshape(batch, -1, 2, 1, n)
        (_, q1), (k0, _), (a0, a1), (first, second) = (mx.split(x, 2, axis=2) for x in (queries, keys, matrix, total))
        upper = mx.pad(a0, [(0, 0), (0, 0), (0, 0), (0, 0), (0, size)])
        lower = mx.concatenate([q1 @ k0.swapaxes(-1, -2), a1], axis=-1)
        matrix = mx.concatenate([upper, lower], axis=2)
        one = mx.ones_like(first)
        queries = queries * mx.concatenate([one, first], axis=2)
        keys = keys * mx.concatenate([second, one], axis=2)
        log_total = log_total.sum(axis=2)
        size *= 2
        # Equal decays near 1 all round the same way: in a product of many of them the errors would add up.
        total = first * second if size <= PRODUCTS else exp(log_total)
    queries, keys = queries.reshape(batch, length, n), keys.reshape(batch, length, n)
    return matrix.reshape(batch, length, chunk), queries, keys, total.reshape(batch, -1, 1)
