"""What a run will be and need, said before it starts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..convert.mapping import count_parameters
from ..errors import RodimusError
from .batches import Plan
from .memory import advice, available, predict_peak
from .parameters import Parameters, count
from .settings import Settings


def outlook(model: Any, parameters: Parameters, plan: Plan, settings: Settings, dtype: mx.Dtype) -> dict[str, Any]:
    """Sizes of the model, the data, an epoch and a step, and the predicted peak memory."""
    trainable = count(parameters)
    limit = available(settings.memory_limit)
    longest = plan.longest_row
    return {
        "method": settings.method,
        "trainable": trainable,
        "parameters": count_parameters(model.args),
        "dtype": str(dtype).removeprefix("mlx.core."),
        "samples": len(plan.samples),
        "longest": max(each.length for each in plan.samples),
        "rows": len(plan.rows),
        "packed": settings.packing,
        "tokens_in_epoch": int(plan.lengths.sum()),
        "steps_in_epoch": plan.batches_in_epoch / settings.grad_accumulation,
        "rows_in_step": plan.rows_in_batch * settings.grad_accumulation,
        "peak_memory": predict_peak(model, trainable, settings, dtype, longest),
        "available_memory": limit,
        "advice": advice(model, trainable, settings, dtype, longest, limit),
    }


def refuse_small_disk(out: Path, checkpoint_bytes: int) -> None:
    """Raise where the disk will not hold two checkpoints: the new one is complete before the old one goes."""
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < 2 * checkpoint_bytes:
        raise RodimusError(f"{out}: checkpoints need {2 * checkpoint_bytes:,} bytes, {free:,} are free on its disk")
