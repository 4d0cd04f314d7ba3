"""``rodimus-mlx doctor``: does this machine compute right, and how fast can it be?"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import RodimusError
from . import EXIT_ERROR, options

if TYPE_CHECKING:
    from ..doctor import Report

EXAMPLE = "  rodimus-mlx doctor --model coder-1.6b"


def run(
    model: options.Model = None,
    adapter: options.Adapter = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Check the kernels and the model on this machine.

    Compares kernels with the reference, decoding with reading, and batches
    with single prompts; measures the memory, and says what speed to expect.
    The report can go into a bug report as it is. The status is 1 if
    anything is not right.
    """
    from ..doctor import examine
    from ..loading import DEMO_FOLDER, load

    loaded, tokenizer = load(model or DEMO_FOLDER, adapter_path=adapter)
    if tokenizer is None:
        raise RodimusError("this checkpoint has no tokenizer; the doctor needs one")
    report = examine(loaded, tokenizer, _show_progress)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        _show(report, model or "the bundled model")
    if not report.passed:
        raise typer.Exit(EXIT_ERROR)


def _show_progress(name: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{name} ...", end="", file=sys.stderr, flush=True)


def _show(report: Report, model: str) -> None:
    from ..doctor import verdict

    for title, entries in (("Versions", report.versions), ("Machine", report.machine)):
        print(title)
        for name, value in entries.items():
            print(f"  {name:16}{value}")
    print(f"  {'computes with':16}{report.backend}")
    print(f"  {'bandwidth':16}{report.bandwidth / 1e9:.1f} GB/s\n")
    print(f"Checks, with {model}")
    for check in report.checks:
        mark = {True: "ok", False: "FAIL", None: "-"}[check.passed]
        print(f"  {mark:5}{check.name:31} {check.found}")
    print("\nTokens a second at most, by the memory's bandwidth (! does not fit in memory)")
    labels = list(dict.fromkeys(speed.weights for speed in report.speeds))
    print("  " + " " * 12 + "".join(f"{label:>20}" for label in labels))
    for name in dict.fromkeys(speed.checkpoint for speed in report.speeds):
        cells = [speed for speed in report.speeds if speed.checkpoint == name]
        row = [f"{s.tokens_per_second:.1f} ({s.gigabytes:.1f} GB){' ' if s.fits else '!'}" for s in cells]
        print(f"  {name:12}" + "".join(f"{text:>20}" for text in row))
    print(f"\n{verdict(report)}")
