"""Compiled forms of parts of a block, for decoding: the GPU waits for the host there, and compiled graphs are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .kernels.backend import active_backend


class CompiledParts:
    """Holds the compiled functions of one module, apart from its parameters; copies of the module make their own."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, str], Callable[..., Any]] = {}

    def part(
        self, owner: nn.Module, function: Callable[..., Any], modules: list[nn.Module], length: int
    ) -> Callable[..., Any]:
        """`function`, a method of `owner` that reads the parameters of `modules`, compiled where that pays.

        That is for one token in evaluation on a GPU: prompts come in too many lengths to trace each.
        """
        backend = active_backend()
        if length != 1 or owner.training or backend is None:
            return function
        key = (function.__name__, backend)
        if key not in self._made:
            self._made[key] = mx.compile(function, inputs=modules)
        return self._made[key]

    def __deepcopy__(self, memo: dict) -> CompiledParts:
        return CompiledParts()
