"""Loss against position, to several times the length seen in training: does the state carry on?

    python loss_by_position.py DATA MODEL [MODEL ...] [--length 16384] [--step 2048]

The held-out modules are joined package by package into one text. Sequences of --length tokens start at every --step
tokens of it, so that the same tokens are read at every position, after little and after much. Printed are the mean
losses (nats a token) between positions 0, 256, 512, 1024 and so on. figures.py draws what --json prints.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np
from bits_per_byte import read
from tokenizers import Tokenizer

FIRST = 256  # tokens of the first bucket; each next one ends at twice the position
PIECE_TOKENS = {mx.gpu: 32768, mx.cpu: 2048}


def main() -> None:
    """Print a table; one JSON object with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of heldout.jsonl")
    parser.add_argument("model", type=Path, nargs="+", help="folders that train.py wrote")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--step", type=int, default=2048)
    parser.add_argument("--limit", type=int, help="use so many sequences")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    borders = [0, FIRST]
    while borders[-1] < args.length:
        borders.append(2 * borders[-1])
    records = sorted(read(args.data / "heldout.jsonl"), key=lambda r: (r["group"], r["package"], r["path"]))
    text = "".join(record["text"] for record in records)
    result: dict[str, Any] = {"from": borders[:-1], "to": borders[1:]}
    for folder in args.model:
        tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
        rows = sequences(tokens, args.length, args.step)[: args.limit]
        losses = by_position(models.load(folder), rows)
        result[folder.name] = [float(losses[a:b].mean()) for a, b in pairwise(borders)]
        result["sequences"] = len(rows)
    print(json.dumps(result) if args.json else table(result))


def sequences(tokens: Sequence[int], length: int, step: int) -> np.ndarray:
    """[N, length + 1]: what starts at every ``step`` tokens."""
    starts = range(0, len(tokens) - length, step)
    if not starts:
        raise SystemExit(f"Error: the held-out text has {len(tokens)} tokens, too few for --length {length}")
    return np.stack([np.asarray(tokens[start : start + length + 1], np.int32) for start in starts])


def by_position(model: Any, rows: np.ndarray, step: int = 2048) -> np.ndarray:
    """Mean loss at each position [length], the state carried from piece to piece of ``step`` tokens."""
    length = rows.shape[1] - 1
    total = np.zeros(length)
    at_once = max(1, PIECE_TOKENS[mx.default_device().type] // step)
    for first in range(0, len(rows), at_once):
        batch = rows[first : first + at_once]
        cache = model.make_cache()
        for start in range(0, length, step):
            piece = mx.array(batch[:, start : start + step + 1])
            logits = model(piece[:, :-1], cache).astype(mx.float32)
            losses = nn.losses.cross_entropy(logits, piece[:, 1:]).sum(axis=0)
            total[start : start + losses.size] += np.array(losses)
    return total / len(rows)


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    columns = [f"{a}-{b}" for a, b in zip(result["from"], result["to"])]
    lines = ["| loss at positions | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, values in result.items():
        if name not in ("from", "to", "sequences"):
            lines.append(f"| {name} | " + " | ".join(f"{value:.4f}" for value in values) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
