"""The table of docs/quantization.md: every scheme and recipe against the model that it was made from.

    python tests/compare_schemes.py MODEL DATA --window 4096 --max-tokens 100000 > table.md

Loss: by how much it grows. Drift: of the recurrent states, in the layer that has most.

Also the calibrated ones, where --calibrate names a text to calibrate on.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from rodimus_mlx.convert.calibrate import GPTQ_BITS, METHODS, Calibration, convert_calibrated
from rodimus_mlx.convert.convert import Summary, convert
from rodimus_mlx.convert.schemes import MODES, Scheme, make_scheme, scheme_of

from rodimus_mlx.evaluation.compare import compare
from rodimus_mlx.evaluation.plot import label
from rodimus_mlx.evaluation.text import read_documents
from rodimus_mlx.loading import load, load_model

AFFINE = [Scheme(bits, 64) for bits in (2, 3, 4, 5, 6, 8)]
SCHEMES = [*AFFINE, *(make_scheme(mode=mode) for mode in MODES if mode != "affine")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--max-tokens", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument(
        "--unpack",
        action="store_true",
        help="compute with quantized weights written out: the same, faster on a CPU",
    )
    parser.add_argument("--calibrate", metavar="FILE", help="text for the methods that look at one")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="rows whose 'scheme, recipe' has one of these in it")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    original, tokenizer = load(args.model)
    documents = read_documents(args.data, tokenizer, args.max_tokens)
    print(f"{mx.device_info().get('device_name', 'CPU')}, MLX {mx.__version__}; window {args.window}")
    header: list[str] = []
    with tempfile.TemporaryDirectory() as work:
        for name, recipe, make in planned(args):
            if args.only and not any(text in f"{name}, {recipe}" for text in args.only):
                continue
            summary = make(Path(work) / "out")
            model, _ = load_model(unpacked(summary, Path(work)) if args.unpack else summary.out)
            found = compare(original, model, documents, window=args.window, batch=args.batch)
            if not header:
                header = columns(found)
                print("|".join(["", *header, ""]), "|".join(["", *["---"] * len(header), ""]), sep="\n")
            print("|".join(["", *row(name, recipe, summary, found), ""]), flush=True)
            for folder in Path(work).iterdir():
                shutil.rmtree(folder)


def planned(args: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[Path], Summary]]]:
    """Each conversion, with the names of its scheme and recipe."""

    def plain(scheme: Scheme | None = None, recipe: str = "default") -> Callable[[Path], Summary]:
        return lambda out: convert(args.model, out, args.dtype, scheme=scheme, recipe=recipe)

    def calibrated(scheme: Scheme, method: str) -> Callable[[Path], Summary]:
        how = Calibration(method, samples=args.samples, learning_rate=1e-5)
        return lambda out: convert_calibrated(args.model, out, scheme, args.dtype, args.calibrate, how)

    yield args.dtype, "", plain()
    for scheme, recipe in itertools.product(SCHEMES, ("default", "all")):
        yield str(scheme), recipe, plain(scheme, recipe)
    for recipe in ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"):
        yield "affine, groups of 64", recipe, plain(scheme_of(recipe, None, None, None), recipe)
    for method, scheme in itertools.product(METHODS if args.calibrate else (), AFFINE):
        if scheme.bits != 8 and (method != "gptq" or scheme.bits in GPTQ_BITS):
            yield str(scheme), method, calibrated(scheme, method)


def unpacked(summary: Summary, work: Path) -> Path:
    """The folder, or where it is quantized one with the values that its weights stand for."""
    if summary.quantization is None:
        return summary.out
    return convert(summary.out, work / "unpacked", summary.dtype, dequantize=True).out


def columns(found: dict[str, Any]) -> list[str]:
    a, buckets = found["a"]["perplexity"], [label(bucket) for bucket in found["buckets"]]
    print(f"{found['tokens']:,} tokens; perplexity of the original {a:.4f}\n", file=sys.stdout)
    by_position = [f"KL at {name}" for name in buckets]
    drift = [f"drift after {found['drift']['positions'][i]:,}" for i in (0, -1)]
    return ["scheme", "recipe", "bits a weight", "perplexity", "loss", "KL", "same top token", *by_position, *drift]


def row(name: str, recipe: str, summary: Summary, found: dict[str, Any]) -> list[str]:
    drift = [f"{max(layer[i] for layer in found['drift']['layers']):.1%}" for i in (0, -1)]  # the layer's that has most
    cost = found["b"]["loss"] / found["a"]["loss"] - 1
    figures = [f"{found['b']['perplexity']:.4f}", f"{cost:+.2%}", f"{found['kl']:.5f}", f"{found['top1']:.2%}"]
    by_position = [f"{bucket['kl']:.5f}" for bucket in found["buckets"]]
    return [name, recipe, f"{summary.bits_per_weight:.2f}", *figures, *by_position, *drift]


if __name__ == "__main__":
    main()
