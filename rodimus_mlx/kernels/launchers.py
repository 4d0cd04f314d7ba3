"""Our kernels as functions of arrays: shapes, templates and grids of each. The texts say what each computes.

All arrays are row contiguous or copied first; T, D, n as in the model; the values' type is that of the last input
named in each docstring. None of these has a gradient of its own: launchers_backward.py has what gradients are made of.
"""

from __future__ import annotations

import math
from functools import lru_cache

import mlx.core as mx

from .launch import Backend, Kernel

HALVES = (mx.float16, mx.bfloat16)
STEP_KEYS = 256  # key features that the step kernel can take
CONV_BLOCK = 4  # tokens a thread convolves, where there are that many
PREPARE_STRIP = 32  # tokens of a threadgroup of prepare, at most
HEADS_THREADS = 128  # for a token's queries, keys and values
RECUR_COLUMNS = 16  # of v, in a threadgroup of recur
RECUR_KEYS = (16, 32, 48, 64)  # key features whose states fit in its threadgroup memory, beside v

SHARED = ["gates.metal"]
CONV = [*SHARED, "conv.metal"]
MATRIX = ["matrix.h", "matrix_{backend}.h"]
_conv_gate = Kernel(
    "rodimus_conv_gate",
    inputs=["xz", "u", "value_bias", "tail", "expand", "weight", "bias", "marks"],
    outputs=["c", "v", "next_tail"],
    body="conv_gate.metal",
    helpers=CONV,
)
_step = Kernel(
    "rodimus_step",
    inputs=["qkgt", "gate_bias", "norm_floor", "v", "c", "xz", "residual_weight", "state", "marks"],
    outputs=["y", "next_state"],
    body="step.metal",
    helpers=SHARED,
)
_prepare = Kernel(
    "rodimus_prepare",
    inputs=["qkgt", "gate_bias", "norm_floor", "marks"],
    outputs=["A", "q_decayed", "k_decayed", "total"],
    body="prepare.metal",
    helpers=SHARED,
)
_scan = Kernel("rodimus_scan", inputs=["written", "total", "state"], outputs=["before", "after"], body="scan.metal")
_recur = Kernel(
    "rodimus_recur",
    inputs=["A", "q_decayed", "k_decayed", "total", "v", "state"],
    outputs=["o", "after"],
    body="recur.metal",
    helpers=MATRIX,
    residents=(256, 2),
)
_add_norm = Kernel(
    "rodimus_add_norm", inputs=["h", "delta", "weight", "eps"], outputs=["total", "normed"], body="add_norm.metal"
)
_gate_norm = Kernel(
    "rodimus_gate_norm",
    inputs=["o", "c", "xz", "residual_weight", "weight", "eps"],
    outputs=["out"],
    body="gate_norm.metal",
    helpers=SHARED,
)
_low_rank = Kernel(
    "rodimus_low_rank",
    inputs=["xz", "down", "up"],
    outputs=["u"],
    body="low_rank.metal",
    helpers=MATRIX,
)
_heads = Kernel(
    "rodimus_heads",
    inputs=["qkv", "offset", "base", "old_k", "old_v"],
    outputs=["q", "k", "v"],
    body="heads.metal",
)
_swiglu = Kernel("rodimus_swiglu", inputs=["x"], outputs=["out"], body="swiglu.metal", helpers=SHARED)


@lru_cache(maxsize=32)
def scalar(value: float) -> mx.array:
    """A constant as an array of shape (1,), made once."""
    return mx.array([value], dtype=mx.float32)


def given(marks: mx.array | None) -> mx.array:
    """The marks, or what stands in for them where every token is real."""
    return _no_marks() if marks is None else marks


@lru_cache(maxsize=1)
def _no_marks() -> mx.array:
    return mx.array([1], dtype=mx.uint8)  # made of a constant: an operation here would join the graph at hand


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def row_threads(width: int) -> int:
    """Threads for a row: eight values each, whole simdgroups."""
    return min(1024, ceil(width, 256) * 32)


def conv_block(length: int) -> tuple[int, int]:
    """Tokens a thread of the convolution's kernels takes, and threads of a threadgroup."""
    return (1, 32) if length < CONV_BLOCK else (CONV_BLOCK, 128)


def conv_gate(
    xz: mx.array,
    u: mx.array,
    value_bias: mx.array,
    tail: mx.array,
    weight: mx.array,
    bias: mx.array,
    marks: mx.array | None,
    backend: Backend,
    expand: mx.array | None = None,
    values: mx.Dtype = mx.float32,
) -> tuple[mx.array, mx.array, mx.array]:
    """xz [B, T, 2D], u [B, T, D], tail [B, K-1, D], weight [D, K], biases [D] -> c, v of type `values`, next tail.

    expand [D, R]: u is given as [B, T, R], and u @ expand.T is what it stands for; R is a multiple of 4.
    """
    batch, length = u.shape[:2]
    inner, taps = weight.shape
    block, threads = conv_block(length)
    c, v, next_tail = _conv_gate(
        [
            xz,
            u,
            value_bias,
            tail,
            value_bias if expand is None else expand,
            weight,
            bias,
            given(marks),
        ],
        groups=(ceil(inner // 4, threads), ceil(length, block), batch),
        threads=threads,
        output_shapes=[(batch, length, inner), (batch, length, inner), tail.shape],
        output_dtypes=[xz.dtype, values, xz.dtype],
        template={
            "D": inner,
            "K": taps,
            "BLOCK": block,
            "R": 0 if expand is None else expand.shape[1],
            "MARKS": marks is not None,
        },
        backend=backend,
    )
    return c, v, next_tail


def step(
    qkgt: mx.array,
    gate_bias: mx.array,
    norm_floor: float,
    v: mx.array,
    c: mx.array,
    xz: mx.array,
    residual_weight: mx.array,
    state: mx.array,
    marks: mx.array | None,
    backend: Backend,
) -> tuple[mx.array, mx.array]:
    """Few tokens from projections to the gated output: y [B, T, D] float32 and the next state [B, n, D]."""
    batch, _, inner = v.shape
    n = state.shape[1]
    y, next_state = _step(
        [
            qkgt,
            gate_bias,
            scalar(norm_floor),
            v,
            c,
            xz,
            residual_weight,
            state,
            given(marks),
        ],
        groups=(ceil(inner, 32), 1, batch),
        threads=256,
        output_shapes=[v.shape, state.shape],
        output_dtypes=[mx.float32, mx.float32],
        template={"N": n, "D": inner, "MARKS": marks is not None},
        backend=backend,
    )
    return y, next_state


def tile_size(n: int) -> int:
    """Tokens whose float32 q and decays fit in threadgroup memory, 32 KB, at once; 0: too few for the kernels."""
    return min(64, 4096 // n // 16 * 16)


def chunk_size(length: int, n: int) -> int:
    """Tokens in a chunk: two tiles, since larger chunks write and read fewer states; one, if that holds all."""
    tile = tile_size(n)
    return tile if length <= tile else 2 * tile


def prepare(
    qkgt: mx.array,
    gate_bias: mx.array,
    norm_floor: float,
    marks: mx.array | None,
    chunk: int,
    backend: Backend,
    tiled: bool = False,
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """qkgt [B, T, 4n], in chunks of whole tiles.

    tiled: the first three of the results in squares of 16 x 16, for `recur`; chunk and n are multiples of 16.

    Returns: A [B, N, C, C], decayed q [B, N, C, n] and k [B, N, n, C], total [B, N, n].
    """
    batch, length, width = qkgt.shape
    n = width // 4
    tile = tile_size(n)
    strip, parts = min(tile, PREPARE_STRIP), 16
    chunks = ceil(length, chunk)
    a, q, k, total = _prepare(
        [qkgt, gate_bias, scalar(norm_floor), given(marks)],
        groups=(chunk // strip, chunks, batch),
        threads=parts * strip,
        output_shapes=[
            (batch, chunks, chunk, chunk),
            (batch, chunks, chunk, n),
            (batch, chunks, n, chunk),
            (batch, chunks, n),
        ],
        output_dtypes=[mx.float32] * 4,
        template={
            "C": chunk,
            "S": strip,
            "TILE": tile,
            "PARTS": parts,
            "N": n,
            "MARKS": marks is not None,
            "TILED": tiled,
        },
        backend=backend,
    )
    return a, q, k, total


def scan(written: mx.array, total: mx.array, state: mx.array, backend: Backend) -> tuple[mx.array, mx.array]:
    """written [B, N, n, D], total [B, N, n], state [B, n, D] -> the states before each chunk, and after the last."""
    batch, _, n, inner = written.shape
    before, after = _scan(
        [written, total, state],
        groups=(ceil(inner, 128), n, batch),
        threads=128,
        output_shapes=[written.shape, state.shape],
        output_dtypes=[mx.float32] * 2,
        template={"N": n, "D": inner},
        backend=backend,
    )
    return before, after


def recurs(v: mx.Dtype, n: int, width: int) -> bool:
    """Whether `recur` takes values of that type and width, beside n key features."""
    return v in HALVES and n in RECUR_KEYS and width % RECUR_COLUMNS == 0


def recur(
    a: mx.array, q: mx.array, k: mx.array, total: mx.array, v: mx.array, state: mx.array | None, backend: Backend
) -> tuple[mx.array, mx.array]:
    """`prepare`'s arrays, tiled and of one tile a chunk, v [B, T, D], state [B, n, D] -> o in v's type, and next state.

    A state of None is zeros.

    On CUDA the factors of o are rounded to TF32, those of the state are not.
    """
    batch, _, inner = v.shape
    chunk, n = q.shape[2:]
    o, after = _recur(
        [a, q, k, total, v, total if state is None else state],
        groups=(inner // RECUR_COLUMNS, 1, batch),
        threads=(chunk + n) * 2,
        output_shapes=[v.shape, (batch, n, inner)],
        output_dtypes=[v.dtype, mx.float32],
        template={"T": v.dtype, "C": chunk, "N": n, "D": inner, "W": RECUR_COLUMNS, "FRESH": state is None},
        backend=backend,
    )
    return o, after


def add_norm(
    h: mx.array, delta: mx.array | None, weight: mx.array, eps: float, keep: bool, backend: Backend
) -> tuple[mx.array, mx.array]:
    """h [..., d] (+ delta) -> the sum, where kept, and its RMSNorm in the type of the weight."""
    width = h.shape[-1]
    threads = row_threads(width)
    add = delta is not None
    total, normed = _add_norm(
        [h, weight if delta is None else delta, weight, scalar(eps)],
        groups=(h.size // width, 1, 1),
        threads=threads,
        output_shapes=[h.shape if keep else (1,), h.shape],
        output_dtypes=[h.dtype, weight.dtype],
        template={"H": h.dtype, "D": width, "WIDTH": threads, "ADD": add, "KEEP": keep},
        backend=backend,
    )
    return total, normed


def gate_norm(
    o: mx.array,
    c: mx.array,
    xz: mx.array,
    residual_weight: mx.array,
    weight: mx.array,
    eps: float,
    backend: Backend,
) -> mx.array:
    """o, c [B, T, D], xz [B, T, 2D] -> rmsnorm((o + residual_weight * c) * silu(z)) [B, T, D] in c's type."""
    width = c.shape[-1]
    threads = row_threads(width)
    (out,) = _gate_norm(
        [o, c, xz, residual_weight, weight, scalar(eps)],
        groups=(c.size // width, 1, 1),
        threads=threads,
        output_shapes=[c.shape],
        output_dtypes=[c.dtype],
        template={"D": width, "WIDTH": threads},
        backend=backend,
    )
    return out


def joins(xz: mx.array, down: mx.array) -> bool:
    """Whether `low_rank` takes xz [B, T, 2D] and down [R, D]."""
    rank, width = down.shape
    rows = xz.size // xz.shape[-1]
    return down.dtype == xz.dtype in HALVES and rows >= 16 and width % 16 == 0 and rank % 16 == 0 and rank <= 64


def low_rank(xz: mx.array, down: mx.array, up: mx.array, backend: Backend) -> mx.array:
    """x, the first half of xz [B, T, 2D], times down [R, D] and then up [D, R] -> [B, T, D]; all of 16 bits."""
    batch, length, _ = xz.shape
    rank, width = down.shape
    threads = 512 if rank <= 32 else 256  # as many as have threadgroup memory for their sums
    (u,) = _low_rank(
        [xz.reshape(-1, 2 * width), down, up],
        groups=(ceil(batch * length, 16), 1, 1),
        threads=threads,
        output_shapes=[(batch, length, width)],
        output_dtypes=[xz.dtype],
        template={"T": xz.dtype, "D": width, "R": rank, "WIDTH": threads},
        backend=backend,
    )
    return u


def turns(head: int, rope_dims: int) -> bool:
    """Whether `heads` takes heads of that many features, of which so many are rotated."""
    return head % 4 == 0 and rope_dims > 0 and rope_dims % 8 == 0


def heads(
    qkv: mx.array,
    offset: mx.array,
    counts: tuple[int, int, int],
    rope_dims: int,
    base: float,
    backend: Backend,
    past: tuple[mx.array, mx.array] | None = None,
    window: int = 0,
    rows: int = 0,
) -> tuple[mx.array, mx.array, mx.array]:
    """qkv [B, T, (H + Hk + Hv) F] -> q [B, P, H, F], k [B, 1, M + P, Hk F] and v [B, 1, M + P, Hv F].

    offset: one, or [B]. past: keys and values before, of which the last M, at most `window`, come first; None: M = 0.
    rows: P, of which those from T on are zeros; 0: P = T.
    """
    batch, length, width = qkv.shape
    head = width // sum(counts)
    num_heads, num_k, num_v = counts
    rows = rows or length
    before = 0 if past is None else min(past[0].shape[2], window)
    q, k, v = _heads(
        [qkv, offset.reshape(-1), scalar(math.log2(base)), *(past or (qkv, qkv))],
        groups=(before + rows, 1, batch),
        threads=HEADS_THREADS,
        output_shapes=[
            (batch, rows, num_heads, head),
            (batch, 1, before + rows, num_k * head),
            (batch, 1, before + rows, num_v * head),
        ],
        output_dtypes=[qkv.dtype] * 3,
        template={
            "H": num_heads,
            "HK": num_k,
            "HV": num_v,
            "F": head,
            "R": rope_dims,
            "EACH": offset.size > 1,
            "WIDTH": HEADS_THREADS,
            "WINDOW": 0 if past is None else window,
        },
        backend=backend,
    )
    return q, k, v


def swiglu(x: mx.array, backend: Backend) -> mx.array:
    """value | gate [..., 2f] -> silu(gate) * value [..., f]."""
    width = x.shape[-1] // 2
    rows = x.size // (2 * width)
    (out,) = _swiglu(
        [x.reshape(rows, 2 * width)],
        groups=(ceil(rows * width // 4, 128), 1, 1),
        threads=128,
        output_shapes=[(*x.shape[:-1], width)],
        output_dtypes=[x.dtype],
        template={"F": width},
        backend=backend,
    )
    return out
