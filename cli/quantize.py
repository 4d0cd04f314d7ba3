"""``rodimus-mlx quantize``: a smaller model, by rounding alone or with the help of a text."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from ..errors import RodimusError
from . import weights
from .progress import ByteProgress

EXAMPLE = "  rodimus-mlx quantize coder-1.6b coder-1.6b-4bit --bits 4"


class Method(StrEnum):
    """mlx-lm's methods that look at a text."""

    gptq = "gptq"
    dynamic = "dynamic"
    dwq = "dwq"
    awq = "awq"


def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hugging Face id.")],
    out: weights.Out,
    bits: weights.Bits = None,
    group_size: weights.GroupSize = None,
    mode: weights.QuantizationMode = None,
    recipe: weights.QuantizationRecipe = weights.Recipe.default,
    dtype: weights.StoredDtype = None,
    calibrate: Annotated[
        Method | None,
        typer.Option(help="Round by what --data shows of the model, which is loaded whole; awq only says why not."),
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="Text or .jsonl to calibrate on.")] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="Rows of the data to calibrate on.")] = 128,
    seq_len: Annotated[int, typer.Option(metavar="N", min=8, help="Tokens in such a row.")] = 512,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Rows at a time.")] = 4,
    target_bits: Annotated[float | None, typer.Option(metavar="X", help="For dynamic: bits per weight in all.")] = None,
    learning_rate: Annotated[float, typer.Option(metavar="X", help="For dwq.")] = 1e-5,
    measure: weights.Measure = None,
    upload: weights.Upload = None,
) -> None:
    """Quantize a model.

    Without --calibrate this is convert with --bits, block by block. gptq
    rounds with care, dynamic gives bits to what needs them, dwq trains the
    scales.
    """
    from ..convert.schemes import scheme_of

    scheme = scheme_of(recipe.value, bits, group_size, mode.value if mode else None)
    if calibrate is not None:
        from ..convert.calibrate import check_calibration

        check_calibration(calibrate.value, scheme, recipe.value)
        if data is None:
            raise RodimusError("--calibrate needs --data: a text like those that the model is for")
    elif data is not None:
        raise RodimusError("--data is for --calibrate; --measure FILE measures the result")
    if upload is not None:
        from ..convert.upload import check_upload

        check_upload(upload)

    from ..convert.convert import convert
    from ..hub import find_folder

    folder, cast = find_folder(model), dtype.value if dtype else None
    weights.check_measure(measure, folder)
    if calibrate is None:
        with ByteProgress("Writing") as progress:
            summary = convert(folder, out, cast, progress, scheme=scheme, recipe=recipe.value)
    else:
        from ..convert.calibrate import Calibration, convert_calibrated

        how = Calibration(calibrate.value, samples, seq_len, batch, learning_rate, target_bits)
        summary = convert_calibrated(folder, out, scheme, cast, str(data), how)
    weights.finish(summary, measure, upload)
