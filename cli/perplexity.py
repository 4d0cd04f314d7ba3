"""``rodimus-mlx perplexity``: how well a model predicts a text."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from . import evaluation, options
from .progress import ByteProgress

EXAMPLE = "  rodimus-mlx perplexity coder-1.6b --data book.txt --window 4096"


def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hugging Face id.")],
    data: evaluation.Data,
    adapter: options.Adapter = None,
    window: evaluation.WindowSize = None,
    stride: evaluation.Stride = None,
    batch: evaluation.Batch = 1,
    max_tokens: evaluation.MaxTokens = None,
    as_json: evaluation.Json = False,
) -> None:
    """Measure perplexity over a text, in all and by position.

    A model reads a document from an empty state; without --window, however
    long it is.
    """
    from ..evaluation.perplexity import perplexity
    from ..evaluation.text import read_documents
    from ..loading import load

    loaded, tokenizer = load(model, adapter_path=adapter)
    documents = read_documents(data, tokenizer, max_tokens)
    with ByteProgress("Reading", unit=" tokens") as progress:
        found = perplexity(loaded, documents, window=window, stride=stride, batch=batch, progress=progress)
    if as_json:
        print(json.dumps({"model": model, "data": data, **found}))
        return
    rows = [[bucket, f"{b['tokens']:,}", f"{b['perplexity']:.4f}"] for bucket, b in evaluation.labelled(found)]
    evaluation.table(["tokens seen before", "tokens", "perplexity"], rows)
    print(
        f"perplexity {found['perplexity']:.4f} ± {found['standard_error']:.4f}, loss {found['loss']:.4f} nats a token"
    )
