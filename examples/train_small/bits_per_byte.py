"""Bits per byte of trained models on the held-out modules, beside xz -9e on the same bytes.

    python bits_per_byte.py DATA MODEL [MODEL ...] [--window 2048] [--stride 1024] [--whole] [--limit BYTES]

A module is <bos> text <eos>: every token after <bos> is paid for, the first from <bos> alone, and so is <eos>; the bits
are divided by the text's bytes in UTF-8. Long modules are read in windows that start from nothing every --stride
tokens; a token is counted in the window that gives it the most context. With --whole a module is read once, from its
start, the recurrent state carried on (Rodimus models).
xz gets all modules as one stream, in the same order, so that it learns from one for the next; the models do not.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np
from tokenizers import Tokenizer
from train_tokenizer import BOS, EOS

BATCH_TOKENS = {mx.gpu: 65536, mx.cpu: 8192}
PAD_TO = 128  # window lengths are rounded up to multiples: few shapes


class Window(NamedTuple):
    """Inputs and targets of one forward pass, and from which target on they count."""

    document: int
    tokens: list[int]  # one more than inputs
    first: int


def main() -> None:
    """Print a table; one JSON object with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of heldout.jsonl")
    parser.add_argument("model", type=Path, nargs="+", help="folders that train.py wrote")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--stride", type=int, default=1024)
    parser.add_argument("--whole", action="store_true", help="carry the state through each module")
    parser.add_argument("--limit", type=int, help="use only the first modules, up to so many bytes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    records = read(args.data / "heldout.jsonl", args.limit)
    sizes = np.array([len(record["text"].encode()) for record in records])
    groups = {"all": np.ones(len(records), bool)}
    for name in sorted({record["group"] for record in records}):
        groups[f"{name}s held out"] = np.array([record["group"] == name for record in records])
    result: dict[str, Any] = {"bytes": {name: int(sizes[rows].sum()) for name, rows in groups.items()}}
    result["xz -9e"] = {name: xz_bits(records, rows) / sizes[rows].sum() for name, rows in groups.items()}
    for folder in args.model:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        documents = [encode(tokenizer, record["text"]) for record in records]
        model = models.load(folder)
        bits = (
            whole(model, documents, args.window) if args.whole else windowed(model, documents, args.window, args.stride)
        )
        result[folder.name] = {name: bits[rows].sum() / sizes[rows].sum() for name, rows in groups.items()}
    print(json.dumps(result) if args.json else table(result))


def read(file: Path, limit: int | None = None) -> list[dict[str, str]]:
    """Records of a .jsonl, up to so many bytes of text."""
    records, total = [], 0
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        total += len(record["text"].encode())
        if limit is not None and records and total > limit:
            break
        records.append(record)
    return records


def xz_bits(records: Sequence[dict[str, str]], chosen: np.ndarray) -> int:
    """Bits of the chosen texts, end to end, as one .xz stream of the highest preset."""
    text = "".join(record["text"] for record, own in zip(records, chosen) if own)
    return 8 * len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """<bos> text <eos>."""
    return [tokenizer.token_to_id(BOS), *tokenizer.encode(text).ids, tokenizer.token_to_id(EOS)]


def windowed(model: Any, documents: Sequence[list[int]], window: int, stride: int) -> np.ndarray:
    """Bits of each document, read in windows that start from nothing."""
    bits = np.zeros(len(documents))
    todo = sorted(windows(documents, window, stride), key=lambda w: -len(w.tokens))
    while todo:
        length = -(-(len(todo[0].tokens) - 1) // PAD_TO) * PAD_TO
        rows = max(1, BATCH_TOKENS[mx.default_device().type] // length)
        batch, todo = todo[:rows], todo[rows:]
        tokens = np.zeros((len(batch), length + 1), np.int32)
        counted = np.zeros((len(batch), length), bool)
        for row, each in enumerate(batch):
            tokens[row, : len(each.tokens)] = each.tokens
            counted[row, each.first : len(each.tokens) - 1] = True
        losses = np.array(token_bits(model(mx.array(tokens[:, :-1])), mx.array(tokens[:, 1:])))
        for row, each in enumerate(batch):
            bits[each.document] += losses[row, counted[row]].sum(dtype=np.float64)
    return bits


def windows(documents: Sequence[list[int]], window: int, stride: int) -> Iterator[Window]:
    """Windows that count each target once, with at least ``window - stride`` tokens before it after the first one."""
    for number, tokens in enumerate(documents):
        done = 0  # targets counted
        for start in range(0, len(tokens), stride):
            piece = tokens[start : start + window + 1]
            if start + len(piece) - 1 > done:
                yield Window(number, piece, done - start)
                done = start + len(piece) - 1


def whole(model: Any, documents: Sequence[list[int]], step: int) -> np.ndarray:
    """Bits of each document, read in one go with the state carried on."""
    bits = np.zeros(len(documents))
    for number, tokens in enumerate(documents):
        cache = model.make_cache()
        for start in range(0, len(tokens) - 1, step):
            piece = mx.array([tokens[start : start + step + 1]])
            bits[number] += token_bits(model(piece[:, :-1], cache), piece[:, 1:]).sum().item()
    return bits


def token_bits(logits: mx.array, targets: mx.array) -> mx.array:
    """-log2 of each target's probability, in float32."""
    return nn.losses.cross_entropy(logits.astype(mx.float32), targets) / math.log(2)


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    names = list(result["bytes"])
    sizes = " | ".join(f"{name} ({result['bytes'][name]:,} bytes)" for name in names)
    rows = [f"| bits per byte | {sizes} |", "|---" * (len(names) + 1) + "|"]
    for model, values in result.items():
        if model != "bytes":
            rows.append(f"| {model} | " + " | ".join(f"{values[name]:.4f}" for name in names) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
