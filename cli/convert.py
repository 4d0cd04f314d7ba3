"""``rodimus-mlx convert``: write a checkpoint in the form that rodimus-mlx and mlx-lm load directly."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import RodimusError
from . import weights
from .progress import ByteProgress

EXAMPLE = "  rodimus-mlx convert codefuse-ai/Rodimus-Plus-Coder-1.6B-Chat coder-1.6b \\\n      --bits 4"


def run(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder or Hugging Face id of a checkpoint.")],
    out: weights.Out,
    dtype: weights.StoredDtype = None,
    bits: weights.Bits = None,
    group_size: weights.GroupSize = None,
    mode: weights.QuantizationMode = None,
    recipe: weights.QuantizationRecipe = weights.Recipe.default,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write a quantized checkpoint's weights in full.")
    ] = False,
    to_official: Annotated[
        bool, typer.Option("--to-official", help="Write for the official PyTorch code instead.")
    ] = False,
    to_fla: Annotated[bool, typer.Option("--to-fla", help="Write for flash-linear-attention instead.")] = False,
    measure: weights.Measure = None,
    upload: weights.Upload = None,
) -> None:
    """Convert a checkpoint for MLX.

    SRC may be in the official format (.bin or .safetensors) or in that of
    flash-linear-attention, or an MLX folder. With --bits or --mode, weights
    are quantized on the way. OUT also opens in mlx-lm. It is complete or, if
    anything goes wrong, not there.
    """
    to = _format(to_official, to_fla)
    quantizes = any(value is not None for value in (bits, group_size, mode)) or recipe is not weights.Recipe.default
    if quantizes and to != "ours":
        raise RodimusError(f"--to-{to} writes weights in full: it does not go with --bits, --mode or --recipe")
    if measure is not None and to != "ours":
        raise RodimusError(f"--measure does not go with --to-{to}: measure the MLX folder instead")
    if upload is not None:
        from ..convert.upload import check_upload

        check_upload(upload)

    from ..convert.convert import convert
    from ..convert.schemes import scheme_of
    from ..hub import find_folder

    scheme = scheme_of(recipe.value, bits, group_size, mode.value if mode else None) if quantizes else None
    folder = find_folder(source)
    weights.check_measure(measure, folder)
    with ByteProgress("Writing") as progress:
        summary = convert(
            folder,
            out,
            dtype.value if dtype else None,
            progress,
            scheme=scheme,
            recipe=recipe.value,
            dequantize=dequantize,
            to=to,
        )
    weights.finish(summary, measure, upload)


def _format(to_official: bool, to_fla: bool) -> str:
    if to_official and to_fla:
        raise RodimusError("give --to-official or --to-fla, not both")
    return "official" if to_official else "fla" if to_fla else "ours"
