"""safetensors files written as the numbers come: all shapes are known, so headers go first and nothing is gathered."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .safetensors_file import STORED_DTYPES
from .tensors import DTYPES

SHARD_BYTES = 5_000_000_000  # what hubs and mlx-lm cut at
_CODES = {DTYPES[name][1]: code for code, name in STORED_DTYPES.items() if name != "float64"}


class Spec(NamedTuple):
    """Dtype and shape of a tensor to come."""

    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.size


class ShardedWriter:
    """Writes tensors, in rows and in any order, into one or several safetensors files and their index."""

    def __init__(
        self, folder: Path, specs: Mapping[str, Spec], shard_bytes: int = SHARD_BYTES, made_for: str = "mlx"
    ) -> None:
        self.folder, self.specs = folder, specs
        self._metadata = {"format": made_for}  # which library's tensors they are: transformers asks for it
        shards = list(_shards(specs, shard_bytes))
        self.files = [
            "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            for i in range(1, len(shards) + 1)
        ]
        self._place: dict[str, tuple[int, int]] = {}  # name -> (file descriptor, where its next rows go)
        self._left = {name: spec.nbytes for name, spec in specs.items()}
        self._descriptors: list[int] = []
        self._index = {name: file for file, names in zip(self.files, shards) for name in names}
        for file, names in zip(self.files, shards):
            self._start(file, names)

    def write(self, name: str, rows: mx.array) -> None:
        """Append rows to a tensor; they must have its dtype and the rest of its shape."""
        spec = self.specs[name]
        if rows.dtype != spec.dtype or tuple(rows.shape[1:]) != spec.shape[1:] or rows.nbytes > self._left[name]:
            raise ValueError(f"{name}: rows {rows.shape} of {rows.dtype} do not continue {spec.shape} of {spec.dtype}")
        descriptor, offset = self._place[name]
        write_at(descriptor, _bytes(rows), offset)
        self._place[name] = (descriptor, offset + rows.nbytes)
        self._left[name] -= rows.nbytes

    def finish(self) -> None:
        """Flush to the disk and, for several files, write the index."""
        if incomplete := [name for name, left in self._left.items() if left]:
            raise ValueError(f"{len(incomplete)} tensors are incomplete, {incomplete[0]} the first")
        for descriptor in self._descriptors:
            os.fsync(descriptor)
        if len(self.files) > 1:
            total = sum(spec.nbytes for spec in self.specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self._index.items()))}
            write_json(self.folder / "model.safetensors.index.json", index)

    def close(self) -> None:
        """Close the files, complete or not."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _start(self, file: str, names: list[str]) -> None:
        descriptor = os.open(self.folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._descriptors.append(descriptor)
        header: dict[str, object] = {"__metadata__": self._metadata}
        ends, end = {}, 0
        for name in sorted(names, key=lambda name: -self.specs[name].dtype.size):  # wide numbers first: all aligned
            spec = self.specs[name]
            ends[name] = end
            header[name] = {
                "dtype": _CODES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [end, end + spec.nbytes],
            }
            end += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        write_at(descriptor, memoryview(len(text).to_bytes(8, "little") + text), 0)
        self._place |= {name: (descriptor, 8 + len(text) + offset) for name, offset in ends.items()}


@contextmanager
def sharded_writer(
    folder: Path, specs: Mapping[str, Spec], shard_bytes: int = SHARD_BYTES, made_for: str = "mlx"
) -> Iterator[ShardedWriter]:
    """A `ShardedWriter`, finished at the end of the block and closed whatever happens."""
    writer = ShardedWriter(folder, specs, shard_bytes, made_for)
    try:
        yield writer
        writer.finish()
    finally:
        writer.close()


def write_json(path: Path, value: object) -> None:
    """Write a JSON file as checkpoints have them: indented, with a newline at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset`` of an open file."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + (1 << 30)], offset + done)


def _shards(specs: Mapping[str, Spec], shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, spec in specs.items():
        if names and size + spec.nbytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += spec.nbytes
    yield names


def _bytes(array: mx.array) -> memoryview:
    """An array's numbers, not copied; numpy knows no bfloat16."""
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return memoryview(np.ascontiguousarray(np.asarray(plain))).cast("B")
