"""Train the small model from scratch with this project's trainer, for a number of steps or of minutes.

    python train.py config_plus.json TOKENS TOKENIZER OUT --minutes 8

TOKENS is what tokenize_data.py wrote.
OUT becomes a folder that rodimus-mlx opens, with metrics.jsonl of the losses and, in run, the best weights so far.
With --minutes the speed is measured first, by a few steps that are thrown away.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import transformer
from tokenize_data import read

from rodimus_mlx.finetune.data import Sample
from rodimus_mlx.finetune.data import sample as whole
from rodimus_mlx.finetune.settings import Settings
from rodimus_mlx.finetune.trainer import train as train_rodimus

TRIAL = 24  # steps to measure the speed by, the first ones compile
WARMUP = 0.03  # share of the steps
MARGIN = 0.97  # of the minutes: the rest is for validation and saving


def main() -> None:
    """Parse, measure, train, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="config.json of a Rodimus, Rodimus+ or llama model")
    parser.add_argument("tokens", type=Path, help="folder of train.npz and valid.npz")
    parser.add_argument("tokenizer", type=Path, help="folder of tokenizer.json")
    parser.add_argument("out", type=Path, help="folder to write to")
    duration = parser.add_mutually_exclusive_group(required=True)
    duration.add_argument("--minutes", type=float)
    duration.add_argument("--steps", type=int)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=16, help="rows of --seq-len tokens")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    start = time.perf_counter()
    training = samples(args.tokens / "train.npz")
    valid = samples(args.tokens / "valid.npz")
    note(f"{len(training)} samples, read in {time.perf_counter() - start:.1f} s")

    def settings(steps: int, report_every: int) -> Settings:
        return Settings(
            method="full",
            packing=True,
            seq_len=args.seq_len,
            batch_size=args.batch_size,
            iters=steps,
            optimizer_config={"betas": [0.9, 0.95]},
            learning_rate=args.learning_rate,
            final_learning_rate=0.02 * args.learning_rate,
            schedule="linear",
            warmup=max(1, round(WARMUP * steps)),
            weight_decay=0.1,
            max_grad_norm=1.0,
            dtype=args.dtype,
            seed=args.seed,
            val_batches=-1,
            eval_every=max(1, steps // 10),
            report_every=report_every,
            save_every=steps,
        )

    steps = args.steps
    if steps is None:
        seconds = step_seconds(models.new(args.config, args.seed), training, settings(TRIAL, TRIAL // 4))
        left = 60 * args.minutes * MARGIN - (time.perf_counter() - start)
        steps = max(1, int(left / seconds))
        note(f"{seconds:.3f} s a step, {args.batch_size * args.seq_len / seconds:,.0f} tokens/s: {steps} steps")

    model = models.new(args.config, args.seed)
    note(f"{models.parameters(model):,} parameters")
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "metrics.jsonl").open("w") as metrics:
        options = {"valid": valid, "out": args.out / "run", "observers": [recorder(metrics, start)]}  # the best so far
        train(model, training, settings(steps, max(1, steps // 100)), **options)
    models.save(model, args.config, args.tokenizer, args.out)
    note(f"{args.out}: done after {time.perf_counter() - start:.0f} s")


def train(model: Any, training: list[Sample], settings: Settings, **options: Any) -> None:
    """By the trainer, whichever model it is."""
    (transformer.train if isinstance(model, transformer.Transformer) else train_rodimus)(
        model, training, settings, **options
    )


def samples(file: Path) -> list[Sample]:
    """Samples all of whose tokens are learned."""
    return [whole(tokens.astype(np.int32)) for tokens in read(file)]


def step_seconds(model: Any, training: list[Sample], settings: Settings) -> float:
    """What a step takes once all is compiled."""
    rates: list[float] = []

    def observe(event: dict[str, Any]) -> None:
        if event["event"] == "report":
            rates.append(event["tokens_per_second"])

    train(model, training, settings, observers=[observe])
    return settings.batch_size * settings.seq_len / float(np.median(rates[1:]))


def recorder(metrics: Any, start: float) -> Callable[[dict[str, Any]], None]:
    """Writes reports and validations to a file and to standard error."""

    def observe(event: dict[str, Any]) -> None:
        if event["event"] in ("start", "report", "valid", "end"):
            event = {**event, "seconds": round(time.perf_counter() - start, 1)}
            metrics.write(json.dumps(event) + "\n")
            metrics.flush()
            note(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in event.items()))

    return observe


def note(text: str) -> None:
    """A line on standard error, at once."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
