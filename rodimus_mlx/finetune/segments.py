"""What a segment of a long sequence hands on to the next: the model's cache as plain arrays.

The memory is a tree of arrays, so that it goes in and out of compiled functions; gradients end where it is handed on.
    offset: tokens seen so far, a scalar; it turns the keys (RoPE)
    layers: for each layer, what its cache holds: (tail, state) of the mixer, and (keys, values) of the attention
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList

from ..cache import attention_cache, mixer_cache
from ..config import RodimusConfig

Memory = dict[str, Any]


class WindowCache:
    """The attention's last keys and values, joined and cut without writing in place, so that calls can be traced."""

    def __init__(self, window: int | None, offset: mx.array, keys: mx.array | None, values: mx.array | None):
        self.window, self.offset, self.keys, self.values = window, offset, keys, values

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Join [B, heads, T, head] to what is kept, and keep what the next token will see."""
        if self.keys is not None and self.values is not None:
            keys = mx.concatenate([self.keys, keys], axis=2)
            values = mx.concatenate([self.values, values], axis=2)
        total = keys.shape[2]
        first = 0 if self.window is None else max(0, total - self.window + 1)
        self.keys, self.values = keys[:, :, first:], values[:, :, first:]
        return keys, values

    def make_mask(self, *_: Any, **__: Any) -> None:
        """For a segment of one token: it sees all that is kept."""
        return None


def empty_memory(config: RodimusConfig) -> Memory:
    """The memory before the first token."""
    nothing = (None, None, None, None) if config.has_attention else (None, None)
    return {"offset": mx.array(0), "layers": [nothing] * config.n_layer}


def open_memory(config: RodimusConfig, memory: Memory) -> list[Any]:
    """The caches of all layers; the model moves them on."""
    return [open_layer(config.window_keys, memory["offset"], arrays) for arrays in memory["layers"]]


def close_memory(memory: Memory, caches: list[Any], length: int) -> Memory:
    """The memory after ``length`` more tokens."""
    return {"offset": memory["offset"] + length, "layers": [close_layer(cache) for cache in caches]}


def open_layer(window: int | None, offset: mx.array, arrays: tuple) -> Any:
    """A layer's cache from its arrays."""
    mixer = ArraysCache(2)
    mixer.cache = list(arrays[:2])
    return CacheList(mixer, WindowCache(window, offset, *arrays[2:])) if len(arrays) > 2 else mixer


def close_layer(cache: Any) -> tuple:
    """A layer's arrays from its cache."""
    mixer, attention = mixer_cache(cache), attention_cache(cache)
    own = (mixer[0], mixer[1])
    return own if attention is None else (*own, attention.keys, attention.values)
