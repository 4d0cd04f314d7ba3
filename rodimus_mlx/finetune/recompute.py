"""Gradient checkpointing: a layer keeps its input and computes everything else again in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..cache import attention_cache
from .parameters import lent
from .segments import close_layer, open_layer


@contextmanager
def recomputed_layers(model: Any) -> Iterator[None]:
    """Within it each block computes again in the backward pass what it needs there; results are the same."""
    blocks = [type(layer) for layer in model.layers]
    for layer, block in zip(model.layers, blocks):
        layer.__class__ = _recomputed(block)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for layer, block in zip(model.layers, blocks):
            layer.__class__ = block


@functools.cache
def _recomputed(block: type[nn.Module]) -> type[nn.Module]:
    class Recomputed(block):  # type: ignore[valid-type, misc]
        def __call__(self, h: mx.array, delta: mx.array | None, masks: Any, cache: Any = None) -> Any:
            # A cache is opened anew each time: the second pass must not move on what the first one did.
            window = attention_cache(cache)
            size, offset = (window.window, window.offset) if window is not None else (None, mx.array(0))

            def run(parameters: Any, h: mx.array, delta: mx.array | None, arrays: tuple | None) -> Any:
                own = None if arrays is None else open_layer(size, offset, arrays)
                with lent(self, parameters):
                    result = block.__call__(self, h, delta, masks, own)
                return result, None if own is None else close_layer(own)

            arrays = None if cache is None else close_layer(cache)
            result, arrays = mx.checkpoint(run)(self.trainable_parameters(), h, delta, arrays)
            if cache is not None:
                _put_back(cache, arrays)
            return result

    return Recomputed


def _put_back(cache: Any, arrays: tuple) -> None:
    mixer, window = (cache[0], cache[1]) if len(arrays) > 2 else (cache, None)
    mixer[0], mixer[1] = arrays[:2]
    if window is not None:
        window.keys, window.values = arrays[2:]
