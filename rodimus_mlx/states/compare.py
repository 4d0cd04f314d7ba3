"""How far apart two states are, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..cache import attention_cache, mixer_cache
from ..errors import RodimusError
from .file import State


@dataclass(frozen=True)
class LayerDifference:
    """||a - b|| / ||b|| of one layer's recurrent state, and of the window's keys and values (None: no such part)."""

    layer: int
    state: float
    window: float | None


def compare_states(a: State, b: State) -> list[LayerDifference]:
    """The distance of a from b in every layer.

    Raises:
        RodimusError: they belong to models of different sizes.
    """
    if len(a.cache) != len(b.cache):
        raise RodimusError(f"the states have {len(a.cache)} and {len(b.cache)} layers: they belong to different models")
    return [LayerDifference(i, *_difference(x, y)) for i, (x, y) in enumerate(zip(a.cache, b.cache))]


def _difference(a: Any, b: Any) -> tuple[float, float | None]:
    states = mixer_cache(a)[1], mixer_cache(b)[1]
    windows = attention_cache(a), attention_cache(b)
    if windows[0] is None or windows[1] is None:
        return _distance(*states), None
    shared = min(windows[0].keys.shape[2], windows[1].keys.shape[2])  # the last tokens that both still see
    x, y = (mx.concatenate([w.keys[..., -shared:, :], w.values[..., -shared:, :]], axis=-1) for w in windows)
    return _distance(*states), _distance(x, y)


def _distance(a: mx.array, b: mx.array) -> float:
    if a.shape != b.shape:
        raise RodimusError(f"the states have arrays of {a.shape} and {b.shape}: they belong to different models")
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    scale = mx.linalg.norm(b.reshape(-1)).item()
    distance = mx.linalg.norm((a - b).reshape(-1)).item()
    return distance / scale if scale else distance  # type: ignore[operator, return-value]
