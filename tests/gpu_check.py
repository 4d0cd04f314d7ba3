"""Compare every kernel, and whole small models, with plain MLX and with float64 on this machine's GPU.

    python tests/gpu_check.py [--quick]

Prints a line for each comparison, with the worst of its errors and the bound that it must keep, and a verdict. The
status is 0 where all are kept, 1 where one is not, 2 where there is no GPU. Kernels are compiled as they are met: on
NVIDIA that takes seconds for each, so --quick takes one size and two dtypes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

os.environ["MLX_ENABLE_TF32"] = "0"  # before MLX: else plain MLX's float32 products have TF32's 10 bits

import mlx.core as mx
from metal.comparisons import CASES, DECAY_SIZES, DECAYS, FLOAT64, SIZES, STATE, model_bound, model_errors

from rodimus_mlx.kernels.backend import Wish
from rodimus_mlx.kernels.check import DTYPES, compare_all, recurrence_errors

QUICK_DTYPES = (mx.float32, mx.bfloat16)
QUICK_CASES = ("prompt in cuts", "gradients")


class Error(NamedTuple):
    """One error that was measured, and the bound that it must keep."""

    name: str
    error: float
    bound: float

    @property
    def share(self) -> float:
        """Of the bound; NaN, which keeps none, counts as infinite."""
        return self.error / self.bound if self.error == self.error else float("inf")


def comparisons(backend: Wish, quick: bool) -> Iterator[tuple[str, mx.Dtype, list[Error]]]:
    """What is compared, in which dtype, and the errors of all of its outputs."""
    dtypes = QUICK_DTYPES if quick else DTYPES
    for sizes in SIZES[1:2] if quick else SIZES:
        for dtype in dtypes:
            found = compare_all(backend, [sizes], [dtype])
            yield f"kernels, {sizes}", dtype, [Error(each.name, each.error, each.bound) for each in found]
    for decay, strength in list(DECAYS.items())[-1:] if quick else DECAYS.items():
        for dtype in dtypes:
            errors = recurrence_errors(backend, DECAY_SIZES, dtype, strength)
            bounds = dict.fromkeys(errors, FLOAT64[dtype]) | {"state": STATE}
            named = [Error(name, error, bounds[name]) for name, error in errors.items()]
            yield f"recurrence and float64, decay {decay}", dtype, named
    for block_type in ("rodimus_plus",) if quick else ("rodimus_plus", "rodimus"):
        for case in QUICK_CASES if quick else CASES:
            for dtype in dtypes[:1] if quick else dtypes:
                errors = model_errors(case, block_type, dtype, backend)
                yield (
                    f"{block_type}, {case}",
                    dtype,
                    [Error(name, e, model_bound(case, dtype)) for name, e in errors.items()],
                )


def check(backend: Wish = "auto", quick: bool = False) -> bool:
    """Print all comparisons; whether every bound was kept."""
    begin = time.perf_counter()
    count, failures = 0, 0
    print(f"{'comparison':<46} {'dtype':<9} {'outputs':>7}  {'error':>7} {'bound':>7}  of the worst")
    for what, dtype, errors in comparisons(backend, quick):
        count += len(errors)
        worst = max(errors, key=lambda each: each.share)
        broken = [each for each in errors if not each.share <= 1]
        failures += len(broken)
        kind = str(dtype).rpartition(".")[2]
        figures = f"{len(errors):>7}  {worst.error:7.1e} {worst.bound:7.1e}"
        print(f"{what:<46} {kind:<9} {figures}  {worst.name}{'  FAILED' if broken else ''}", flush=True)
        for each in broken:
            print(f"    FAILED {each.name}: {each.error:.1e} is above {each.bound:.1e}")
    verdict = f"{failures} FAILED" if failures else "all kept"
    print(f"{count} bounds, {verdict}, in {time.perf_counter() - begin:.0f} s")
    return failures == 0


def main() -> int:
    """Parse, check, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one size and two dtypes")
    quick = parser.parse_args().quick
    if mx.default_device() != mx.gpu:
        print("Error: MLX has no GPU here, so there is nothing to check", file=sys.stderr)
        return 2
    mx.random.seed(0)
    print(f"MLX {mx.__version__}, {'Metal' if mx.metal.is_available() else 'CUDA'}")
    return 0 if check(quick=quick) else 1


if __name__ == "__main__":
    sys.exit(main())
