"""LoRA training of a released shape, then of a peer in mlx-lm, in one run: tokens/s and peak memory.

    python tests/bench_finetune.py [--tokens 4096] [--grad-checkpoint] [--segment 4096] [--bits 4] [--memory-limit 6]

Random weights, rank 8 on every linear layer of every block, rows of --tokens tokens, one in a step. Ours runs by our
trainer, the peer by mlx-lm's. The first steps compile and are not counted; of the others the median is printed, and in
brackets the slowest and the fastest. The peer gets --tokens and --grad-checkpoint, which mlx-lm has as well.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx_lm.tuner import trainer as stock
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.utils import linear_to_lora_layers

from rodimus_mlx.bench.models import PEERS, SHAPES, random_model
from rodimus_mlx.finetune.data import sample
from rodimus_mlx.finetune.settings import Settings
from rodimus_mlx.finetune.trainer import train

RANK, SCALE = 8, 20.0
WARM_UP = 2  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.6b")
    parser.add_argument("--peer", choices=[*PEERS, "none"], default="qwen2.5-1.5b")
    parser.add_argument("--layers", type=int, help="of each model, fewer than it has")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--grad-checkpoint", action="store_true")
    parser.add_argument("--segment", type=int, default=0, help="of our rows, in tokens")
    parser.add_argument("--bits", type=int, help="of our frozen weights")
    parser.add_argument("--memory-limit", type=float, default=0.0, help="of ours, in GB")
    given = parser.parse_args()

    model = random_model(shortened(SHAPES[given.shape], "n_layer", given.layers), given.bits)
    ours = report(f"{given.shape}, rodimus-mlx", *our_run(model, given))
    del model
    gc.collect()
    mx.clear_cache()
    if given.peer == "none":
        return
    peer = random_model(shortened(PEERS[given.peer], "num_hidden_layers", given.layers))
    theirs = report(f"{given.peer}, mlx-lm", *stock_run(peer, given))
    print(f"ours / theirs: {ours[0] / theirs[0]:.2f} of the tokens/s, {ours[1] / theirs[1]:.2f} of the memory")


def shortened(config: dict[str, Any], key: str, layers: int | None) -> dict[str, Any]:
    return config if layers is None else {**config, key: layers}


def rows(vocab_size: int, given: argparse.Namespace) -> np.ndarray:
    """Random tokens, one more a row than are learned."""
    return np.random.default_rng(0).integers(0, vocab_size, (given.steps, given.tokens + 1)).astype(np.int32)


def our_run(model: Any, given: argparse.Namespace) -> tuple[list[float], int]:
    """Tokens/s of each step, and bytes at the peak."""
    settings = Settings(
        rank=RANK,
        scale=SCALE,
        iters=given.steps,
        batch_size=1,
        seq_len=given.tokens + 1,
        segment=given.segment,
        grad_checkpoint=given.grad_checkpoint,
        memory_limit=given.memory_limit,
        report_every=1,
    )
    rates: list[float] = []

    def observe(event: dict[str, Any]) -> None:
        if event["event"] == "report":
            rates.append(event["tokens_per_second"])

    train(model, [sample(row) for row in rows(model.args.vocab_size, given)], settings, observers=[observe])
    return rates, mx.get_peak_memory()


def stock_run(model: Any, given: argparse.Namespace) -> tuple[list[float], int]:
    """The same by mlx-lm."""
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": RANK, "scale": SCALE, "dropout": 0.0})
    lengths, rates = mx.array([[0, given.tokens]]), Rates()
    tokens = rows(model.args.vocab_size, given)

    def batches(**_: Any) -> Iterator[tuple[mx.array, mx.array]]:
        for row in tokens:
            yield mx.array(row)[None], lengths

    mx.reset_peak_memory()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        options = stock.TrainingArgs(
            batch_size=1,
            iters=given.steps,
            steps_per_report=1,
            steps_per_save=given.steps + 1,
            max_seq_length=given.tokens + 1,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
            grad_checkpoint=given.grad_checkpoint,
        )
        optimizer = optim.AdamW(1e-5)
        stock.train(model, optimizer, tokens, None, options, iterate_batches=batches, training_callback=rates)
    return rates.found, mx.get_peak_memory()


class Rates(TrainingCallback):
    """Collects the tokens/s that mlx-lm reports."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self.found.append(train_info["tokens_per_second"])


def report(name: str, rates: list[float], peak: int) -> tuple[float, int]:
    """Print a line; returns the median and the peak."""
    counted = rates[WARM_UP:] or rates
    median = statistics.median(counted)
    spread = f"{min(counted):,.0f} to {max(counted):,.0f}"
    print(f"{name}: {median:,.0f} tokens/s ({spread}), peak {peak / 2**30:.2f} GiB", flush=True)
    return median, peak


if __name__ == "__main__":
    main()
