"""Slices of an array whose gradients are put together piece by piece.

MLX's gradient of a slice is an array as large as the whole, zero elsewhere; those of several slices are then added up.
Training would spend more time on that than on the kernels between.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx


def windows(x: mx.array, bounds: Sequence[tuple[int, int]], axis: int, differentiable: bool = True) -> list[mx.array]:
    """x[..., begin:end, ...] for each of the bounds along an axis; they may overlap, and leave gaps.

    The gradient is the sum of the slices' gradients at each place, made in one piece; `differentiable` False saves the
    host that arrangement.
    """
    axis %= x.ndim
    if not differentiable:
        return [_slice(x, begin, end, axis) for begin, end in bounds]
    size = x.shape[axis]

    @mx.custom_function
    def cut(x: mx.array) -> list[mx.array]:
        return [_slice(x, begin, end, axis) for begin, end in bounds]

    @cut.vjp
    def gradient(x: mx.array, cotangents: Any, _: Any) -> mx.array:
        pieces = []
        for begin, end in pairwise(sorted({0, size, *(edge for each in bounds for edge in each)})):
            parts = [
                _slice(cotangent, begin - first, end - first, axis)
                for (first, last), cotangent in zip(bounds, cotangents)
                if first <= begin and end <= last
            ]
            pieces.append(sum(parts[1:], parts[0]) if parts else mx.zeros_like(_slice(x, begin, end, axis)))
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis)

    run: Any = cut
    return run(x)


def split(x: mx.array, at: int, axis: int = -1, differentiable: bool = True) -> tuple[mx.array, mx.array]:
    """The first `at` along an axis, and the rest; two of `windows`."""
    first, second = windows(x, [(0, at), (at, x.shape[axis])], axis, differentiable)
    return first, second


def _slice(x: mx.array, begin: int, end: int, axis: int) -> mx.array:
    if (begin, end) == (0, x.shape[axis]):
        return x
    return x[(slice(None),) * axis + (slice(begin, end),)]
