"""``rodimus-mlx compare``: what a quantized model makes different from the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from . import evaluation
from .progress import ByteProgress

EXAMPLE = "  rodimus-mlx compare coder-1.6b coder-1.6b-4bit --data book.txt"


def run(
    a: Annotated[str, typer.Argument(metavar="A", help="The reference: folder or Hugging Face id.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one.")],
    data: evaluation.Data,
    window: evaluation.WindowSize = None,
    stride: evaluation.Stride = None,
    batch: evaluation.Batch = 1,
    max_tokens: evaluation.MaxTokens = None,
    as_json: evaluation.Json = False,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Also make a picture, .png or .svg (needs matplotlib).")
    ] = None,
) -> None:
    """Compare two models on one text, by position.

    Perplexities, the KL divergence of B's predictions from A's, how often
    both find the same token likeliest, and how far B's recurrent states drift
    from A's, layer by layer.
    """
    from ..evaluation import plot as pictures

    if plot is not None:
        pictures.check_plot(plot)

    from ..evaluation.compare import compare
    from ..evaluation.text import read_documents
    from ..loading import load, load_model

    first, tokenizer = load(a)
    documents = read_documents(data, tokenizer, max_tokens)
    second, _ = load_model(b)
    with ByteProgress("Reading", unit=" tokens") as progress:
        found = compare(first, second, documents, window=window, stride=stride, batch=batch, progress=progress)
    if plot is not None:
        pictures.plot(found, plot, (Path(a).name, Path(b).name))
    if as_json:
        print(json.dumps({"models": [a, b], "data": data, **found}))
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    columns = ["tokens seen before", "tokens", "perplexity A", "perplexity B", "KL (nats)", "same top token"]
    rows = [_row(bucket, figures) for bucket, figures in evaluation.labelled(found)]
    evaluation.table(columns, [*rows, _row("all", found)])
    if found["drift"] is not None:
        positions = [f"{position:,}" for position in found["drift"]["positions"]]
        layers = [[str(i), *(f"{error:.2%}" for error in row)] for i, row in enumerate(found["drift"]["layers"])]
        evaluation.table(["layer", *positions], layers, title="Drift of the recurrent state after so many tokens")


def _row(name: str, figures: dict[str, Any]) -> list[str]:
    a, b = (f"{figures[key]['perplexity']:.4f}" for key in "ab")
    return [name, f"{figures['tokens']:,}", a, b, f"{figures['kl']:.5f}", f"{figures['top1']:.2%}"]
