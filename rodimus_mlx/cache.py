"""What a layer remembers, on mlx-lm's own cache classes, so that its prompt-cache files, batches and server work.

A mixer keeps an `ArraysCache` of two: the convolution's last inputs [B, d_conv - 1, D] and the state [B, n, D] in
float32. An attention keeps the last W // 2 + 1 tokens in a `RotatingKVCache`, or without window all in a `KVCache`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from .config import RodimusConfig
from .kernels.backend import active_backend


def make_cache(config: RodimusConfig) -> list[Any]:
    """An empty cache for each layer: ArraysCache for Rodimus, CacheList(ArraysCache, attention's) for Rodimus+."""
    return [_layer_cache(config) for _ in range(config.n_layer)]


def _layer_cache(config: RodimusConfig) -> Any:
    mixer = ArraysCache(2)
    if not config.has_attention:
        return mixer
    window = config.window_keys
    return CacheList(mixer, KVCache() if window is None else RotatingKVCache(max_size=window))


def mixer_cache(layer: Any) -> Any:
    """The mixer's part of a layer's cache."""
    return layer[0] if isinstance(layer, CacheList) else layer


def recall(layer: Any) -> tuple[mx.array | None, mx.array | None, mx.array | None]:
    """What a layer's mixer goes on from: tail and state, None at the start, and lengths, None without right padding."""
    if layer is None:
        return None, None, None
    cache = mixer_cache(layer)
    return cache[0], cache[1], cache.lengths


def remember(layer: Any, memory: Sequence[mx.array], length: int) -> None:
    """Keep the mixer's next tail and state, and move its cache on by `length` tokens."""
    if layer is not None:
        cache = mixer_cache(layer)
        cache[0], cache[1] = memory
        cache.advance(length)


def attention_cache(layer: Any) -> Any:
    """The attention's part of a layer's cache; None for a layer without attention, or without a cache."""
    return layer[1] if isinstance(layer, CacheList) else None


def update(cache: Any, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
    """`cache.update_and_fetch`, after which a rotating cache holds no more than its window.

    Stock, it keeps a whole prompt's keys and values until the next token; what it would cut then is cut now.
    """
    keys, values = cache.update_and_fetch(keys, values)
    if isinstance(cache, RotatingKVCache) and keys.shape[2] > cache.max_size:
        cache.keys, cache.values = (mx.contiguous(x[..., -cache.max_size :, :]) for x in (keys, values))
        cache._idx = cache.max_size
    return keys, values


def ordered(cache: RotatingKVCache) -> tuple[mx.array, ...]:
    """A rotating cache's keys and values from the oldest on, [B, 1, S, heads * head] each; of an empty one, nothing."""
    return () if cache.keys is None else tuple(cache._temporal_order(x) for x in (cache.keys, cache.values))


def keep_last(cache: RotatingKVCache, keys: mx.array, values: mx.array, end: int, count: int) -> None:
    """Move a rotating cache on by `count` tokens, to the window of keys and values that ends before row `end`."""
    begin = max(0, end - cache.max_size)
    cache.keys, cache.values = (mx.contiguous(x[..., begin:end, :]) for x in (keys, values))
    cache._idx = end - begin
    cache.offset += count


def steady(cache: list[Any]) -> bool:
    """Whether one more token changes no array's shape and needs no mask: states exist, windows are full."""
    if active_backend() is None:
        return False
    for layer in cache:
        mixer, attention = mixer_cache(layer), attention_cache(layer)
        if mixer[1] is None or mixer.lengths is not None or mixer.left_padding is not None:
            return False
        if attention is not None and (
            type(attention) is not RotatingKVCache
            or attention.keys is None
            or not attention.keys.shape[2] == attention.max_size <= attention.offset
        ):
            return False
    return True


def place(cache: list[Any]) -> tuple[mx.array, mx.array]:
    """For a steady cache: the next token's place in the text, and its index in the windows, rings, as [1, 1, 1, 1]."""
    attention = attention_cache(cache[0])
    if attention is None:
        return mx.array(0), mx.array([[[[0]]]])
    return mx.array(attention.offset), mx.array([[[[attention._idx % attention.max_size]]]])


def arrays_of(cache: list[Any]) -> list[mx.array]:
    """All arrays of a steady cache, layer by layer: tail, state, and where there is attention keys and values."""
    arrays = []
    for layer in cache:
        arrays += mixer_cache(layer).cache
        if (attention := attention_cache(layer)) is not None:
            arrays += [attention.keys, attention.values]
    return arrays


def put_back(cache: list[Any], arrays: list[mx.array]) -> None:
    """Keep what one more token made of `arrays_of` a steady cache, and move the cache on."""
    new = iter(arrays)
    for layer in cache:
        mixer, attention = mixer_cache(layer), attention_cache(layer)
        mixer[0], mixer[1] = next(new), next(new)
        if attention is not None:
            attention.keys, attention.values = next(new), next(new)
            attention._idx = attention._idx % attention.max_size + 1
            attention.offset += 1
