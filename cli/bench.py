"""``rodimus-mlx bench``: how fast a model is on this machine, alone or beside another."""

from __future__ import annotations

import json
import statistics
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import evaluation, options
from .progress import ByteProgress, size

if TYPE_CHECKING:
    from ..bench.measure import Measured

EXAMPLE = "  rodimus-mlx bench --shape 1.6b --bits 4 --compare qwen2.5-1.5b"

MOST_TOKENS = 10_000_000  # minutes to hours each time; far more would never end


class Shape(StrEnum):
    """Released models."""

    plus_1_6b = "1.6b"
    plus_4b = "4b"
    rodimus_1_4b = "1.4b"


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        lengths = [0]
    if min(lengths) < 1:
        raise typer.BadParameter(f"must be whole numbers above 0, with commas between, not {text}")
    if max(lengths) > MOST_TOKENS:
        raise typer.BadParameter(f"must be at most {MOST_TOKENS} each, not {max(lengths)}")
    return lengths


def run(
    model: options.Model = None,
    shape: Annotated[
        Shape | None, typer.Option(help="A released model's sizes with random weights, instead of --model.")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Measure another by turns, with random weights: qwen2.5-1.5b, mamba2-1.3b, a shape, "
            "or the config.json of a folder or Hugging Face id that mlx-lm knows.",
        ),
    ] = None,
    bits: Annotated[int | None, typer.Option(metavar="N", min=1, help="Quantize random weights.")] = None,
    prompt_lengths: Annotated[
        Any, typer.Option(metavar="N,N", parser=_lengths, help="Tokens to read before decoding.")
    ] = "128,4096",
    tokens: Annotated[
        int, typer.Option(metavar="N", callback=options.between(1, MOST_TOKENS), help="Tokens to decode each time.")
    ] = 64,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Times to measure everything.")] = 5,
    prefill_step: Annotated[int, typer.Option(metavar="N", min=1, help="Prompt tokens to read at a time.")] = 2048,
    as_json: evaluation.Json = False,
) -> None:
    """Measure prefill, decoding and memory.

    Speeds are medians over the rounds, ± half of what lies between slowest
    and fastest. Launches are a GPU's for a token; of the limit: the share of the
    memory's bandwidth that decoding uses, which bounds its speed.
    """
    if model is not None and shape is not None:
        raise typer.BadParameter("either of the two, not both", param_hint="'--model' / '--shape'")
    if bits is not None and shape is None and compare is None:
        raise typer.BadParameter("is for random weights (--shape); 'quantize' makes a model", param_hint="'--bits'")

    from ..bench.measure import measure, memory_bandwidth
    from ..bench.models import load_subject, random_subject
    from ..loading import DEMO_FOLDER

    first = load_subject(model or DEMO_FOLDER) if shape is None else random_subject(shape.value, bits)
    subjects = [first] if compare is None else [first, random_subject(compare, bits)]
    bandwidth = memory_bandwidth()
    with ByteProgress("Measuring", unit=" passes") as progress:
        sizes: dict[str, Any] = {"tokens": tokens, "rounds": rounds, "prefill_step": prefill_step}
        found = measure(subjects, prompt_lengths, **sizes, progress=progress)
    machine = _machine() | {"bandwidth_gb_per_second": round(bandwidth / 1e9, 1)}
    ratios = _ratios(found) if compare else []
    if as_json:
        models = [{"name": s.name, "weights_gb": round(s.weight_bytes / 1e9, 6)} for s in subjects]
        results = [_figures(result, bandwidth) for result in found]
        print(json.dumps({**machine, "tokens": tokens, "models": models, "results": results, "ratios": ratios}))
        return
    weights = ", ".join(f"{s.name} {size(s.weight_bytes)}" for s in subjects)
    print(f"{machine['device']}, MLX {machine['mlx']}, copies {machine['bandwidth_gb_per_second']} GB/s; {weights}")
    columns = ["model", "prompt", "prefill tok/s", "decode tok/s", "memory", "launches", "of the limit"]
    evaluation.table(columns, [_row(result, bandwidth) for result in found])
    for ratio in ratios:
        print(
            f"prompt {ratio['prompt_tokens']}: {subjects[0].name} / {subjects[1].name}: "
            f"prefill {ratio['prefill']:.2f}, decode {ratio['decode']:.2f}"
        )


def _machine() -> dict[str, Any]:
    import platform

    import mlx.core as mx

    # without an argument it is of the default device; MLX before 0.31 knows it of Metal alone
    info = mx.device_info() if hasattr(mx, "device_info") else {}
    return {"device": info.get("device_name", platform.machine()), "mlx": mx.__version__}


def _figures(result: Measured, bandwidth: float) -> dict[str, Any]:
    return {
        "name": result.name,
        "prompt_tokens": result.prompt_tokens,
        "prefill_tokens_per_second": _spread(result.prefill),
        "decode_tokens_per_second": _spread(result.decode),
        "peak_memory_gb": round(max(result.peak) / 1e9, 6),
        "launches_per_token": result.launches,
        "bytes_per_token": result.bytes_touched,
        "bandwidth_share": round(result.bandwidth_share(bandwidth), 6),
    }


def _spread(speeds: list[float]) -> dict[str, Any]:
    return {"median": round(statistics.median(speeds), 2), "rounds": [round(x, 2) for x in speeds]}


def _row(result: Measured, bandwidth: float) -> list[str]:
    return [
        result.name,
        f"{result.prompt_tokens:,}",
        _with_spread(result.prefill),
        _with_spread(result.decode),
        size(max(result.peak)),
        str(result.launches or "-"),
        f"{result.bandwidth_share(bandwidth):.1%}",
    ]


def _with_spread(speeds: list[float]) -> str:
    median = statistics.median(speeds)
    spread = (max(speeds) - min(speeds)) / 2 / median
    return f"{median:,.{0 if median >= 1000 else 1}f} ±{spread:.1%}"


def _ratios(found: list[Measured]) -> list[dict[str, Any]]:
    """The first model's medians over the second's, at each prompt length; results come in pairs."""
    return [
        {
            "prompt_tokens": ours.prompt_tokens,
            "prefill": round(statistics.median(ours.prefill) / statistics.median(theirs.prefill), 4),
            "decode": round(statistics.median(ours.decode) / statistics.median(theirs.decode), 4),
        }
        for ours, theirs in zip(found[::2], found[1::2])
    ]
