"""Compiled forms of parts of a block: where a GPU waits for the host, as in decoding, it saves building the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .kernels.backend import active_backend

PROMPT_STEP = 256  # steps of long prompts are multiples of this: 512, 2048 ...


class CompiledParts:
    """Holds the compiled functions of one module, apart from its parameters; copies of the module make their own."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, str], Callable[..., Any]] = {}

    def part(
        self, owner: nn.Module, function: Callable[..., Any], modules: list[nn.Module], length: int
    ) -> Callable[..., Any]:
        """`function`, a method of `owner` that reads the parameters of `modules`, compiled where that pays.

        That is in evaluation on a GPU for one token, and for the steps that long prompts are cut into; other lengths
        are too many to trace each.
        """
        backend = active_backend()
        if owner.training or backend is None or (length != 1 and length % PROMPT_STEP):
            return function
        key = (function.__name__, backend)
        if key not in self._made:
            self._made[key] = mx.compile(function, inputs=modules)
        return self._made[key]

    def __deepcopy__(self, memo: dict) -> CompiledParts:
        return CompiledParts()
