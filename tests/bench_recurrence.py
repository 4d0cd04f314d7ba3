"""Seconds of the token-by-token loop and of the chunked recurrence, forward on the CPU, and their ratio.

    python tests/bench_recurrence.py [--length 1024] [--n 64] [--width 4096] [--repeats 3]

Nearly all of the chunked form is matrix products, so their speed decides; it is printed too. MLX's Linux wheel links a
plain BLAS: preload a faster one, for example LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libopenblas.so.0
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import mlx.core as mx

from rodimus_mlx.kernels.chunked import chunked_recurrence
from rodimus_mlx.kernels.reference import sequential_recurrence


def seconds(function: Callable[[], object], repeats: int) -> float:
    """The fastest of some runs, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        mx.eval(function())
        times.append(time.perf_counter() - begin)
    return min(times[1:])


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
    product = seconds(lambda: square @ square, arguments.repeats)
    print(f"float32 matrix product: {2 * 1024**3 / product / 1e9:.1f} GFLOP/s")
    loop = seconds(lambda: sequential_recurrence(*inputs), arguments.repeats)
    chunked = seconds(lambda: chunked_recurrence(*inputs), arguments.repeats)
    print(f"T {length}, n {n}, D {width}: loop {loop:.3f} s, chunked {chunked:.3f} s, ratio {loop / chunked:.1f}")


if __name__ == "__main__":
    main()
