"""``rodimus-mlx inspect``: what a checkpoint is, and whether this machine can run and finetune it."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any

import typer

from . import evaluation
from .progress import size

EXAMPLE = "  rodimus-mlx inspect codefuse-ai/Rodimus-Plus-Coder-1.6B-Chat --context 32768"


class Method(StrEnum):
    """How finetune trains."""

    lora = "lora"
    dora = "dora"
    full = "full"
    state = "state"


def run(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder or Hugging Face id of a checkpoint.")],
    context: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens to predict memory for.  [default: as trained]")
    ] = None,
    method: Annotated[Method, typer.Option(help="How to finetune.")] = Method.lora,
    rank: Annotated[int | None, typer.Option(metavar="N", min=1, help="Rank of lora and dora.  [default: 8]")] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Rows to finetune on.  [default: 4]")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(metavar="N", min=1, help="Tokens in a row.  [default: 2048]")] = None,
    grad_checkpoint: Annotated[bool, typer.Option("--grad-checkpoint", help="Compute blocks twice.")] = False,
    as_json: evaluation.Json = False,
) -> None:
    """Show what a checkpoint is, and what it takes to run and finetune it.

    Only headers are read; of a Hugging Face id that is not in the cache, only
    its config.json is downloaded.
    """
    from ..convert.inspection import finetuning, inspect, open_headers
    from ..errors import RodimusError
    from ..finetune.memory import available

    checkpoint = open_headers(source)
    trained_on = checkpoint.config.get("max_position_embeddings")
    found = inspect(checkpoint, context or (trained_on if type(trained_on) is int and trained_on > 0 else 4096))
    options = {"method": method.value, "rank": rank, "batch_size": batch_size, "seq_len": seq_len}
    try:
        found["finetuning"] = finetuning(checkpoint, {**options, "grad_checkpoint": grad_checkpoint})
    except RodimusError as error:
        found["finetuning"] = {"error": str(error)}
    found["available_memory"] = available()
    if as_json:
        print(json.dumps({"source": source, **found}))
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    sizes = dict(found["architecture"])
    kind = sizes.pop("type")
    numbers = ", ".join(f"{name} {_number(value)}" for name, value in sizes.items() if value is not None)
    head = "not tied" if not found["tied"] else "tied, and repeated in the file" if found["repeats_head"] else "tied"
    dtypes = ", ".join(f"{name} {size(count)}" for name, count in found["dtypes"].items())
    print(f"{kind}, {found['parameters']:,} parameters: {numbers}")
    print(f"{found['format']} format, {found['container']} ({', '.join(found['files']) or 'sizes by config.json'})")
    print(f"dtypes: {dtypes}; embedding and head: {head}")
    print(f"quantization: {_quantization(found['quantization'])}, {found['bits_per_weight']:.2f} bits per weight")
    rows = [[part["part"], f"{part['parameters']:,}", size(part["bytes"])] for part in found["parts"]]
    evaluation.table(
        ["part", "parameters", "loaded"], [*rows, ["all", f"{found['parameters']:,}", size(found["bytes"])]]
    )
    room = found["available_memory"]
    columns = ["to run", "weights", "cache", "work", "in all", f"of {size(room)}"]
    rows = [
        [name, *(size(need[key]) for key in ("weights", "cache", "work", "total")), _verdict(need["total"], room)]
        for name, need in found["memory"].items()
    ]
    evaluation.table(columns, rows, title=f"Memory at a context of {found['context']:,} tokens")
    training = found["finetuning"]
    if "error" in training:
        print(f"To finetune: {training['error']}")
        return
    settings = training["settings"]
    how = f"{settings['method']}, {settings['batch_size']} x {settings['seq_len']:,} tokens"
    fits = "it fits" if training["advice"] is None else f"more than there is: {training['advice']}"
    print(f"To finetune ({how}, {training['trained']:,} trained): about {size(training['memory'])}, {fits}")


def _number(value: Any) -> str:
    return " x ".join(map(str, value)) if isinstance(value, list) else f"{value:,}"


def _quantization(table: dict[str, Any] | None) -> str:
    if table is None:
        return "none"
    own = sum(isinstance(value, dict) for value in table.values())
    more = f", {own} matrices otherwise" if own else ""
    return f"{table['bits']} bit {table.get('mode', 'affine')}, groups of {table['group_size']}{more}"


def _verdict(need: int, room: int) -> str:
    return "fits" if need <= room else "does not fit"
