"""A decode step launches little: counted on the graph that a GPU would get.

Traced without a GPU: for the CPU MLX's fast operations fall apart, so one opaque operation stands in for each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from rodimus_mlx.bench.launches import operations, step_launches
from rodimus_mlx.bench.models import SHAPES, random_model
from rodimus_mlx.kernels.backend import use_backend

A_LAYER = {"1.6b": 19, "1.4b": 8}  # Rodimus+ has three sublayers, Rodimus one
AROUND = {None: 4, 4: 6}  # a row of the embedding, to float32, the last norm, the head; by bits
WINDOW = 64


def small(shape: str, layers: int, bits: int | None):
    """A released architecture with everything that decides over launches, but small."""
    config = SHAPES[shape] | {"d_model": 128, "n_layer": layers, "vocab_size": 128}
    if "attn_cfg" in config:
        config["attn_cfg"] = config["attn_cfg"] | {"num_heads": 2, "num_heads_v": 2, "window_size": WINDOW}
    return random_model(config, bits)


def launches(model, context: int) -> Counter[str]:
    """What a GPU launches for the token after `context` others."""
    cache = make_prompt_cache(model)
    with use_backend("plain"):
        for length in (context - 1, 1):  # the first single token after a prompt may still rearrange the cache
            mx.eval(model(mx.zeros((1, length), mx.int32), cache=cache), [layer.state for layer in cache])
    found = []

    def trace(token: mx.array) -> list[mx.array]:
        found.append(step_launches(model, token, cache))
        return []

    with use_backend("metal"), whole_fast_operations():
        mx.export_function(lambda _: None, trace, mx.zeros((1, 1), mx.int32))
    return found[0]


@contextmanager
def whole_fast_operations() -> Iterator[None]:
    """Within it, and while a function is exported, a fast operation is one in the graph, as it is on a GPU."""

    def dequantize(w: mx.array, scales: mx.array, *_, group_size: int, **__) -> mx.array:
        return opaque((*scales.shape[:-1], scales.shape[-1] * group_size), scales.dtype, w, scales)

    with (
        patch.object(mx.fast, "rope", lambda x, *_, **__: opaque(x.shape, x.dtype, x)),
        patch.object(mx.fast, "rms_norm", lambda x, *_, **__: opaque(x.shape, x.dtype, x)),
        patch.object(mx.fast, "scaled_dot_product_attention", lambda q, k, v, **_: opaque(q.shape, q.dtype, q, k, v)),
        patch.object(mx, "dequantize", dequantize),
    ):
        yield


def opaque(shape: tuple[int, ...], dtype: mx.Dtype, *inputs: mx.array) -> mx.array:
    """An array that one operation makes of the inputs."""
    kernel = mx.fast.metal_kernel(
        name="stand_in",
        input_names=[f"x{i}" for i in range(len(inputs))],
        output_names=["y"],
        source="y[0] = x0[0];",
        ensure_row_contiguous=False,
    )
    one = (1, 1, 1)
    return kernel(inputs=list(inputs), grid=one, threadgroup=one, output_shapes=[shape], output_dtypes=[dtype])[0]


@pytest.mark.parametrize("context", [20, 70], ids=["inside the window", "beyond it"])
@pytest.mark.parametrize("bits", [None, 4], ids=["bf16", "4 bit"])
@pytest.mark.parametrize("shape", A_LAYER)
def test_decode_step(shape, bits, context):
    few, more = (launches(small(shape, layers, bits), context) for layers in (2, 4))
    a_layer = {name: (more[name] - few[name]) / 2 for name in more if more[name] != few[name]}
    assert sum(a_layer.values()) <= A_LAYER[shape], a_layer
    assert few.total() - 2 * sum(a_layer.values()) <= AROUND[bits], few


def test_views_are_no_operations():
    x = mx.zeros((4, 6))
    mx.eval(x)
    y = mx.broadcast_to(x[:, :3].T.reshape(3, 2, 2)[None], (5, 3, 2, 2))
    assert operations(mx.exp(y)) == {"Exp": 1}


def test_a_slice_at_a_place_to_be_read_is_two_launches():
    x = mx.zeros((4, 6))
    start = mx.array([1])
    mx.eval(x, start)
    assert operations(mx.slice_update(x, x[:1], start, axes=(0,))) == {"DynamicSliceUpdate": 2}


def test_an_operation_that_serves_twice_counts_once():
    x = mx.zeros((4,))
    mx.eval(x)
    y, z = mx.divmod(x, 2)
    assert operations(y * y, y + z).total() == 3


def test_a_compiled_function_is_one_operation():
    x = mx.zeros((4,))
    mx.eval(x)
    assert operations(mx.compile(lambda x: mx.exp(x) * x + 1)(x)).total() == 1
