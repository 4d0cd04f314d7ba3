"""Multi-query associative recall (MQAR): how much does a state of a given size remember?

    python mqar.py --mem-size 16 64 256 --block rodimus rodimus_plus --seeds 3 --out mqar.jsonl

A sequence lists key-value pairs, then asks for every key's value once. Two-layer models are trained from scratch, on
sequences of --length with --pairs and on shorter ones with fewer, and measured on new ones of --length. The task is
that of "Zoology: Measuring and Improving Recall in Efficient Language Models" (arXiv 2312.04927), by default at a size
for two cores. The Rodimus paper's figure has --length 1024 --pairs 256 --vocab-size 8192.

Every finished run is a line in --out; a later call with the same settings goes on after those. With --seconds the
speed is measured first, and all runs get as many steps, up to --steps, as fit in that time together.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.errors import RodimusError
from rodimus_mlx.finetune.data import Sample
from rodimus_mlx.finetune.initialize import DEVIATION, initialize
from rodimus_mlx.finetune.settings import Settings
from rodimus_mlx.finetune.trainer import train

LAYERS = 2
NEARNESS = 0.01  # exponent of the power law of a query's distance from the pairs, plus 1; Zoology's
# Deviation of the embeddings at the start. With the official 0.02 a narrow model of two layers stays for thousands of
# steps where it knows which words are values and no more: its stream and its logits begin ten times too small.
EMBEDDINGS = 0.2
TESTS = 512  # sequences to measure on
ROWS = 256  # made or measured at once
SHARES = (16, 4, 2, 1)  # training has --pairs and --length divided by each: recall is learned on the short ones first
TRIAL = 12  # steps to measure the speed by, the first ones compile
MARGIN = 0.93  # of the seconds: the rest is for measuring accuracy

# Accuracies in the paper's figure (arXiv 2410.06577), at its sizes.
PAPER = {
    "Rodimus": {16: 0.25, 32: 0.37, 64: 0.65, 128: 0.74, 256: 0.82},
    "Rodimus+": {16: 0.37, 32: 0.72, 64: 0.91, 128: 0.97, 256: 0.97},
    "Mamba-2": {16: 0.11, 32: 0.26, 64: 0.31, 128: 0.41, 256: 0.61},
}

Run = tuple[str, int, int]  # block, n, seed


def main() -> None:
    """Train and measure every combination; a line of JSON each, then the table."""
    args = parser().parse_args()
    start = time.perf_counter()
    runs = [(block, n, seed) for seed in range(args.seeds) for block in args.block for n in args.mem_size]
    scores = finished(args)
    todo = [run for run in runs if run not in scores]
    try:
        if todo:
            scores |= train_all(args, todo, start)
    except RodimusError as error:
        sys.exit(f"Error: {error}")
    print(table({run: scores[run] for run in runs}, args.block, args.mem_size))


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mem-size", type=int, nargs="+", default=[16, 64, 256], help="n, the state is n x 2d")
    parser.add_argument("--block", nargs="+", default=["rodimus", "rodimus_plus"])
    parser.add_argument("--seeds", type=int, default=1, help="of the weights and the batches")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=160)
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--window", type=int, default=32, help="W of Rodimus+: a token sees W // 2 + 1")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rows", type=int, default=12000, help="of --length, to train on")
    parser.add_argument("--learning-rate", type=float, default=1.2e-2)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--seconds", type=float, help="take about so long in all: fewer steps where need be")
    parser.add_argument("--out", type=Path, help="file of finished runs, .jsonl, added to")
    return parser


def train_all(
    args: argparse.Namespace, runs: Sequence[Run], start: float, change: Callable[[Any], None] | None = None
) -> dict[Run, float]:
    """The accuracy of each run, written as soon as it is known; ``change`` is done to each new model."""
    training = mixture(args.rows, args.length, args.pairs, args.vocab_size, 0)
    tests = sequences(TESTS, args.length, args.pairs, args.vocab_size, np.random.default_rng([0, 1]))
    note(f"{len(training)} sequences, made in {time.perf_counter() - start:.1f} s")
    steps = args.steps if args.seconds is None else fitting_steps(args, runs, training, start)
    scores = {}
    for block, n, seed in runs:
        begin = time.perf_counter()
        model = new(args, block, n, seed)
        if change is not None:
            change(model)
        train(model, training, settings(args, steps, seed), observers=[reporter(f"{block} n {n} seed {seed}")])
        score = accuracy(model, tests)
        scores[block, n, seed] = score
        seconds = round(time.perf_counter() - begin, 1)
        facts = {"block": block, "mem_size": n, "seed": seed, "accuracy": round(score, 4), "steps": steps}
        line = json.dumps({**facts, "seconds": seconds, "settings": asked(args)})
        print(line, flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(line + "\n")
    return scores


def fitting_steps(args: argparse.Namespace, runs: Sequence[Run], training: Sequence[Sample], start: float) -> int:
    """As many steps, the same for all runs, as fit in --seconds."""
    tokens = args.batch_size * args.length
    seconds = {}
    for block, n in dict.fromkeys(run[:2] for run in runs):
        rates: list[float] = []

        def observe(event: dict[str, Any], rates: list[float] = rates) -> None:
            if event["event"] == "report":
                rates.append(event["tokens_per_second"])

        train(new(args, block, n, 0), training, settings(args, TRIAL, 0, reports=4), observers=[observe])
        seconds[block, n] = tokens / max(rates)
        note(f"{block} n {n}: {seconds[block, n]:.4f} s a step")
    left = MARGIN * args.seconds - (time.perf_counter() - start)
    return max(1, min(args.steps, int(left / sum(seconds[run[:2]] for run in runs))))


def finished(args: argparse.Namespace) -> dict[Run, float]:
    """The accuracies that --out already has, of the same settings."""
    if args.out is None or not args.out.exists():
        return {}
    lines = [json.loads(line) for line in args.out.read_text().splitlines()]
    own = [line for line in lines if line["settings"] == asked(args)]
    return {(line["block"], line["mem_size"], line["seed"]): line["accuracy"] for line in own}


def asked(args: argparse.Namespace) -> dict[str, Any]:
    """The options that a run's result depends on."""
    others = {"mem_size", "block", "seeds", "out"}
    return {name: value for name, value in vars(args).items() if name not in others}


def new(args: argparse.Namespace, block: str, n: int, seed: int) -> Any:
    """A model to train."""
    model = initialize(config(block, n, args.d_model, args.vocab_size, args.window), seed)
    embeddings = model.model.embeddings
    embeddings.weight = embeddings.weight * (EMBEDDINGS / DEVIATION)
    return model


def reporter(name: str) -> Any:
    """Notes the loss on standard error."""

    def observe(event: dict[str, Any]) -> None:
        if event["event"] == "report":
            note(f"{name}: step {event['step']} loss {event['loss']:.3f}")

    return observe


def note(text: str) -> None:
    """A line on standard error, at once."""
    print(text, file=sys.stderr, flush=True)


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


def settings(args: argparse.Namespace, steps: int, seed: int, reports: int = 20) -> Settings:
    """Adam with a warm-up and a fall to zero."""
    return Settings(
        method="full",
        packing=True,
        seq_len=args.length,
        batch_size=args.batch_size,
        iters=steps,
        learning_rate=args.learning_rate,
        optimizer_config={"betas": [0.9, 0.95]},  # with 0.999 a Rodimus+ did not leave the start
        schedule="cosine",
        warmup=max(1, steps // 20),
        dtype=args.dtype,
        seed=seed,
        report_every=max(1, steps // reports),
    )


def mixture(rows: int, length: int, pairs: int, vocab_size: int, seed: int) -> list[Sample]:
    """Training sequences that fill so many rows of ``length``, as many by each of SHARES; only answers are learned."""
    rng = np.random.default_rng(seed)
    shares = [share for share in SHARES if pairs % share == length % share == 0]
    samples: list[Sample] = []
    for share in shares:
        count = rows // len(shares) * share
        samples += map(Sample, *sequences(count, length // share, pairs // share, vocab_size, rng))
    return samples


def sequences(
    count: int, length: int, pairs: int, vocab_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequences of the task.

    First ``pairs`` keys, each followed by its value. The rest is places of two tokens: each key stands again at one of
    them, likelier an early one (power law), and its value is wanted. As in Zoology, the value does not follow it: where
    it does, a model learns first to choose among the values still to come. All else is random words. Keys are distinct,
    from the lower half of the vocabulary; values are from the upper half.

    Returns:
        tokens [count, length + 1] int32; learn [count, length] bool: from which inputs answers are wanted; and the
        answers there, [count, length] int32.
    """
    places = (length - 2 * pairs) // 2
    if pairs < 1 or places < pairs or vocab_size // 2 <= pairs:
        raise SystemExit(f"Error: {pairs} pairs and their queries need more than {length} tokens or {vocab_size} words")
    tokens = rng.integers(1, vocab_size, (count, length + 1), dtype=np.int32)
    learn = np.zeros((count, length), bool)
    answers = np.zeros((count, length), np.int32)
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
        tokens[rows, asked], answers[rows, asked] = keys, values
        learn[rows, asked] = True
    return tokens, learn, answers


def accuracy(model: Any, tests: tuple[np.ndarray, np.ndarray, np.ndarray]) -> float:
    """Share of the answers that the model finds likeliest of all words."""
    right = 0
    for begin in range(0, len(tests[0]), 16):
        tokens, learn, answers = (mx.array(part[begin : begin + 16]) for part in tests)
        found = model(tokens[:, :-1]).argmax(axis=-1) == answers
        right += (found & learn).sum().item()
    return right / int(tests[1].sum())


def table(scores: dict[Run, float], blocks: Sequence[str], sizes: Sequence[int]) -> str:
    """Markdown: means and the spread over seeds, and beside them the paper's."""
    lines = ["| accuracy | " + " | ".join(f"n = {n}" for n in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for block in blocks:
        own = [[score for run, score in scores.items() if run[:2] == (block, n)] for n in sizes]
        lines.append(row(f"{block}, here", map(cell, own)))
    for name, values in PAPER.items():
        own = [[values[n]] if n in values else [] for n in sizes]
        lines.append(row(f"{name}, paper: 1,024 tokens, 256 pairs", map(cell, own)))
    return "\n".join(lines)


def cell(values: Sequence[float]) -> str:
    """The mean, and the spread of several."""
    if not values:
        return ""
    spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def row(name: str, cells: Iterable[str]) -> str:
    """A line of the table."""
    return f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
