"""``rodimus-mlx fuse``: make an adapter part of its model."""

from __future__ import annotations

from typing import Annotated

import typer

EXAMPLE = "  rodimus-mlx fuse --model coder-1.6b --adapter adapter --out coder-mine"


def run(
    model: Annotated[str, typer.Option("--model", "-m", help="Folder or Hugging Face id of the adapter's model.")],
    adapter: Annotated[str, typer.Option(metavar="FOLDER", help="Folder of the adapter.")],
    out: Annotated[str, typer.Option(metavar="OUT", help="Folder to make.")],
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write a quantized model's weights in full.")
    ] = False,
) -> None:
    """Write a model whose weights hold an adapter's changes.

    OUT opens in rodimus-mlx and mlx-lm. It is complete or, if anything goes
    wrong, not there.
    """
    from ..finetune.fuse import fuse
    from .progress import size

    print(f"{out}: {size(fuse(model, adapter, out, dequantize))}")
