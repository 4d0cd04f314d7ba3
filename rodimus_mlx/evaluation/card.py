"""A converted folder's perplexity, put into its model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..convert.model_card import add_section
from ..loading import load
from .perplexity import Progress, perplexity
from .plot import label
from .text import read_documents

WINDOW = 4096  # tokens read from an empty state; what the released models were trained on


def measure_into_card(folder: str | Path, file: str | Path, progress: Progress | None = None) -> dict[str, Any]:
    """Measure a folder's model on a text, and say so in its README.md; returns what `perplexity` does.

    Raises:
        RodimusError: the text cannot be read, or the folder not loaded.
    """
    model, tokenizer = load(folder)
    found = perplexity(model, read_documents(file, tokenizer), window=WINDOW, progress=progress)
    lines = [
        f"Perplexity on `{Path(file).name}`, {found['tokens']:,} tokens read in windows of {found['window']:,}: "
        f"{found['perplexity']:.4f} (loss {found['loss']:.4f} nats a token).",
        "",
        "| tokens seen before | tokens | perplexity |",
        "|---|---|---|",
    ]
    lines += [f"| {label(b)} | {b['tokens']:,} | {b['perplexity']:.4f} |" for b in found["buckets"]]
    add_section(Path(folder), "Measured", "\n".join(lines))
    return found
