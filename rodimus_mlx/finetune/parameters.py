"""What is trained, as a flat dict name -> array that lives outside the model and is lent to it while it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

Parameters = dict[str, mx.array]


def named(tree: Any) -> Parameters:
    """A tree's arrays by their paths."""
    return cast(Parameters, dict(tree_flatten(tree)))


def count(parameters: Parameters) -> int:
    """How many numbers they are."""
    return sum(p.size for p in parameters.values())


def nested(parameters: Parameters) -> Any:
    """The tree of modules that the names spell."""
    return tree_unflatten(list(parameters.items()))


def read(file: Path) -> Parameters:
    """A safetensors file's arrays."""
    return cast(Parameters, mx.load(str(file)))


@contextmanager
def lent(module: nn.Module, tree: Any) -> Iterator[None]:
    """The module with these parameters; afterwards without, so that it keeps no copy of them alive."""
    module.update(tree)
    try:
        yield
    finally:
        take(module, tree)


def take(module: nn.Module, tree: Any) -> None:
    """Leave an empty array in the module for each of these parameters."""
    module.update(tree_map(lambda _: mx.zeros(0), tree))
