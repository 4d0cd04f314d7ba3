"""Copies of a cache. They share its arrays, so they cost nothing until one of the two is moved on.

A recurrent cache cannot be trimmed: whoever may want to go back keeps a snapshot from before.
"""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

Cache = list[Any]  # of a model: one mlx-lm cache a layer


def snapshot(cache: Cache) -> Cache:
    """A cache that stays as it is while the given one is moved on, and the other way round."""
    return [_copy(layer) for layer in cache]


def _copy(layer: Any) -> Any:
    if isinstance(layer, CacheList):
        return CacheList(*map(_copy, layer.caches))
    twin = copy.copy(layer)
    if isinstance(layer, ArraysCache):
        twin.cache = list(layer.cache)
    else:
        # MLX assigns slices in place for every holder of the same Python object: each cache needs its own.
        twin.keys, twin.values = copy.copy(layer.keys), copy.copy(layer.values)
    return twin


def compact(cache: Cache) -> Cache:
    """A snapshot without the rows that no later token can see: of the same size however the text was cut and long."""
    return [_compact(layer) for layer in snapshot(cache)]


def _compact(layer: Any) -> Any:
    if isinstance(layer, CacheList):
        return CacheList(*map(_compact, layer.caches))
    if isinstance(layer, (RotatingKVCache, KVCache)) and layer.keys is not None:
        # extract() would do, but exists for batches only
        keep = layer.size()
        if isinstance(layer, RotatingKVCache):
            keys, values = layer._temporal_order(layer.keys), layer._temporal_order(layer.values)
            layer._idx = keep
        else:
            keys, values = layer.keys_and_values()
        layer.keys, layer.values = (mx.contiguous(x[..., x.shape[2] - keep :, :]) for x in (keys, values))
    return layer


def cache_bytes(cache: Cache) -> int:
    """Bytes of a cache's arrays."""
    return sum(layer.nbytes for layer in cache)


def evaluate(cache: Cache) -> None:
    """Compute a cache's arrays now."""
    mx.eval([layer.state for layer in cache])
