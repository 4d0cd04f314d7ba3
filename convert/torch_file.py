"""PyTorch's zip files (`pytorch_model.bin`), read without torch and without running anything they hold.

A zip of uncompressed members: `<name>/data.pkl` describes the tensors, `<name>/data/<key>` holds one storage each.
"""

from __future__ import annotations

import errno
import io
import math
import os
import struct
import zipfile
from pathlib import Path

from rodimus_mlx.errors import RodimusError

from .state_dict_pickle import TensorRecord, read_state_dict, shown
from .tensors import DTYPES, LazyTensor, check_shape, row_major, span

_MAX_DIRECTORY = 4 << 20  # bytes of zip directory or pickle; a 5-billion-weight checkpoint has about 0.1 MB of each
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # magic ... length of the name, length of the extra field
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def read_torch(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file that torch.save wrote, not read yet.

    Raises:
        RodimusError: the file is cut short, damaged, of the format before PyTorch 1.6, or asks for anything beyond
            a state dict (refused by name).
    """
    try:
        with _BoundedFile(path) as file:
            members = _members(file, path)
            prefix = _prefix(members, path)
            _check_byte_order(file, members, prefix, path)
            pickle = _read_member(file, members[f"{prefix}/data.pkl"], path)
    except OSError as error:
        raise RodimusError(f"{path} cannot be read: {error.strerror or error}") from error
    records = read_state_dict(pickle, str(path))
    return {name: _tensor(name, record, members, prefix, path) for name, record in records.items()}


class _BoundedFile(io.FileIO):
    """A file that refuses to be read in pieces larger than any zip directory: a forged size costs no memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > _MAX_DIRECTORY:
            raise zipfile.BadZipFile("a directory too large to be true")
        return super().read(max(size, 0))


def _members(file: _BoundedFile, path: Path) -> dict[str, tuple[int, int]]:
    """Name -> (first byte, size) of every member; each checked to lie in the file and to overlap no other."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos, end = archive.infolist(), archive.start_dir
    except Exception as error:  # zipfile meets forged directories with errors of a dozen kinds
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise RodimusError(_not_a_zip(file, path)) from error
    members: dict[str, tuple[int, int]] = {}
    free_from = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        label = f"{path}: its member {shown(info.filename)}"
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise RodimusError(f"{label} is compressed or encrypted, which torch.save never does; save it again")
        file.seek(max(info.header_offset, 0))
        header = file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise RodimusError(f"{label} is not where the directory says: the file is damaged")
        _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if info.header_offset < free_from or start + info.file_size > end or info.filename in members:
            raise RodimusError(f"{label} overlaps another or leaves the file: the file is damaged")
        free_from = start + info.file_size
        members[info.filename] = (start, info.file_size)
    return members


def _not_a_zip(file: _BoundedFile, path: Path) -> str:
    file.seek(0)
    start = file.read(64)
    if start.startswith(_LEGACY_MAGIC):
        return (
            f"{path} is in PyTorch's format from before version 1.6; where PyTorch is installed, save it again: "
            'torch.save(torch.load(FILE, map_location="cpu", weights_only=True), FILE)'
        )
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a Git LFS pointer, not the weights: download the file itself"
    if start.startswith(b"PK\x03\x04"):
        return f"{path} is cut short or damaged: the zip directory at its end is missing; download it again"
    return f"{path} is not a PyTorch file" + (": it is empty" if not start else "")


def _prefix(members: dict[str, tuple[int, int]], path: Path) -> str:
    found = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(found) != 1:
        raise RodimusError(f"{path} is a zip file, but not one that torch.save wrote: it has no data.pkl")
    return found[0].removesuffix("/data.pkl")


def _check_byte_order(file: _BoundedFile, members: dict[str, tuple[int, int]], prefix: str, path: Path) -> None:
    member = members.get(f"{prefix}/byteorder")
    if member is not None and _read_member(file, member, path) != b"little":
        raise RodimusError(f"{path} was written on a big-endian machine; save it again on a little-endian one")


def _read_member(file: _BoundedFile, member: tuple[int, int], path: Path) -> bytes:
    start, size = member
    if size > _MAX_DIRECTORY:
        raise RodimusError(f"{path}: its data.pkl is too large to describe a state dict")
    file.seek(start)
    data = b""
    while len(data) < size:
        piece = file.read(size - len(data))
        if not piece:
            raise RodimusError(f"{path} ended early: it was cut short while being read")
        data += piece
    return data


def _tensor(
    name: str, record: TensorRecord, members: dict[str, tuple[int, int]], prefix: str, path: Path
) -> LazyTensor:
    label = f"{path}: {shown(name)}"
    storage, shape, strides = record.storage, record.shape, record.strides
    check_shape(shape, label)
    member = members.get(f"{prefix}/data/{storage.key}")
    if member is None:
        raise RodimusError(f"{label} has no data in the file: its storage {shown(storage.key)} is missing")
    start, size = member
    itemsize = DTYPES[storage.dtype][0].itemsize
    if storage.count * itemsize > size or record.offset + span(shape, strides) > storage.count:
        raise RodimusError(f"{label} reaches beyond its storage: the file is damaged")
    if math.prod(shape) > storage.count:
        raise RodimusError(f"{label} repeats its storage's numbers (an expanded tensor); save it contiguous")
    plain = all(size == 1 or a == b for size, a, b in zip(shape, strides, row_major(shape)))
    return LazyTensor(path, storage.dtype, shape, start + record.offset * itemsize, None if plain else strides)
