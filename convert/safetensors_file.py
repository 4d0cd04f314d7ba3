"""safetensors files: eight bytes of header length, a JSON header, the numbers.

Read here rather than by `mx.load` because every offset is checked before a byte is read, and tensors stay lazy.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rodimus_mlx.errors import RodimusError

from .state_dict_pickle import shown
from .tensors import DTYPES, LazyTensor, check_shape

_MAX_HEADER = 16 << 20  # bytes; a checkpoint of a thousand tensors has about 0.1 MB

STORED_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, not read yet.

    Raises:
        RodimusError: the file is cut short or damaged, or holds a dtype outside `STORED_DTYPES`.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8 or length > _MAX_HEADER:
                raise RodimusError(_not_safetensors(path, size))
            text = file.read(length)
    except OSError as error:
        raise RodimusError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise RodimusError(f"{path}: its header is damaged ({_reason(error)}); download the file again") from error
    if not isinstance(header, dict):
        raise RodimusError(f"{path}: its header is damaged (not a table of tensors)")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(name, entry, 8 + length, size, path) for name, entry in header.items()}
    _refuse_overlaps(tensors, path)
    return tensors


def _tensor(name: str, entry: Any, data_start: int, file_size: int, path: Path) -> LazyTensor:
    label = f"{path}: {shown(name)}"
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2 or not isinstance(dtype, str):
        raise RodimusError(f"{label} is described wrongly: the file is damaged")
    if dtype not in STORED_DTYPES:
        raise RodimusError(f"{label} has dtype {shown(dtype)}, which is not supported; save it as BF16, F16 or F32")
    shape = tuple(shape)
    check_shape(shape, label)
    stored, (begin, end) = STORED_DTYPES[dtype], offsets
    if data_start + end > file_size:
        raise RodimusError(f"{label} lies beyond the end of the file: it is cut short; download it again")
    if begin < 0 or end - begin != math.prod(shape) * DTYPES[stored][0].itemsize:
        raise RodimusError(f"{label} has a shape and a size that disagree: the file is damaged")
    return LazyTensor(path, stored, shape, data_start + begin)


def _refuse_overlaps(tensors: dict[str, LazyTensor], path: Path) -> None:
    free_from = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset < free_from:
            raise RodimusError(f"{path}: {shown(name)} overlaps another tensor: the file is damaged")
        free_from = tensor.offset + tensor.nbytes


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{shown(name)} is listed twice")
        result[name] = value
    return result


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _not_safetensors(path: Path, size: int) -> str:
    if size == 0:
        return f"{path} is empty"
    with open(path, "rb") as file:
        if file.read(23) == b"version https://git-lfs":
            return f"{path} is a Git LFS pointer, not the weights: download the file itself"
    return f"{path} is not a safetensors file, or is cut short"
