"""Which implementation runs: our kernels through Metal or CUDA, or plain MLX.

Automatic: kernels on a GPU, plain MLX on the CPU. The environment variable RODIMUS_BACKEND (metal, cuda or plain)
forces one, for comparisons; a forced backend that this machine lacks fails at its first kernel, never in silence.
"""

from __future__ import annotations

import os

import mlx.core as mx

from ..errors import RodimusError
from .launch import Backend

VARIABLE = "RODIMUS_BACKEND"


def active_backend() -> Backend | None:
    """The kernels' backend on the default device; None for plain MLX.

    Raises:
        RodimusError: on an unknown name in the environment variable.
    """
    wish = os.environ.get(VARIABLE)
    if wish == "metal":
        return "metal"
    if wish == "cuda":
        return "cuda"
    if wish and wish not in ("plain", "auto"):
        raise RodimusError(f"{VARIABLE}={wish}: choose metal, cuda, plain or auto")
    if wish == "plain" or mx.default_device() != mx.gpu:
        return None
    return "metal" if mx.metal.is_available() else "cuda"
