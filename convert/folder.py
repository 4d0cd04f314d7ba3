"""A folder that appears complete or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rodimus_mlx.errors import RodimusError

_MARK = ".partial-"


@contextmanager
def new_folder(out: Path, needed: int) -> Iterator[Path]:
    """Give a hidden sibling of ``out`` to fill, and rename it to ``out`` when the block ends.

    On any failure, Ctrl-C included, the sibling is removed. One that a killed process left behind is removed by the
    next call for the same ``out``.

    Args:
        needed: bytes that will be written; refused at once where the disk has fewer.

    Raises:
        RodimusError: ``out`` exists and is not an empty folder, or the disk is full or not writable.
    """
    out = out.absolute()
    refuse_occupied(out)
    made: list[Path] = []
    lock = -1
    try:
        made = _make_parents(out.parent)
        if (free := _free(out.parent)) < needed:
            raise _disk_full(out, needed, free)
        partial, lock = _claim(out)
        try:
            yield partial
            _flush(partial)
            refuse_occupied(out)
            os.rename(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _flush_folder(out.parent)
    except BaseException as error:
        free = _free(out.parent) if out.parent.exists() else 0
        for parent in reversed(made):
            with suppress(OSError):  # not empty: somebody else uses it by now
                parent.rmdir()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(out, needed, free) from error
        if isinstance(error, OSError):
            raise RodimusError(f"{out} cannot be written: {error.strerror or error}") from error
        raise
    finally:
        if lock >= 0:
            os.close(lock)


def refuse_occupied(out: Path) -> None:
    """Refuse a place that is taken.

    Raises:
        RodimusError: ``out`` is a file, or a folder that is not empty.
    """
    if out.is_dir() and not out.is_symlink():
        if any(out.iterdir()):
            raise RodimusError(f"{out} exists and is not empty; choose another folder or remove it first")
    elif out.exists() or out.is_symlink():
        raise RodimusError(f"{out} exists and is not a folder; choose another place")


def _claim(out: Path) -> tuple[Path, int]:
    """Make the partial folder and lock it for as long as this process lives; clear away those whose owner is gone."""
    parent = os.open(out.parent, os.O_RDONLY)
    try:
        _lock(parent, fcntl.LOCK_EX)  # so that nobody takes a folder just made, not locked yet, for a dead one
        for stale in out.parent.glob(f".{_literal(out.name)}{_MARK}*"):
            with suppress(OSError):
                descriptor = os.open(stale, os.O_RDONLY)
                try:
                    if _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                        shutil.rmtree(stale, ignore_errors=True)
                finally:
                    os.close(descriptor)
        number = os.getpid()
        while (partial := out.parent / f".{out.name}{_MARK}{number}").exists():
            number += 1
        partial.mkdir()
        descriptor = os.open(partial, os.O_RDONLY)
        _lock(descriptor, fcntl.LOCK_EX)
        return partial, descriptor
    finally:
        os.close(parent)


def _lock(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how)
    except OSError:  # held by a living process, or a file system without locks: then nothing is cleared away
        return False
    return True


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _make_parents(folder: Path) -> list[Path]:
    missing = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    for path in missing:
        path.mkdir()
    return missing


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _disk_full(out: Path, needed: int, free: int) -> RodimusError:
    return RodimusError(
        f"not enough disk space for {out}: {needed:,} bytes are needed, {free:,} are free; nothing was written"
    )
