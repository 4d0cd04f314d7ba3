"""How much memory a run will take at its peak, how much there is, and a limit to the work that MLX has in flight."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..attention import QUERY_BLOCK
from ..config import RodimusConfig
from .loss import tokens_in_part
from .parameters import named
from .settings import Settings

# Bytes kept for a block's backward pass, against the count of `_block`: on the CPU, where the layers' plain forms run,
# 2.2 was measured for both kinds of block, with and without recomputing; a GPU's kernels keep little but their inputs.
_KEPT = {mx.gpu: 1.0, mx.cpu: 2.2}
# Work in flight that a run may hold besides what a step needs: that of so many blocks, or bytes. LoRA of the 1.6B loses
# 4% of its speed by it on an H100, and a fifth of its memory. A small part of the machine's memory is held anyway.
_BLOCKS_IN_FLIGHT, _BYTES_IN_FLIGHT = 6, 10**9
_SMALL_PART = 4
_OPTIMIZER_ARRAYS = {"adamw": 2, "adam": 2, "muon": 1, "sgd": 1, "adafactor": 1}  # as large as what is trained


def predict_peak(model: Any, trainable: int, settings: Settings, dtype: mx.Dtype, longest: int) -> int:
    """Bytes at the peak of a step.

    Args:
        trainable: numbers that are trained.
        longest: positions of the longest row.
    """
    frozen = sum(p.nbytes for p in named(model.parameters()).values())
    copies = 4 * (2 + _OPTIMIZER_ARRAYS[settings.optimizer]) + dtype.size  # weights, gradients, optimizer; rounded
    row = _row(settings, longest)
    tokens = settings.batch_size * row
    logits = min(tokens, tokens_in_part(model.args.vocab_size, dtype)) * model.args.vocab_size * dtype.size
    activations = _activations(model.args, settings, dtype, settings.batch_size, row)
    return frozen + trainable * copies + activations + 3 * logits  # with their exponentials and their gradients


def usual_limit(model: Any, trainable: int, settings: Settings, dtype: mx.Dtype, longest: int) -> int:
    """Bytes for a step and some work in flight, or a quarter of what there is; arguments as of `predict_peak`."""
    block = settings.batch_size * _row(settings, longest) * _block(model.args, dtype.size)
    step = predict_peak(model, trainable, settings, dtype, longest)
    return max(step + max(_BLOCKS_IN_FLIGHT * block, _BYTES_IN_FLIGHT), available() // _SMALL_PART)


@contextmanager
def limited(most: int) -> Iterator[None]:
    """Within it MLX waits for work in flight, whose arrays it holds, rather than going above so many bytes.

    What one step needs at once is needed still: a limit below that only makes the run slow. A lower one of the caller's
    stays.
    """
    before = mx.set_memory_limit(most)
    if 0 < before < most:
        mx.set_memory_limit(before)
    try:
        yield
    finally:
        mx.set_memory_limit(before)


def available(gigabytes: float = 0.0) -> int:
    """Bytes of memory that the default device may use, or the limit of `limited`, where that is less."""
    most = _available()
    return min(most, int(1e9 * gigabytes)) if gigabytes else most


def _available() -> int:
    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if info.get(key):
            return int(info[key])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def advice(model: Any, trainable: int, settings: Settings, dtype: mx.Dtype, longest: int, limit: int) -> str | None:
    """The first change of the settings that would fit into ``limit`` bytes; None: the run fits as it is."""
    if predict_peak(model, trainable, settings, dtype, longest) <= limit:
        return None
    thrifty = replace(settings, grad_checkpoint=True)
    changes = [("--grad-checkpoint", thrifty), ("--grad-checkpoint --batch-size 1", replace(thrifty, batch_size=1))]
    if not settings.packing:
        short = replace(thrifty, batch_size=1, segment=1024)
        changes.append(("--grad-checkpoint --batch-size 1 --segment 1024", short))
    for options, changed in changes:
        if predict_peak(model, trainable, changed, dtype, longest) <= limit:
            return f"try {options}"
    return "use a smaller or a quantized model"


def _row(settings: Settings, longest: int) -> int:
    """Positions of a row that are taken together."""
    return min(longest, settings.segment) if settings.segment else longest


def _activations(c: RodimusConfig, settings: Settings, dtype: mx.Dtype, rows: int, length: int) -> int:
    """Bytes that the backward pass needs of the forward pass."""
    tokens = rows * length
    block = int(tokens * _block(c, dtype.size) * _KEPT[mx.default_device().type])
    scores = _scores(c, dtype.size, rows, length)
    if settings.grad_checkpoint:  # blocks keep their inputs; one at a time has everything, twice in its backward pass
        return tokens * c.n_layer * c.d_model * (4 + dtype.size) + 2 * block + 3 * scores
    return (c.n_layer + 1) * (block + scores)


def _block(c: RodimusConfig, size: int) -> int:
    """Bytes a token: what the gradients of a block are computed from."""
    d, inner = c.d_model, c.d_inner
    mixer = d * (4 + size) + inner * (5 * size + 8) + 4 * c.mem_size * size  # xz, u, c, y; v and o in float32
    if not c.has_attention:
        return mixer
    attention = d * (4 + 3 * size) + (2 * c.num_heads + c.num_heads_v) * c.head_dim * size
    return mixer + attention + d * 2 * size + 3 * c.d_ffn * size


def _scores(c: RodimusConfig, size: int, rows: int, length: int) -> int:
    """Bytes of one layer's attention weights, which only CUDA's attention does without in training."""
    if not c.has_attention or (mx.default_device() == mx.gpu and not mx.metal.is_available()):
        return 0
    window = length if c.window_keys is None else c.window_keys
    keys = min(length, min(QUERY_BLOCK, max(256, window)) + window)  # that a block of queries meets
    return rows * c.num_heads * length * keys * size
