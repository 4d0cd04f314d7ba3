"""What to write for a checkpoint: its tensors copied, renamed, dequantized or quantized, and the config that fits."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.errors import RodimusError, RodimusWarning

from .checkpoint import Checkpoint
from .mapping import Part, parts
from .schemes import Scheme, choose, ffn_padding, to_table
from .streams import FFN_IN, Output, Stream, pad_ffn, plain, quantize, split, strip_ffn
from .weights import FLOAT_DTYPES, PackedWeight, Weight, WeightPlan, dequantized, plan_weights, widest
from .writer import Spec


class Wish(NamedTuple):
    """What becomes of the weights; `convert` says what each means."""

    dtype: str | None = None
    scheme: Scheme | None = None
    recipe: str = "default"
    dequantize: bool = False
    to: str = "ours"


class Prepared(NamedTuple):
    """Tensors to write, not read yet, and what config.json must say of them."""

    config: RodimusConfig
    outputs: list[Output]
    quantization: dict[str, Any] | None
    dtype: str  # of what is not quantized
    format: str  # of the source

    @property
    def specs(self) -> dict[str, Spec]:
        """Every tensor's dtype and shape."""
        return {name: spec for output in self.outputs for name, spec in output.specs.items()}


class InFull(NamedTuple):
    """A checkpoint's weights as numbers, not read yet."""

    config: RodimusConfig
    streams: list[Stream]
    dtype: str
    format: str


def prepare(checkpoint: Checkpoint, wish: Wish, compare_head: bool = True) -> Prepared:
    """Check a checkpoint and a wish against each other.

    Args:
        compare_head: as for `plan_weights`.

    Raises:
        RodimusError: the checkpoint is not sound, or the wish does not fit it.
    """
    plan = _plan(checkpoint, wish, compare_head)
    if plan.schemes and not wish.dequantize:
        _refuse_changes(str(checkpoint.folder), wish)
        copied = [plain(_stream(weight)) for weight in plan.weights]
        table = dict(checkpoint.config["quantization"])
        return Prepared(plan.config, copied, table, _name(widest(plan.weights)), plan.format)
    full = _in_full(checkpoint, plan, wish)
    config, outputs, quantization = _outputs(full.config, full.streams, wish)
    return Prepared(config, outputs, quantization, full.dtype, full.format)


def padded(checkpoint: Checkpoint, wish: Wish) -> InFull:
    """The weights that `prepare` would quantize by a wish's scheme, the FFN padded for it.

    Raises:
        RodimusError: the checkpoint is not sound, or quantized already.
    """
    plan = _plan(checkpoint, wish)
    if plan.schemes and not wish.dequantize:
        _refuse_changes(str(checkpoint.folder), wish)
    full = _in_full(checkpoint, plan, wish)
    assert wish.scheme is not None
    config, streams = _pad(full.config, full.streams, wish.scheme)
    return full._replace(config=config, streams=streams)


def _plan(checkpoint: Checkpoint, wish: Wish, compare_head: bool = True) -> WeightPlan:
    config = RodimusConfig.from_dict(checkpoint.config)
    return plan_weights(checkpoint, config, _cast(checkpoint, wish), compare_head)


def _in_full(checkpoint: Checkpoint, plan: WeightPlan, wish: Wish) -> InFull:
    if wish.dequantize and not plan.schemes:
        raise RodimusError(f"{checkpoint.folder} is not quantized: there is nothing to dequantize")
    weights: Sequence[Weight | PackedWeight] = plan.weights
    dtype = widest(plan.weights)
    if wish.dequantize:
        dtype = FLOAT_DTYPES[wish.dtype] if wish.dtype else dtype
        weights = dequantized(plan, dtype)
    config, streams = _unpadded(weights, plan.config)
    return InFull(config, streams, _name(dtype), plan.format)


def _cast(checkpoint: Checkpoint, wish: Wish) -> mx.Dtype | None:
    if wish.dtype is not None:
        return None if wish.dequantize else FLOAT_DTYPES[wish.dtype]
    # Beside weights of a few bits, float32 for the scales and the rest would be a waste.
    full = any(tensor.stored in ("float32", "float64") for tensor in checkpoint.tensors.values())
    return mx.bfloat16 if wish.scheme is not None and full and not wish.dequantize else None


def _refuse_changes(folder: str, wish: Wish) -> None:
    if wish.scheme is not None:
        raise RodimusError(f"{folder} is quantized already: quantize the original, or add --dequantize to do it anew")
    if wish.to != "ours":
        raise RodimusError(f"{folder} is quantized, which the {wish.to} format does not know: add --dequantize")
    if wish.dtype is not None:
        raise RodimusError(f"{folder} is quantized: its dtype cannot be changed without --dequantize")


def _unpadded(weights: Sequence[Weight | PackedWeight], config: RodimusConfig) -> tuple[RodimusConfig, list[Stream]]:
    """The weights without the zeros that quantizing may have put at the end of the FFN."""
    streams = [_stream(weight) for weight in weights]
    zeros = config.ffn_padding
    if not zeros:
        return config, streams
    width = config.d_ffn - zeros
    narrow = replace(config, d_ffn=width, ffn_padding=0)
    values = (weight.rows(width, width + zeros) for weight in weights if weight.name.endswith(FFN_IN))
    if all(bool(mx.all(rows == 0)) for rows in values):
        return narrow, [strip_ffn(each, config) for each in streams]
    warnings.warn(
        f"the FFN's padding is no longer zero (was it trained?): its width stays {config.d_ffn}, not {width}",
        RodimusWarning,
        stacklevel=2,
    )
    return replace(config, ffn_padding=0), streams


def _outputs(
    config: RodimusConfig, streams: list[Stream], wish: Wish
) -> tuple[RodimusConfig, list[Output], dict[str, Any] | None]:
    """What to write for weights in full, the config of it, and config.json's quantization."""
    if wish.to != "ours":
        theirs: dict[str, dict[str, Part]] = {}
        for name, part in parts(config, wish.to).items():
            theirs.setdefault(part.ours, {})[name] = part
        return config, [split(each, theirs[each.name]) for each in streams], None
    if wish.scheme is None:
        return config, [plain(each) for each in streams], None
    chosen = choose(config, wish.scheme, wish.recipe)
    config, streams = _pad(config, streams, wish.scheme)
    paths = [each.name.removesuffix(".weight") for each in streams]
    outputs = [quantize(each, chosen[path]) if path in chosen else plain(each) for each, path in zip(streams, paths)]
    return config, outputs, to_table(wish.scheme, chosen)


def _pad(config: RodimusConfig, streams: list[Stream], scheme: Scheme) -> tuple[RodimusConfig, list[Stream]]:
    zeros = ffn_padding(config, scheme)
    if not zeros:
        return config, streams
    wide = replace(config, d_ffn=config.d_ffn + zeros, ffn_padding=zeros)
    return wide, [pad_ffn(each, config, zeros) for each in streams]


def _stream(weight: Weight | PackedWeight) -> Stream:
    return Stream(weight.name, Spec(weight.dtype, weight.shape), weight.blocks)


def _name(dtype: mx.Dtype) -> str:
    return next(name for name, each in FLOAT_DTYPES.items() if each == dtype)
