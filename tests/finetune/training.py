"""What the finetuning tests share: small runs, and gradients by a second way."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from helpers import random_model, relative_error, tiny_config

from rodimus_mlx.finetune.batches import Batch
from rodimus_mlx.finetune.data import Sample, sample
from rodimus_mlx.finetune.dropout import keyed_dropouts
from rodimus_mlx.finetune.methods import prepare
from rodimus_mlx.finetune.parameters import Parameters
from rodimus_mlx.finetune.recompute import recomputed_layers
from rodimus_mlx.finetune.segments import empty_memory
from rodimus_mlx.finetune.settings import Settings
from rodimus_mlx.finetune.step import gradient_function, on_device
from rodimus_mlx.finetune.trainer import train

KEY = mx.array([1, 2], mx.uint32)


def random_samples(count: int, vocab_size: int = 61, longest: int = 40, seed: int = 0) -> list[Sample]:
    """Samples of random tokens and lengths."""
    random = np.random.default_rng(seed)
    return [sample(random.integers(0, vocab_size, length + 1)) for length in random.integers(3, longest + 1, count)]


def small_model(block_type: str = "rodimus_plus", **changes: Any) -> Any:
    """A model with random weights, new at each call: training changes it."""
    return random_model(tiny_config(block_type, **changes))


def whole_batch(tokens: np.ndarray) -> Batch:
    """Every next token of [B, L + 1] tokens is a target."""
    tokens = tokens.astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones(tokens[:, 1:].shape, np.float32), None)


def loss_and_gradients(
    model: Any,
    batches: Sequence[Batch],
    scale: float,
    settings: Settings,
    *,
    carry: bool = False,
    dtype: mx.Dtype = mx.float32,
    key: mx.array = KEY,
) -> tuple[float, Parameters]:
    """What the trainer computes for one step; with ``carry`` the batches are segments of the same rows."""
    parameters = {name: p.astype(mx.float32) for name, p in prepare(model, settings).items()}
    random = np.random.default_rng(8)
    for name in parameters:
        if name.endswith("lora_b"):  # zeros at first, which hide what comes before them
            parameters[name] = mx.array(0.1 * random.standard_normal(parameters[name].shape), mx.float32)
    again = recomputed_layers(model) if settings.grad_checkpoint else nullcontext()
    memory = empty_memory(model.args) if carry else None
    loss, total = 0.0, None
    with keyed_dropouts(model, settings.dropout) as keys, again:
        gradient = gradient_function(model, dtype, keys)
        for batch in batches:
            value, memory, total = gradient(parameters, on_device(batch), memory, key, mx.array(scale), total)
            loss += value.item()
    assert total is not None
    return loss, total


def assert_same(actual: Parameters, expected: Parameters, tolerance: float) -> None:
    """Every gradient within a relative tolerance, by name."""
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) <= tolerance, max(errors, key=lambda name: errors[name])


def losses_of(
    model: Any, samples: list[Sample], settings: Settings, out: Path | None = None, **more: Any
) -> list[float]:
    """The loss of each step of a run."""
    losses = []
    train(
        model,
        samples,
        settings,
        out=out,
        **more,
        observers=[lambda e: losses.append(e) if e["event"] == "step" else None],
    )
    return [event["loss"] for event in losses]
