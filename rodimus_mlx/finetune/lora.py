"""mlx-lm's LoRA layer with less traffic through memory in training: the same function of the same parameters.

Written as linear(x) + scale * ((x a) b), it makes three more arrays as large as its output, forward and backward, and
one as large as its input. Here the scale meets the narrow x a, and the products make the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear


def make_lean(model: nn.Module) -> None:
    """Let the model's LoRA layers, whose base layers are frozen, train this way."""
    for module in model.modules():
        if type(module) is LoRALinear:
            module.__class__ = LeanLoRALinear


class LeanLoRALinear(LoRALinear):
    """[..., in] -> [..., out]."""

    def __call__(self, x: mx.array) -> mx.array:
        lean = self.training and self.lora_a.dtype == x.dtype and self.dropout(x) is x  # which it is without dropout
        if not lean:
            return super().__call__(x)
        return _adapted(self.linear, self.scale)(x, self.lora_a, self.lora_b)[0]


def _adapted(linear: nn.Module, scale: float) -> Callable[..., tuple[mx.array, mx.array]]:
    """(x [..., in], a [in, r], b [r, out]) -> linear(x) + scale x a b, and scale x a, which the gradient needs."""

    @mx.custom_function
    def function(x: mx.array, a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
        narrow = scale * (x @ a)
        return mx.addmm(linear(x), narrow, b), narrow

    @function.vjp
    def gradient(primals: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]) -> Any:
        x, a, b = primals
        cotangent, narrow = cotangents[0], outputs[1]
        of_narrow = scale * (cotangent @ b.T)
        of_x = mx.vjp(linear, [x], [cotangent])[1][0]
        return mx.addmm(of_x, of_narrow, a.T), _rows(x).T @ _rows(of_narrow), _rows(narrow).T @ _rows(cotangent)

    run: Any = function
    return run


def _rows(x: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1])
