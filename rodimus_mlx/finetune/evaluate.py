"""The mean loss over data that is not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx

from ..config import RodimusConfig
from .batches import Batch, cut
from .parameters import Parameters
from .segments import empty_memory
from .step import on_device, pieces


def evaluate(
    loss_of: Callable[..., Any],
    parameters: Parameters,
    batches: Iterable[Batch],
    config: RodimusConfig,
    segment: int,
    world: Any,
) -> float:
    """Mean loss over all targets that count; each process takes its share of the rows.

    Args:
        loss_of: of `loss_function`.
        segment: tokens to take at a time, 0 for whole rows; the result is the same.
    """
    loss, learned = mx.array(0.0), mx.array(0.0)
    for batch in batches:
        share = cut(batch, rows=slice(world.rank(), None, world.size()))
        if not len(share.tokens):
            continue
        memory = empty_memory(config) if 0 < segment < share.tokens.shape[1] else None
        for piece in pieces(share, segment):
            value, memory = loss_of(parameters, on_device(piece), memory)
            loss = loss + value
            mx.eval(loss, memory)
        learned = learned + float(share.weights.sum())
    loss, learned = mx.distributed.all_sum(mx.stack([loss, learned]))
    return float(loss / learned)
