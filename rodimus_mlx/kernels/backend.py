"""Which implementation runs: our kernels through Metal or CUDA, or plain MLX.

Automatic: kernels on a GPU, plain MLX on the CPU. `use_backend`, or else the environment variable RODIMUS_BACKEND
(metal, cuda or plain), forces one, for comparisons; a forced backend that this machine lacks fails at its first
kernel, never in silence.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import mlx.core as mx

from ..errors import RodimusError
from .launch import Backend

VARIABLE = "RODIMUS_BACKEND"
Wish = Literal["metal", "cuda", "plain", "auto"]
_WISHES: dict[str, Wish] = {"metal": "metal", "cuda": "cuda", "plain": "plain", "auto": "auto"}
_forced: list[Wish] = []


@contextmanager
def use_backend(wish: Wish) -> Iterator[None]:
    """Within it, that implementation builds the graphs."""
    _forced.append(wish)
    try:
        yield
    finally:
        _forced.pop()


def active_backend() -> Backend | None:
    """The kernels' backend now; None for plain MLX.

    Raises:
        RodimusError: on an unknown name in the environment variable.
    """
    wish = _forced[-1] if _forced else _from_environment()
    if wish == "metal":
        return "metal"
    if wish == "cuda":
        return "cuda"
    if wish == "plain" or mx.default_device() != mx.gpu:
        return None
    return "metal" if mx.metal.is_available() else "cuda"


def _from_environment() -> Wish:
    name = os.environ.get(VARIABLE) or "auto"
    if name not in _WISHES:
        raise RodimusError(f"{VARIABLE}={name}: choose one of {', '.join(_WISHES)}")
    return _WISHES[name]
