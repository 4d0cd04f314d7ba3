"""Seconds of the token-by-token loop and of the chunked recurrence, forward on the CPU, and their ratio.

    python tests/bench_recurrence.py [--length 1024] [--n 64] [--width 4096] [--repeats 3]

Nearly all of the chunked form is matrix products, so their speed decides; it is printed too. MLX's Linux wheel links a
plain BLAS: preload a faster one, for example LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libopenblas.so.0, and let it choose
the kernel for its processor (no OPENBLAS_CORETYPE): some choices of some versions compute wrong, so the results of both
are compared as well.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import mlx.core as mx

from rodimus_mlx.kernels.chunked import chunked_recurrence
from rodimus_mlx.kernels.reference import sequential_recurrence


def seconds(function: Callable[[], object], repeats: int) -> tuple[float, float]:
    """The fastest and the median of some runs, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        mx.eval(function())
        times.append(time.perf_counter() - begin)
    return min(times[1:]), statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    length, n, width = arguments.length, arguments.n, arguments.width

    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    q, k = mx.random.normal((2, 1, length, n))
    log_decay = -mx.random.uniform(0, 0.5, (1, length, n))
    v, state = mx.random.normal((1, length, width)), mx.random.normal((1, n, width))
    inputs = (q, k * n**-0.5, v, log_decay, state)
    mx.eval(inputs)

    square = mx.random.normal((1024, 1024))
    product, _ = seconds(lambda: square @ square, arguments.repeats)
    print(f"float32 matrix product: {2 * 1024**3 / product / 1e9:.1f} GFLOP/s")
    # before the loop, whose thousands of arrays leave the heap in pieces
    chunked = seconds(lambda: chunked_recurrence(*inputs), arguments.repeats)
    loop = seconds(lambda: sequential_recurrence(*inputs), arguments.repeats)
    print(f"T {length}, n {n}, D {width}")
    for name, slow, fast in zip(("fastest", "median"), loop, chunked):
        print(f"{name}: loop {slow * 1e3:.1f} ms, chunked {fast * 1e3:.2f} ms, ratio {slow / fast:.1f}")
    for name, x, y in zip(("outputs", "state"), chunked_recurrence(*inputs), sequential_recurrence(*inputs)):
        print(f"{name}: differ by {(mx.abs(x - y).max() / mx.abs(y).max()).item():.1e} of the largest")


if __name__ == "__main__":
    main()
