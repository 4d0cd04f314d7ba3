"""Launches of a decode step: the operations in its graph that a GPU starts one by one."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import mlx.core as mx

# Operations that describe memory anew, or lead to work that others count; MLX's names for them.
VIEWS = frozenset(
    {
        *("AsStrided", "Broadcast", "BroadcastAxes", "Copy", "Depends", "ExpandDims", "Flatten", "NumberOfElements"),
        *("Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View"),
    }
)
TWO_LAUNCHES = ("DynamicSlice", "DynamicSliceUpdate")  # the first works out the place
_OPERATION = re.compile(r'\[label ="([^"]+)", shape=rectangle\]')


def step_launches(model: Any, token: mx.array, cache: list[Any]) -> Counter[str]:
    """Operations of one decode step by name, views apart; evaluates nothing, but moves the cache on.

    A compiled function's fused operations, a fast operation of MLX and a custom kernel are one each. That is of a GPU:
    for the CPU, fast operations fall apart into those that they replace.

    Args:
        model: ours or mlx-lm's.
        token: [1, 1], the token to read.
        cache: an evaluated cache, so that the step's graph ends there.
    """
    logits = model(token, cache=cache)
    return operations(logits, *arrays(layer.state for layer in cache))


def operations(*outputs: mx.array) -> Counter[str]:
    """Operations that lead to arrays not evaluated yet, by MLX's names, views apart."""
    text = io.StringIO()
    mx.export_to_dot(text, *outputs)
    names = (name.rpartition("::")[2] for name in _OPERATION.findall(text.getvalue()))
    found = Counter(name for name in names if name not in VIEWS)
    for name in found.keys() & TWO_LAUNCHES:
        found[name] *= 2
    return found


def arrays(tree: Iterable[Any]) -> Iterator[mx.array]:
    """The arrays in nested lists and tuples, such as a cache's state; None and numbers are left out."""
    for each in tree:
        if isinstance(each, mx.array):
            yield each
        elif isinstance(each, (list, tuple)):
            yield from arrays(each)
