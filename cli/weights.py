"""Options of the commands that write weights, and what they do once the folder is there."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from .progress import ByteProgress, size

if TYPE_CHECKING:
    from pathlib import Path

    from ..convert.convert import Summary


class Dtype(StrEnum):
    """What weights can be stored as."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Mode(StrEnum):
    """MLX's ways to quantize."""

    affine = "affine"
    mxfp4 = "mxfp4"
    mxfp8 = "mxfp8"
    nvfp4 = "nvfp4"


class Recipe(StrEnum):
    """Which matrices get how many bits."""

    default = "default"
    all = "all"
    mixed_2_6 = "mixed_2_6"
    mixed_3_4 = "mixed_3_4"
    mixed_3_6 = "mixed_3_6"
    mixed_4_6 = "mixed_4_6"


Out = Annotated[str, typer.Argument(metavar="OUT", help="Folder to make.")]
Bits = Annotated[int | None, typer.Option(metavar="N", help="Bits a weight: 2, 3, 4, 5, 6 or 8; the usual ones are 4.")]
GroupSize = Annotated[
    int | None, typer.Option(metavar="N", help="Weights that share a scale: 32, 64 or 128.  [default: 64]")
]
QuantizationMode = Annotated[
    Mode | None, typer.Option(help="How numbers are rounded.  [default: affine]", case_sensitive=False)
]
QuantizationRecipe = Annotated[
    Recipe,
    typer.Option(
        help="'default' keeps gates, q and k fine; 'all' does not; mixed_LOW_HIGH gives some matrices more bits.",
        case_sensitive=False,
    ),
]
StoredDtype = Annotated[
    Dtype | None,
    typer.Option(help="Cast what is not quantized; else it stays, but float32 becomes bfloat16 beside quantized."),
]
Measure = Annotated[
    str | None, typer.Option(metavar="FILE", help="Measure OUT's perplexity on a text, for the model card.")
]
Upload = Annotated[str | None, typer.Option(metavar="REPO", help="Upload OUT to the Hugging Face hub, as owner/name.")]


def check_measure(measure: str | None, source: Path) -> None:
    """Fail over a text that cannot be measured before anything is written."""
    if measure is None:
        return
    import warnings

    from ..evaluation.text import read_documents
    from ..tokenizer import load_tokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the conversion says it all again
        read_documents(measure, load_tokenizer(source))


def finish(summary: Summary, measure: str | None, upload: str | None) -> None:
    """Say what was written; measure and upload it where that is wished."""
    bits = f", {summary.bits_per_weight:.2f} bits per weight" if summary.quantization is not None else ""
    amount = f"{summary.dtype}{bits}, {size(summary.weight_bytes)}"
    print(f"{summary.out}: {summary.parameters:,} parameters, {amount}")
    if measure is not None:
        from ..evaluation.card import measure_into_card

        with ByteProgress("Measuring", unit=" tokens") as progress:
            found = measure_into_card(summary.out, measure, progress)
        print(f"Perplexity {found['perplexity']:.4f} over {found['tokens']:,} tokens of {measure}")
    if upload is not None:
        from ..convert.upload import upload as send

        print(send(summary.out, upload))
