"""What the commands that read a text share: their options and tables."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

Data = Annotated[
    str,
    typer.Option("--data", metavar="FILE", help="Text, or a .jsonl file with a document a line.", show_default=False),
]
WindowSize = Annotated[
    int | None,
    typer.Option("--window", metavar="N", min=1, help="Tokens read from an empty state.  [default: whole documents]"),
]
Stride = Annotated[
    int | None, typer.Option("--stride", metavar="N", min=1, help="Tokens between windows.  [default: the window]")
]
Batch = Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Windows read side by side.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", metavar="N", min=2, help="Read only so many.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def labelled(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The buckets of a result, each with its positions in words."""
    from ..evaluation.plot import label

    return [(label(bucket), bucket) for bucket in found["buckets"]]


def table(columns: list[str], rows: list[list[str]], title: str | None = None) -> None:
    """Print a table, the first column to the left and the others to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        result.add_column(name, justify="right" if i else "left")
    for row in rows:
        result.add_row(*row)
    # Files and pipes get whole tables, not ones folded to a terminal that is not there.
    width = None if sys.stdout.isatty() else 200
    Console(file=sys.stdout, width=width, highlight=False, markup=False).print(result)
