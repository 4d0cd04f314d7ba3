"""A tensor that still lies in its file: shape, dtype and place are known, its numbers are read on demand.

Plain reads into a buffer, not a memory map: mapped pages count as the process's memory, and a 7.5 GB checkpoint
that is read once from front to back would be counted whole.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from rodimus_mlx.errors import RodimusError

# Rows are read in blocks of about this size: larger ones get fresh pages from the system each time, which took three
# times as long as the whole rest on Linux.
BLOCK_BYTES = 8 << 20
MAX_DIMENSION = 2**31 - 1  # MLX keeps sizes in 32 bits

# name -> (dtype of the bytes in the file, dtype of the array in memory); numpy has no bfloat16, MLX no float64 on GPUs
DTYPES: dict[str, tuple[np.dtype, mx.Dtype]] = {
    "float64": (np.dtype("<f8"), mx.float32),
    "float32": (np.dtype("<f4"), mx.float32),
    "float16": (np.dtype("<f2"), mx.float16),
    "bfloat16": (np.dtype("<u2"), mx.bfloat16),
    "int64": (np.dtype("<i8"), mx.int64),
    "int32": (np.dtype("<i4"), mx.int32),
    "int16": (np.dtype("<i2"), mx.int16),
    "int8": (np.dtype("i1"), mx.int8),
    "uint64": (np.dtype("<u8"), mx.uint64),
    "uint32": (np.dtype("<u4"), mx.uint32),
    "uint16": (np.dtype("<u2"), mx.uint16),
    "uint8": (np.dtype("u1"), mx.uint8),
    "bool": (np.dtype("?"), mx.bool_),
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file.

    ``stored`` is a key of `DTYPES`; ``offset`` is where element [0, ..., 0] starts, in bytes from the start of the
    file; ``strides`` are in elements, None for row-major. Whoever makes one has checked that it lies in the file.
    """

    path: Path
    stored: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype that reading gives (float64 is read as float32)."""
        return DTYPES[self.stored][1]

    @property
    def itemsize(self) -> int:
        """Bytes of one element in the file."""
        return DTYPES[self.stored][0].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all elements in the file."""
        return math.prod(self.shape) * self.itemsize

    def read(self, start: int = 0, stop: int | None = None) -> mx.array:
        """The whole tensor, or its rows start:stop (first axis)."""
        shape = self.shape
        if shape:
            stop = shape[0] if stop is None else min(stop, shape[0])
            shape = (max(stop - start, 0), *shape[1:])
        if self.strides is None and self.stored != "float64" and 0 not in shape:
            return self._read_in_place(start, shape)
        return _to_mlx(self._rows(start, shape), self.stored)

    def blocks(self, max_bytes: int = BLOCK_BYTES) -> Iterator[mx.array]:
        """The rows in order, in pieces of at most about ``max_bytes``; at least one piece."""
        rows = rows_per_block(self.shape, self.itemsize, max_bytes)
        if not self.shape or rows >= self.shape[0] or self.strides is not None:
            yield self.read()  # rows of a transposed view lie scattered: one pass over the file beats many
            return
        for start in range(0, self.shape[0], rows):
            yield self.read(start, start + rows)

    def _read_in_place(self, start: int, shape: tuple[int, ...]) -> mx.array:
        """The file's bytes straight into an array of MLX."""
        stored, dtype = DTYPES[self.stored]
        array = mx.zeros(shape, mx.uint16 if dtype == mx.bfloat16 else dtype)
        view = np.asarray(array)  # a window on the array's own memory
        per_row = math.prod(self.shape[1:]) * self.itemsize
        _fill(self.path, self.offset + start * per_row, memoryview(view.reshape(-1).view(stored)).cast("B"))
        return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array

    def _rows(self, start: int, shape: tuple[int, ...]) -> np.ndarray:
        dtype = DTYPES[self.stored][0]
        if 0 in shape:
            return np.empty(shape, dtype)
        strides = self.strides or row_major(self.shape)
        offset = self.offset + (start * strides[0] * self.itemsize if shape else 0)
        flat = np.empty(span(shape, strides), dtype)
        _fill(self.path, offset, memoryview(flat).cast("B"))
        if self.strides is None:
            return flat.reshape(shape)
        view = np.lib.stride_tricks.as_strided(flat, shape, tuple(s * self.itemsize for s in strides), writeable=False)
        return np.ascontiguousarray(view).reshape(shape)


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a row-major array."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last one of a strided view, both included; 0 for an empty one."""
    return 0 if 0 in shape else 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))


def rows_per_block(shape: tuple[int, ...], itemsize: int, max_bytes: int = BLOCK_BYTES) -> int:
    """Rows of the first axis that fit in ``max_bytes``, at least one."""
    return max(1, max_bytes // max(1, math.prod(shape[1:]) * itemsize))


def check_shape(shape: tuple[int, ...], label: str) -> None:
    """Refuse sizes that no array can have.

    Raises:
        RodimusError: ``label`` followed by what is wrong.
    """
    if len(shape) > 8 or any(size < 0 or size > MAX_DIMENSION for size in shape):
        raise RodimusError(f"{label} has an impossible shape")


def _to_mlx(array: np.ndarray, stored: str) -> mx.array:
    if stored == "bfloat16":
        return mx.array(array).view(mx.bfloat16)
    return mx.array(array.astype(np.float32) if stored == "float64" else array)


def _fill(path: Path, offset: int, buffer: memoryview) -> None:
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            if hasattr(os, "posix_fadvise"):  # what comes next in the file, while this is worked on
                os.posix_fadvise(file.fileno(), offset + len(buffer), 2 * len(buffer), os.POSIX_FADV_WILLNEED)
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done:])
                if not count:
                    raise RodimusError(f"{path} ended early: it was cut short while being read")
                done += count
    except OSError as error:
        raise RodimusError(f"{path} cannot be read: {error.strerror or error}") from error
