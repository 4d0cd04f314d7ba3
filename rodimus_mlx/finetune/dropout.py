"""Dropout whose masks follow from the training step alone: a resumed run draws what the uninterrupted one did.

It also gives a layer that is computed twice (`recompute`) the same mask both times, which MLX's own does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten


class Keys:
    """The random key of the step that is running."""

    def __init__(self) -> None:
        self.step: mx.array | None = None


class KeyedDropout(nn.Module):
    """Zeros features with probability p and scales the rest by 1 / (1 - p), by the key of the step and its number."""

    def __init__(self, p: float, number: int, keys: Keys):
        super().__init__()
        self._keep, self._number, self._keys = 1 - p, number, keys

    def __call__(self, x: mx.array) -> mx.array:
        """Any shape to the same."""
        if not self.training:
            return x
        if self._keys.step is None:
            raise RuntimeError("dropout runs inside a training step, which gives it a key")
        own = self._keys.step + mx.array([0, self._number], mx.uint32)
        return mx.where(mx.random.bernoulli(self._keep, x.shape, key=own), x * (1 / self._keep), 0).astype(x.dtype)


@contextmanager
def keyed_dropouts(model: nn.Module, p: float) -> Iterator[Keys]:
    """Within it a `KeyedDropout` of probability p stands for each of the model's; gives what to set before a step."""
    keys = Keys()
    own = [(name, module) for name, module in model.named_modules() if p > 0 and type(module) is nn.Dropout]
    model.update_modules(tree_unflatten([(name, KeyedDropout(p, i, keys)) for i, (name, _) in enumerate(own)]))
    try:
        yield keys
    finally:
        model.update_modules(tree_unflatten(own))
