"""Kernels run by Metal where there is one, else by the emulator."""

import os
from collections.abc import Iterator

import mlx.core as mx
import pytest

from .emulator import Captured, metal_on_cpu

# Plain float32 matrix products, to which kernels are compared, must be float32's; read by MLX at its first product.
os.environ.setdefault("MLX_ENABLE_TF32", "0")


@pytest.fixture
def metal() -> Iterator[list[Captured] | None]:
    """In a test with it, kernels called for Metal run; what the emulator was given, or None where Metal itself runs."""
    mx.random.seed(0)
    if not mx.metal.is_available():
        with metal_on_cpu() as launches:
            yield launches
        return
    before = mx.default_device()
    mx.set_default_device(mx.gpu)
    try:
        yield None
    finally:
        mx.set_default_device(before)
