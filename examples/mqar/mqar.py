"""Multi-query associative recall (MQAR): how much does a state of a given size remember?

    python mqar.py --mem-size 16 64 256 --block rodimus rodimus_plus --seeds 2

A sequence lists key-value pairs, then asks for every key's value once. Two-layer models are trained from scratch on
sequences of an eighth, a quarter, half and all of --pairs, and measured on new ones of --pairs. The task is that of
"Zoology: Measuring and Improving Recall in Efficient Language Models" (arXiv 2312.04927), at the size of the Rodimus
paper's figure: 1,024 tokens, 256 pairs, 8,192 words.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.finetune.data import Sample
from rodimus_mlx.finetune.initialize import initialize
from rodimus_mlx.finetune.settings import Settings
from rodimus_mlx.finetune.trainer import train

LAYERS = 2
NEARNESS = 0.01  # exponent of the power law of a query's distance from the pairs, plus 1; Zoology's
TESTS = 512  # sequences to measure on
ROWS = 256  # made or measured at once


def main() -> None:
    """Train and measure every combination; a line of JSON each, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mem-size", type=int, nargs="+", default=[16, 64, 256], help="n, the state is n x 2d")
    parser.add_argument("--block", nargs="+", default=["rodimus", "rodimus_plus"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--window", type=int, default=64, help="W of Rodimus+: a token sees W // 2 + 1")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32000, help="sequences to train on")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    args = parser.parse_args()

    counts = sorted({max(1, args.pairs // share) for share in (8, 4, 2, 1)})
    scores: dict[tuple[str, int], list[float]] = {}
    for seed in range(args.seeds):
        training = mixture(args.samples, args.length, counts, args.vocab_size, seed)
        tests = sequences(TESTS, args.length, args.pairs, args.vocab_size, np.random.default_rng([seed, 1]))
        for block in args.block:
            for n in args.mem_size:
                start = time.perf_counter()
                model = initialize(config(block, n, args.d_model, args.vocab_size, args.window), seed)
                train(model, training, settings(args, seed))
                score = accuracy(model, tests)
                scores.setdefault((block, n), []).append(score)
                facts = {"block": block, "mem_size": n, "seed": seed, "accuracy": round(score, 4)}
                print(json.dumps({**facts, "seconds": round(time.perf_counter() - start, 1)}), flush=True)
    print(table(scores, args.block, args.mem_size))


def config(block: str, n: int, d_model: int, vocab_size: int, window: int) -> RodimusConfig:
    """A two-layer model."""
    attention = {"num_heads": max(1, d_model // 64), "num_heads_k": 1, "window_size": window}
    return RodimusConfig.from_dict(
        {
            "model_type": "rodimus",
            "block_type": block,
            "d_model": d_model,
            "n_layer": LAYERS,
            "vocab_size": vocab_size,
            "norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "mixer_cfg": {"mem_size": n, "normalize_epsilon": 1e-5},
            "attn_cfg": attention if block == "rodimus_plus" else {},
        }
    )


def settings(args: argparse.Namespace, seed: int) -> Settings:
    """Adam with a warm-up and a linear fall to zero."""
    return Settings(
        method="full",
        seq_len=args.length,
        batch_size=args.batch_size,
        iters=args.steps,
        learning_rate=args.learning_rate,
        schedule="linear",
        warmup=max(1, args.steps // 20),
        weight_decay=0.1,
        dtype=args.dtype,
        seed=seed,
        report_every=args.steps,
    )


def mixture(count: int, length: int, pairs: Sequence[int], vocab_size: int, seed: int) -> list[Sample]:
    """Training sequences, equal shares of each number of pairs; only the answers are learned."""
    rng = np.random.default_rng(seed)
    samples: list[Sample] = []
    for number in pairs:
        samples += map(Sample, *sequences(count // len(pairs), length, number, vocab_size, rng))
    return samples


def sequences(
    count: int, length: int, pairs: int, vocab_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of the task.

    First ``pairs`` keys, each followed by its value. The rest is places of two tokens: each key, again followed by its
    value, stands at one of them, likelier an early one (power law); the others hold random words. Keys are distinct,
    from the lower half of the vocabulary; values are from the upper half.

    Returns:
        tokens [count, length + 1] int32, and learn [count, length] bool: which next tokens are answers.
    """
    places = (length - 2 * pairs) // 2
    if pairs < 1 or places < pairs or vocab_size // 2 <= pairs:
        raise SystemExit(f"Error: {pairs} pairs and their queries need more than {length} tokens or {vocab_size} words")
    tokens = rng.integers(1, vocab_size, (count, length + 1), dtype=np.int32)
    learn = np.zeros((count, length), bool)
    nearness = (NEARNESS - 1) * np.log(np.arange(1, places + 1))
    for begin in range(0, count, ROWS):
        rows = np.arange(begin, min(begin + ROWS, count))[:, None]
        lots = rng.random((len(rows), vocab_size // 2 - 1), dtype=np.float32)
        keys = 1 + np.argpartition(lots, pairs, axis=1)[:, :pairs] if pairs < lots.shape[1] else 1 + lots.argsort(1)
        values = rng.integers(vocab_size // 2, vocab_size, keys.shape)
        tokens[rows, 2 * np.arange(pairs)], tokens[rows, 2 * np.arange(pairs) + 1] = keys, values
        # The `pairs` largest of log weight + Gumbel noise: a draw without replacement by these weights.
        chosen = np.argsort(-(nearness + rng.gumbel(size=(len(rows), places))), axis=1)[:, :pairs]
        asked = 2 * pairs + 2 * rng.permuted(chosen, axis=1)
        tokens[rows, asked], tokens[rows, asked + 1] = keys, values
        learn[rows, asked] = True
    return tokens, learn


def accuracy(model: Any, tests: tuple[np.ndarray, np.ndarray]) -> float:
    """Share of the answers that the model finds likeliest of all words."""
    right = 0
    for begin in range(0, len(tests[0]), 16):
        tokens, learn = (mx.array(part[begin : begin + 16]) for part in tests)
        found = model(tokens[:, :-1]).argmax(axis=-1) == tokens[:, 1:]
        right += (found & learn).sum().item()
    return right / int(tests[1].sum())


def table(scores: dict[tuple[str, int], list[float]], blocks: Sequence[str], sizes: Sequence[int]) -> str:
    """Markdown: means, and the spread over seeds."""
    lines = ["| MQAR | " + " | ".join(f"n = {n}" for n in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for block in blocks:
        cells = []
        for n in sizes:
            own = scores[block, n]
            cells.append(f"{np.mean(own):.2f}" + (f" ({min(own):.2f} to {max(own):.2f})" if len(own) > 1 else ""))
        lines.append(f"| {block} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
