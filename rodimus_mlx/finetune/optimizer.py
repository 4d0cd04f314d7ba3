"""Optimizers and learning-rate schedules: MLX's, chosen by the settings."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx_lm.tuner.utils import build_schedule

from ..errors import RodimusError
from .settings import Settings


def build_optimizer(settings: Settings, iters: int) -> optim.Optimizer:
    """The optimizer; its update is a pure function of its state, the parameters and the gradients.

    Weight decay takes matrices alone, as the official code has it: no bias, norm, residual weight or embedding.
    Muon takes the blocks' matrices, AdamW the rest.

    Raises:
        RodimusError: the config file's options do not fit the optimizer.
    """
    rate = learning_rate(settings, iters)
    options = dict(settings.optimizer_config)
    try:
        if settings.optimizer == "muon":
            decay = {"weight_decay": settings.weight_decay}
            adam: dict[str, Any] = {key: options.pop(key) for key in ("betas", "eps") if key in options}
            muon = optim.Muon(rate, **{**decay, **options})
            return optim.MultiOptimizer([muon, _adamw(rate, 0.0, adam)], [_in_block])
        if settings.optimizer == "adamw":
            if settings.weight_decay == 0:
                return _adamw(rate, 0.0, options)
            decayed, plain = _adamw(rate, settings.weight_decay, options), _adamw(rate, 0.0, options)
            return optim.MultiOptimizer([decayed, plain], [_decays])
        if settings.optimizer == "adam":
            return optim.Adam(rate, **{"bias_correction": True, **options})
        if settings.optimizer == "sgd":
            return optim.SGD(rate, weight_decay=settings.weight_decay, **options)
        return optim.Adafactor(rate, **{"relative_step": False, "scale_parameter": False, **options})
    except (TypeError, ValueError) as error:
        raise RodimusError(f"optimizer_config does not fit {settings.optimizer}: {error}") from error


def learning_rate(settings: Settings, iters: int) -> Any:
    """A number, or a function of the step (mlx-lm's `build_schedule`)."""
    if settings.lr_schedule is not None:
        try:
            return build_schedule(dict(settings.lr_schedule))
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise RodimusError(f"lr_schedule is not one of mlx-lm's: {error!r}") from error
    peak, warmup = settings.learning_rate, settings.warmup
    last = settings.final_learning_rate
    steps = max(1, iters - warmup)
    shapes = {
        "constant": ("linear_schedule", [peak, peak, steps]),
        "linear": ("linear_schedule", [peak, last, steps]),
        "cosine": ("cosine_decay", [peak, steps, last]),
    }
    if settings.schedule == "constant" and not warmup:
        return peak
    name, arguments = shapes[settings.schedule]
    # From above zero: a first step at rate 0 would be one for nothing.
    start = {"warmup": warmup, "warmup_init": peak / (warmup + 1)} if warmup else {}
    return build_schedule({"name": name, "arguments": arguments, **start})


def _adamw(rate: Any, weight_decay: float, options: dict[str, Any]) -> optim.AdamW:
    return optim.AdamW(rate, **{"bias_correction": True, "weight_decay": weight_decay, **options})


def _decays(name: str, parameter: mx.array) -> bool:
    return parameter.ndim >= 2 and "embeddings." not in name and "initial_state" not in name


def _in_block(name: str, parameter: mx.array) -> bool:
    return ".layers." in name and parameter.ndim == 2 and "conv." not in name
