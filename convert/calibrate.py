"""Quantizing by what a text shows of a model, through mlx-lm's methods. The model is in memory, unlike in `convert`.

gptq     rounds a matrix column by column, and puts each column's error into the columns to come (arXiv 2210.17323)
dynamic  gives more bits to the matrices whose rounding costs most, by the loss's gradient
dwq      trains scales and biases so that predictions come close to the original's (distilled weight quantization)
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.quant.dwq import dwq_quantize
from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold
from mlx_lm.quant.gptq import gptq_quantize
from mlx_lm.utils import compute_bits_per_weight

from rodimus_mlx.errors import RodimusError
from rodimus_mlx.evaluation.text import read_documents
from rodimus_mlx.model import Model
from rodimus_mlx.tokenizer import load_tokenizer

from .checkpoint import Checkpoint, open_checkpoint
from .convert import Summary, refuse_bad_place, write_checkpoint
from .outputs import Prepared, Wish, padded
from .schemes import MODES, Scheme, choose, to_table
from .streams import in_memory

METHODS = ("gptq", "dynamic", "dwq")
GPTQ_BITS = (2, 4, 8)


class Calibration(NamedTuple):
    """How to calibrate."""

    method: str
    samples: int = 128  # rows of text at most
    length: int = 512  # tokens in a row
    batch: int = 4  # rows at a time
    learning_rate: float = 1e-5  # of dwq
    target_bits: float | None = None  # of dynamic: bits per weight in all; None: half-way from low to high


def check_calibration(method: str, scheme: Scheme, recipe: str) -> None:
    """Refuse what a method cannot do, before the model is loaded.

    Raises:
        RodimusError: so it is, and what would do.
    """
    if method == "awq":
        raise RodimusError(
            "mlx-lm's awq does not apply to Rodimus: it runs blocks that take and give one array, and these hand on "
            f"two and a state; use one of {', '.join(METHODS)}"
        )
    if method not in METHODS:
        raise RodimusError(f"the method must be one of {', '.join(METHODS)}, not {method!r}")
    if scheme.mode != "affine":
        raise RodimusError(f"--calibrate works in mode affine, not {scheme.mode}")
    if recipe != "default":
        raise RodimusError(f"--calibrate goes with the recipe 'default', not {recipe!r}")
    if method == "gptq" and scheme.bits not in GPTQ_BITS:
        raise RodimusError(f"gptq has bits {', '.join(map(str, GPTQ_BITS))}, not {scheme.bits}")
    if scheme.bits == 8 and method != "gptq":
        raise RodimusError(f"{method} has nothing to gain at 8 bits; it takes fewer")


def convert_calibrated(
    src: str | Path, out: str | Path, scheme: Scheme, dtype: str | None, data: str | Path, how: Calibration
) -> Summary:
    """`convert`, with a method that looks at the text in the file ``data``.

    Raises:
        RodimusError: as `convert` does; the text is too short, or the method does not fit.
    """
    check_calibration(how.method, scheme, "default")
    refuse_bad_place(src, out)
    checkpoint = open_checkpoint(src)
    tokens = _rows(data, load_tokenizer(src), how)
    prepared = calibrate(checkpoint, scheme, dtype, tokens, how)
    return write_checkpoint(checkpoint, prepared, Path(out), history=_history(how, tokens, data, prepared))


def calibrate(
    checkpoint: Checkpoint, scheme: Scheme, dtype: str | None, tokens: mx.array, how: Calibration
) -> Prepared:
    """Load, quantize and give what is to be written.

    Args:
        checkpoint: in full; a quantized one is refused.
        dtype: of what is not quantized; None as in `convert`.
        tokens: [rows, length] of the text.

    Raises:
        RodimusError: the checkpoint is quantized or unsound, or its widths do not fit the groups.
    """
    loaded = padded(checkpoint, Wish(dtype, scheme))
    chosen = choose(loaded.config, scheme, "default")
    if set(chosen.values()) != {scheme} or "model.embeddings" not in chosen:
        raise RodimusError(f"--calibrate needs widths that are multiples of the group size, {scheme.group_size}")
    model: Any = Model(loaded.config)
    model.load_weights([(stream.name, mx.concatenate(list(stream.blocks()))) for stream in loaded.streams])
    mx.eval(model.parameters())
    model.train()  # on a GPU, only then there are gradients, and nothing is compiled with the layers to be swapped
    with _rest_kept(model, chosen), contextlib.redirect_stdout(sys.stderr):  # mlx-lm prints how it gets on
        if how.method == "gptq":
            gptq_quantize(model, tokens, *scheme[:2], *scheme[:2], batch_size=how.batch)
        elif how.method == "dynamic":
            chosen = _dynamic(model, chosen, scheme, tokens, how)
        else:
            model = _distilled(model, chosen, tokens, how)
    outputs = [in_memory(name, array) for name, array in tree_flatten(model.parameters())]
    return Prepared(loaded.config, outputs, to_table(scheme, chosen), loaded.dtype, loaded.format)


def _rows(data: str | Path, tokenizer: Any, how: Calibration) -> mx.array:
    """[rows, length] tokens: the documents one after the other, cut."""
    documents = read_documents(data, tokenizer, how.samples * how.length)
    tokens = np.concatenate(documents)
    count = min(len(tokens) // how.length, how.samples)
    if count < 2 * how.batch:
        least = 2 * how.batch * how.length
        raise RodimusError(f"{data} has {len(tokens):,} tokens, too few to calibrate on: give {least:,} or more")
    return mx.array(tokens[: count * how.length].reshape(count, how.length))


def _history(how: Calibration, tokens: mx.array, data: str | Path, prepared: Prepared) -> str:
    assert prepared.quantization is not None
    bits, group_size = prepared.quantization["bits"], prepared.quantization["group_size"]
    return (
        f"The large matrices are quantized to {bits} bit in groups of {group_size} by mlx-lm's {how.method}, "
        f"calibrated on {tokens.size:,} tokens of `{Path(data).name}`; the rest is {prepared.dtype}."
    )


def _dynamic(
    model: Any, chosen: dict[str, Scheme], low: Scheme, tokens: mx.array, how: Calibration
) -> dict[str, Scheme]:
    high = low._replace(bits=min(bits for bits in MODES["affine"][0] if bits > low.bits))
    sensitivities = dict(estimate_sensitivities(model, tokens, *low[:2], *high[:2], batch_size=how.batch))
    target = how.target_bits
    if target is None:
        sizes = [_size_at(model, chosen, scheme) for scheme in (low, high)]
        target = sum(sizes) / 2
    threshold = estimate_threshold(model, sensitivities, target, *low[:2], *high[:2])
    chosen = {path: high if sensitivities[path] > threshold else low for path in chosen}
    _quantize(model, chosen)
    return chosen


def _distilled(model: Any, chosen: dict[str, Scheme], tokens: mx.array, how: Calibration) -> Any:
    student = copy.deepcopy(model)
    _quantize(student, chosen)
    student.freeze()
    rows = [(row, 0) for row in tokens.tolist()]
    held_out = max(how.batch, len(rows) // 10)
    dwq_quantize(
        student,
        lambda batch, *_, **__: model(batch),
        optimizers.Adam(learning_rate=how.learning_rate, bias_correction=True),
        rows[held_out:],
        rows[:held_out],
        batch_size=how.batch,
        max_seq_length=tokens.shape[1],
        seed=0,
        dtype=model.model.norm_f.weight.dtype,
    )
    return student


def _quantize(model: Any, chosen: dict[str, Scheme]) -> None:
    nn.quantize(model, class_predicate=lambda path, _: chosen[path]._asdict() if path in chosen else False)
    mx.eval(model.parameters())


def _size_at(model: Any, chosen: dict[str, Scheme], scheme: Scheme) -> float:
    copied = copy.deepcopy(model)
    nn.quantize(copied, class_predicate=lambda path, _: scheme._asdict() if path in chosen else False)
    return float(compute_bits_per_weight(copied))


class _Kept(nn.Linear):
    """A linear layer that mlx-lm's methods take for one that cannot be quantized."""

    @property
    def to_quantized(self) -> Any:
        raise AttributeError("kept as it is")


@contextlib.contextmanager
def _rest_kept(model: Any, chosen: dict[str, Scheme]) -> Iterator[None]:
    rest = [module for path, module in model.named_modules() if type(module) is nn.Linear and path not in chosen]
    for module in rest:
        module.__class__ = _Kept
    try:
        yield
    finally:
        for module in rest:
            module.__class__ = nn.Linear
