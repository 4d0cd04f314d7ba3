"""One process of test_finetune_distributed.py's data-parallel run: ``python ring_run.py BATCH_SIZE OUT``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
mx.set_default_device(mx.cpu)

from training import random_samples, small_model  # noqa: E402

from rodimus_mlx.finetune.settings import Settings  # noqa: E402
from rodimus_mlx.finetune.trainer import train  # noqa: E402


def main(batch_size: int, out: Path) -> None:
    """Train half, then go on from the checkpoint to the end; print the losses and the last weights' sum."""
    settings = {"method": "full", "batch_size": batch_size, "seq_len": 40, "learning_rate": 1e-3, "save_every": 3}
    losses: list[float] = []
    valid = []

    def note(event: dict) -> None:
        if event["event"] == "step":
            losses.append(event["loss"])
        elif event["event"] == "valid":
            valid.append(event["loss"])

    for iters, resume in ((3, False), (6, True)):
        model = small_model()
        choices = Settings(**settings, iters=iters, eval_every=3, seed=1)
        train(
            model,
            random_samples(24),
            choices,
            valid=random_samples(5, seed=1),
            out=out,
            resume=resume,
            observers=[note],
        )
    weight = model.layers[0].mixer.fc.weight
    rank = mx.distributed.init().rank()
    print(json.dumps({"rank": rank, "losses": losses, "valid": valid, "weight": mx.abs(weight).sum().item()}))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
