"""The weights of a checkpoint under our names, read tensor by tensor."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.errors import RodimusError, RodimusWarning

from .checkpoint import Checkpoint
from .mapping import EMBEDDING, HEAD, check, detect_format, expected_shapes, settle_head, wanted_names
from .schemes import Scheme, read_table
from .tensors import BLOCK_BYTES, LazyTensor, rows_per_block

FLOAT_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


@dataclass(frozen=True)
class Weight:
    """One of our parameters: the rows of ``parts``, one after the other, as ``shape``."""

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype
    parts: tuple[LazyTensor, ...]

    def blocks(self, max_bytes: int = BLOCK_BYTES) -> Iterator[mx.array]:
        """The rows in order, cast to ``dtype``, in pieces of about ``max_bytes``; warns of NaN and infinity."""
        warned = False
        for part in self.parts:
            for block in part.blocks(max_bytes):
                block = block.reshape(-1, *self.shape[1:]).astype(self.dtype)
                if not warned and not _is_finite(block):
                    warnings.warn(f"{self.name} has NaN or infinite weights", RodimusWarning, stacklevel=3)
                    warned = True
                yield block

    def read(self) -> mx.array:
        """The whole parameter in memory."""
        blocks = list(self.blocks())
        result = blocks[0] if len(blocks) == 1 else mx.concatenate(blocks)
        mx.eval(result)
        return result

    def rows(self, start: int, stop: int) -> mx.array:
        """Some rows of a parameter that is one tensor."""
        return self.parts[0].read(start, stop)


@dataclass(frozen=True)
class PackedWeight:
    """A quantized parameter, to be read dequantized."""

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype
    scheme: Scheme
    packed: LazyTensor
    scales: LazyTensor
    biases: LazyTensor | None

    def blocks(self, max_bytes: int = BLOCK_BYTES) -> Iterator[mx.array]:
        """The rows in order, in pieces of about ``max_bytes``."""
        count = rows_per_block(self.shape, self.dtype.size, max_bytes)
        for start in range(0, self.shape[0], count):
            yield self.rows(start, start + count)

    def rows(self, start: int, stop: int) -> mx.array:
        """Some rows."""
        return mx.dequantize(
            self.packed.read(start, stop),
            self.scales.read(start, stop),
            None if self.biases is None else self.biases.read(start, stop),
            group_size=self.scheme.group_size,
            bits=self.scheme.bits,
            mode=self.scheme.mode,
            dtype=self.dtype,
        )


@dataclass(frozen=True)
class WeightPlan:
    """What a checkpoint's weights are: checked against its config, nothing read yet.

    ``config`` is the one to build the model from: untied where the weights are. ``schemes`` has the modules that are
    quantized; each one's packed matrix, scales and biases are weights of their own.
    """

    config: RodimusConfig
    format: str
    weights: tuple[Weight, ...]
    schemes: Mapping[str, Scheme]


def plan_weights(
    checkpoint: Checkpoint, config: RodimusConfig, dtype: mx.Dtype | None = None, compare_head: bool = True
) -> WeightPlan:
    """Match a checkpoint's tensors with a config.

    Args:
        dtype: what floating-point weights are cast to; None keeps the file's.
        compare_head: look whether a tied model's head is its embedding; that reads both. False takes it for granted.

    Raises:
        RodimusError: missing or unknown tensors (listed), a shape that is not the config's, weights that are not
            floating point, or quantized otherwise than config.json says.
    """
    tensors, where = checkpoint.tensors, str(checkpoint.folder)
    names = wanted_names(tensors)
    if compare_head:
        config = settle_head(names, config, lambda: _same_bits(tensors[HEAD], tensors.get(EMBEDDING)), where)
    format = detect_format(names, config, where)
    sources = check({name: tensors[name].shape for name in names}, config, format, where)
    shapes = expected_shapes(config)
    paths = [name.removesuffix(".scales") for name in sources if name.endswith(".scales")]
    schemes = read_table(checkpoint.config, paths, where)
    for path, scheme in schemes.items():
        _check_packed(tensors, path, shapes[f"{path}.weight"], scheme, where)
    weights = []
    for ours, found in sources.items():
        parts = tuple(tensors[name] for name in found)
        quantized = ours.rsplit(".", 1)[0] in schemes and not ours.endswith(".bias")
        for name, part in zip(found, parts):
            if not quantized and part.dtype not in FLOAT_DTYPES.values():
                raise RodimusError(f"{where}: {name} has dtype {part.stored}; weights must be floating point")
        shape = parts[0].shape if quantized else shapes[ours]
        weights.append(Weight(ours, shape, parts[0].dtype if quantized else _target(parts, dtype), parts))
    return WeightPlan(config, format, tuple(weights), schemes)


def dequantized(plan: WeightPlan, dtype: mx.Dtype | None = None) -> tuple[Weight | PackedWeight, ...]:
    """The plan's weights with those that are quantized in full: exactly what MLX computes with.

    Args:
        dtype: of the result; None for the widest that the checkpoint has.
    """
    dtype = dtype or widest(plan.weights)
    tensors = {weight.name: weight.parts[0] for weight in plan.weights}
    shapes = expected_shapes(plan.config)
    result: list[Weight | PackedWeight] = []
    for weight in plan.weights:
        path, last = weight.name.rsplit(".", 1)
        if path not in plan.schemes or last == "bias":
            result.append(weight if weight.dtype == dtype else Weight(weight.name, weight.shape, dtype, weight.parts))
        elif last == "weight":
            scales, biases = tensors[f"{path}.scales"], tensors.get(f"{path}.biases")
            shape, packed = shapes[weight.name], tensors[weight.name]
            result.append(PackedWeight(weight.name, shape, dtype, plan.schemes[path], packed, scales, biases))
    return tuple(result)


def widest(weights: tuple[Weight, ...]) -> mx.Dtype:
    """The widest floating dtype among weights."""
    found = {weight.dtype for weight in weights}
    return next((dtype for dtype in FLOAT_DTYPES.values() if dtype in found), mx.float32)


def read_weights(
    checkpoint: Checkpoint, config: RodimusConfig, dtype: mx.Dtype | None = None
) -> Iterator[tuple[str, mx.array]]:
    """Our parameters' names and arrays, one at a time, in the model's order.

    A tied model whose ``lm_head.weight`` is not its embedding gives that too (`plan_weights` has its config).

    Raises:
        RodimusError: as `plan_weights` does, before the first array.
    """
    plan = plan_weights(checkpoint, config, dtype)
    return ((weight.name, weight.read()) for weight in plan.weights)


def _check_packed(
    tensors: Mapping[str, LazyTensor], path: str, shape: tuple[int, ...], scheme: Scheme, where: str
) -> None:
    packed, scales = tensors[f"{path}.weight"], tensors[f"{path}.scales"]
    biases = tensors.get(f"{path}.biases")
    count, columns = math.prod(shape[:-1]), shape[-1]
    words, groups = scheme.columns(columns)
    affine = scheme.mode == "affine"
    fits = columns % scheme.group_size == 0 and (packed.shape, scales.shape) == ((count, words), (count, groups))
    fits = fits and packed.stored == "uint32" and (scales.dtype in FLOAT_DTYPES.values()) == affine
    fits = fits and (scales.stored == "uint8" or affine) and (biases is not None) == affine
    if biases is not None:
        fits = fits and (biases.shape, biases.stored) == (scales.shape, scales.stored)
    if not fits:
        raise RodimusError(
            f"{where}: config.json's quantization does not fit the weights: {path} does not have {scheme}"
        )


def _target(parts: tuple[LazyTensor, ...], dtype: mx.Dtype | None) -> mx.Dtype:
    if dtype is not None:
        return dtype
    return parts[0].dtype if len({part.dtype for part in parts}) == 1 else mx.float32


def _is_finite(block: mx.array) -> bool:
    """Whether no number's exponent is all ones; on the bits, which is many times faster than MLX's `isfinite`."""
    words, exponent = {
        mx.float32: (mx.uint32, 0x7F800000),
        mx.bfloat16: (mx.uint16, 0x7F80),
        mx.float16: (mx.uint16, 0x7C00),
    }.get(block.dtype, (None, 0))
    if words is None or block.size == 0:
        return True
    return int((block.view(words) & exponent).max()) != exponent


def _same_bits(a: LazyTensor, b: LazyTensor | None) -> bool:
    if b is None or len(a.shape) != 2 or a.shape != b.shape or a.stored != b.stored:
        return False
    if (a.path, a.offset, a.strides) == (b.path, b.offset, b.strides):
        return True
    pairs = zip(a.blocks(), b.blocks())
    return all(bool(mx.array_equal(x.view(mx.uint8), y.view(mx.uint8))) for x, y in pairs)
