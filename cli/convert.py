"""``rodimus-mlx convert``: write a checkpoint in the form that rodimus-mlx and mlx-lm load directly."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from .progress import ByteProgress, size

EXAMPLE = "  rodimus-mlx convert codefuse-ai/Rodimus-Plus-Coder-1.6B-Chat coder-1.6b \\\n      --dtype bfloat16"


class Dtype(str, Enum):
    """What weights can be stored as."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def run(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder or Hugging Face id of a checkpoint.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to make.")],
    dtype: Annotated[
        Dtype | None, typer.Option(help="Cast the weights; else they stay as they are.", case_sensitive=False)
    ] = None,
) -> None:
    """Convert a checkpoint for MLX.

    SRC may be in the official format (.bin or .safetensors) or in that of
    flash-linear-attention. OUT also opens in mlx-lm. It is complete or, if
    anything goes wrong, not there.
    """
    from ..convert.convert import convert
    from ..hub import find_folder

    with ByteProgress("Writing") as progress:
        summary = convert(find_folder(source), out, dtype.value if dtype else None, progress)
    print(f"{out}: {summary.parameters:,} parameters, {summary.dtype}, {size(summary.weight_bytes)}")
