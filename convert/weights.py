"""The weights of a checkpoint under our names, read tensor by tensor."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.errors import RodimusError, RodimusWarning

from .checkpoint import Checkpoint
from .mapping import EMBEDDING, HEAD, check, detect_format, expected_shapes, settle_head, wanted_names
from .tensors import BLOCK_BYTES, LazyTensor

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


@dataclass(frozen=True)
class WeightPlan:
    """What a checkpoint's weights are: checked against its config, nothing read yet.

    ``config`` is the one to build the model from: untied where the weights are.
    """

    config: RodimusConfig
    format: str
    weights: tuple[Weight, ...]


def plan_weights(checkpoint: Checkpoint, config: RodimusConfig, dtype: mx.Dtype | None = None) -> WeightPlan:
    """Match a checkpoint's tensors with a config.

    Args:
        dtype: what floating-point weights are cast to; None keeps the file's.

    Raises:
        RodimusError: missing or unknown tensors (listed), a shape that is not the config's, weights that are not
            floating point.
    """
    tensors, where = checkpoint.tensors, str(checkpoint.folder)
    names = wanted_names(tensors)
    config = settle_head(names, config, lambda: _same_bits(tensors[HEAD], tensors.get(EMBEDDING)), where)
    format = detect_format(names, config, where)
    sources = check({name: tensors[name].shape for name in names}, config, format, where)
    shapes = expected_shapes(config)
    packed = {name.removesuffix(".scales") for name in sources if name.endswith(".scales")}
    weights = []
    for ours, found in sources.items():
        parts = tuple(tensors[name] for name in found)
        quantized = ours.rsplit(".", 1)[0] in packed
        for name, part in zip(found, parts):
            if not quantized and part.dtype not in FLOAT_DTYPES.values():
                raise RodimusError(f"{where}: {name} has dtype {part.stored}; weights must be floating point")
        shape = parts[0].shape if quantized else shapes[ours]
        weights.append(Weight(ours, shape, _target(parts, dtype), parts))
    return WeightPlan(config, format, tuple(weights))


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


def _target(parts: tuple[LazyTensor, ...], dtype: mx.Dtype | None) -> mx.Dtype:
    found = {part.dtype for part in parts}
    if not all(mx.issubdtype(each, mx.floating) for each in found):
        return parts[0].dtype  # packed quantized weights
    if dtype is not None:
        return dtype
    return parts[0].dtype if len(found) == 1 else mx.float32


def _is_finite(block: mx.array) -> bool:
    return not mx.issubdtype(block.dtype, mx.floating) or bool(mx.all(mx.isfinite(block)))


def _same_bits(a: LazyTensor, b: LazyTensor | None) -> bool:
    if b is None or len(a.shape) != 2 or a.shape != b.shape or a.stored != b.stored:
        return False
    if (a.path, a.offset, a.strides) == (b.path, b.offset, b.strides):
        return True
    pairs = zip(a.blocks(), b.blocks())
    return all(bool(mx.array_equal(x.view(mx.uint8), y.view(mx.uint8))) for x, y in pairs)
