"""The table of docs/quantization.md: every scheme and recipe against the model that it was made from.

    python tests/compare_schemes.py MODEL DATA --window 4096 --max-tokens 100000 > table.md

Also the calibrated ones, where --calibrate names a text to calibrate on.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
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
    parser.add_argument("--calibrate", metavar="FILE", help="text for the methods that look at one")
    parser.add_argument("--samples", type=int, default=128)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    original, tokenizer = load(args.model)
    documents = read_documents(args.data, tokenizer, args.max_tokens)
    print(f"{mx.device_info().get('device_name', 'CPU')}, MLX {mx.__version__}; window {args.window}")
    header: list[str] = []
    with tempfile.TemporaryDirectory() as work:
        for name, recipe, summary in made(args, Path(work)):
            model, _ = load_model(summary.out)
            found = compare(original, model, documents, window=args.window, batch=args.batch)
            if not header:
                header = columns(found)
                print("|".join(["", *header, ""]), "|".join(["", *["---"] * len(header), ""]), sep="\n")
            print("|".join(["", *row(name, recipe, summary, found), ""]), flush=True)
            shutil.rmtree(summary.out)


def made(args: argparse.Namespace, work: Path) -> Iterator[tuple[str, str, Summary]]:
    """Each conversion, with the names of its scheme and recipe."""
    yield args.dtype, "", convert(args.model, work / "plain", args.dtype)
    for scheme, recipe in itertools.product(SCHEMES, ("default", "all")):
        yield str(scheme), recipe, convert(args.model, work / "out", args.dtype, scheme=scheme, recipe=recipe)
    for recipe in ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"):
        scheme = scheme_of(recipe, None, None, None)
        yield (
            "affine, groups of 64",
            recipe,
            convert(args.model, work / "out", args.dtype, scheme=scheme, recipe=recipe),
        )
    if args.calibrate:
        for method, scheme in itertools.product(METHODS, AFFINE):
            if scheme.bits == 8 or (method == "gptq" and scheme.bits not in GPTQ_BITS):
                continue
            how = Calibration(method, samples=args.samples, learning_rate=1e-5)
            out = work / "out"
            yield str(scheme), method, convert_calibrated(args.model, out, scheme, args.dtype, args.calibrate, how)


def columns(found: dict[str, Any]) -> list[str]:
    a, buckets = found["a"]["perplexity"], [label(bucket) for bucket in found["buckets"]]
    print(f"{found['tokens']:,} tokens; perplexity of the original {a:.4f}\n", file=sys.stdout)
    by_position = [f"KL at {name}" for name in buckets]
    return ["scheme", "recipe", "bits a weight", "perplexity", "KL", "same top token", *by_position, "largest drift"]


def row(name: str, recipe: str, summary: Summary, found: dict[str, Any]) -> list[str]:
    drift = max(layer[-1] for layer in found["drift"]["layers"])  # after as many tokens as were read
    figures = [f"{found['b']['perplexity']:.4f}", f"{found['kl']:.5f}", f"{found['top1']:.2%}"]
    by_position = [f"{bucket['kl']:.5f}" for bucket in found["buckets"]]
    return [name, recipe, f"{summary.bits_per_weight:.2f}", *figures, *by_position, f"{drift:.1%}"]


if __name__ == "__main__":
    main()
