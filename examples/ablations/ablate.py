"""What the gates are worth: the same training with and without each of them (gates.py says how).

    python ablate.py recall --mem-size 16 --block rodimus
    python ablate.py text CONFIG TOKENS --steps 1000 --seq-len 512

`recall` takes the options of ../mqar/mqar.py and prints accuracies; `text` takes a config of ../train_small and the
folder that its tokenize_data.py wrote, and prints the losses on the validation samples, cut to --seq-len.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path += [str(HERE.parent / "mqar"), str(HERE.parent / "train_small")]

import gates  # noqa: E402
import models  # noqa: E402
import mqar  # noqa: E402
import train  # noqa: E402

from rodimus_mlx.finetune.data import Sample  # noqa: E402
from rodimus_mlx.finetune.settings import Settings  # noqa: E402
from rodimus_mlx.finetune.trainer import train as train_model  # noqa: E402

Change = Callable[[Any], None]
VARIANTS: dict[str, Change | None] = {
    "all gates": None,
    **{f"no {name}": change for name, change in gates.ABLATIONS.items()},
}


def main() -> None:
    """Train every variant, print a table."""
    kind, *options = sys.argv[1:] or ["--help"]
    if kind == "recall":
        recall(mqar.parser().parse_args(options))
    elif kind == "text":
        text(parser().parse_args(options))
    else:
        print(__doc__)
        sys.exit(kind not in ("-h", "--help"))


def recall(args: argparse.Namespace) -> None:
    """Accuracies of multi-query associative recall."""
    runs = [(block, n, seed) for seed in range(args.seeds) for block in args.block for n in args.mem_size]
    lines = [mqar.row("accuracy", (f"n = {n}" for n in args.mem_size)), "|---" * (len(args.mem_size) + 1) + "|"]
    for name, change in VARIANTS.items():
        args.variant = name  # told apart in --out
        scores = mqar.finished(args)
        todo = [run for run in runs if run not in scores]
        scores |= mqar.train_all(args, todo, time.perf_counter(), change) if todo else {}
        for block in args.block:
            own = [[scores[run] for run in runs if run[:2] == (block, n)] for n in args.mem_size]
            lines.append(mqar.row(f"{block}, {name}", map(mqar.cell, own)))
    print("\n".join(lines))


def parser() -> argparse.ArgumentParser:
    """The options of `text`."""
    parser = argparse.ArgumentParser(description="Validation losses of a language model without each gate.")
    parser.add_argument("config", type=Path, help="config.json of a Rodimus or Rodimus+ model")
    parser.add_argument("tokens", type=Path, help="folder of train.npz and valid.npz")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file of results, .jsonl, added to after each variant")
    return parser


def text(args: argparse.Namespace) -> None:
    """Losses of a language model."""
    training, valid = (cut(train.samples(args.tokens / f"{name}.npz"), args.seq_len) for name in ("train", "valid"))
    settings = Settings(
        method="full",
        packing=True,
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        iters=args.steps,
        optimizer_config={"betas": [0.9, 0.95]},
        learning_rate=args.learning_rate,
        final_learning_rate=0.02 * args.learning_rate,
        schedule="linear",
        warmup=max(1, args.steps // 30),
        weight_decay=0.1,
        dtype=args.dtype,
        seed=args.seed,
        val_batches=-1,
        eval_every=args.steps,
        report_every=max(1, args.steps // 10),
    )
    lines = ["| | loss on validation, nats a token |", "|---|---|"]
    for name, change in VARIANTS.items():
        model = models.new(args.config, args.seed)
        if change is not None:
            change(model)
        result = train_model(model, training, settings, valid=valid, observers=[mqar.reporter(name)])
        lines.append(f"| {name} | {result.best_loss:.4f} |")
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps({"variant": name, "loss": result.best_loss, "steps": result.steps}) + "\n")
    print("\n".join(lines))


def cut(samples: Sequence[Sample], length: int) -> list[Sample]:
    """The samples' first ``length`` inputs and targets."""
    return [each.part(0, length) for each in samples]


if __name__ == "__main__":
    main()
