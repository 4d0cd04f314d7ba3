"""A folder with config.json and weights, opened without reading a weight."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from rodimus_mlx.errors import RodimusError

from .safetensors_file import read_safetensors
from .state_dict_pickle import shown
from .tensors import LazyTensor
from .torch_file import read_torch

_MAX_JSON = 64 << 20  # bytes
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds: its config.json and its tensors, by their names in the files."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, LazyTensor]
    files: tuple[Path, ...]


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a checkpoint folder: safetensors or PyTorch files, one or several; safetensors win where both are there.

    Raises:
        RodimusError: it is not a checkpoint, a file is missing or damaged, or a tensor is in it twice.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RodimusError(f"{folder} is not a folder; expected a checkpoint with config.json and weights")
    if not (folder / "config.json").is_file():
        raise RodimusError(f"{folder} is not a checkpoint: it has no config.json")
    config = read_json(folder / "config.json")
    files, index = _weight_files(folder)
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        read = read_safetensors if file.suffix == ".safetensors" else read_torch
        found = read(file)
        if twice := sorted(tensors.keys() & found.keys()):
            other = tensors[twice[0]].path.name
            raise RodimusError(f"{folder}: {listed(twice)} in both {other} and {file.name}; which one is meant?")
        tensors |= found
    if lost := [name for name in index if name not in tensors]:
        raise RodimusError(f"{folder}: the index lists {listed(lost)}, but the weight files do not hold them")
    if not tensors:
        raise RodimusError(f"{folder}: its weight files hold no tensors")
    return Checkpoint(folder, config, tensors, tuple(files))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a table.

    Raises:
        RodimusError: it is unreadable, empty, not JSON, or something other than a table.
    """
    try:
        if path.stat().st_size > _MAX_JSON:
            raise RodimusError(f"{path} is too large to be what its name says")
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            raise RodimusError(f"{path} is empty")
        value = json.loads(text)
    except OSError as error:
        raise RodimusError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RodimusError(f"{path} is not valid JSON: {reason}") from error
    if not isinstance(value, dict):
        raise RodimusError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def listed(names: list[str], most: int = 3) -> str:
    """The first few names and how many more there are, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


def _weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The files to read, and the tensor names that an index promises (none without an index)."""
    for kind, single in (("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")):
        index = folder / f"{single}.index.json"
        if index.is_file():
            return _indexed(folder, index)
        if (folder / single).is_file():
            return [folder / single], []
        stem = single.split(".")[0]
        if shards := sorted(path for path in folder.glob(f"{stem}*.{kind}") if path.is_file()):
            return _complete(folder, shards), []
    raise RodimusError(f"{folder} is not a checkpoint: it has no weights (model*.safetensors or pytorch_model*.bin)")


def _indexed(folder: Path, index: Path) -> tuple[list[Path], list[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise RodimusError(f"{index} has no weight_map from tensor names to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not _stays_inside(name) or Path(name).suffix not in (".safetensors", ".bin"):
            raise RodimusError(f"{index} names the file {shown(name)}; only weight files inside the folder are read")
    _refuse_missing(folder, names)
    return [folder / name for name in names], list(weight_map)


def _stays_inside(name: str) -> bool:
    def plain(path: PurePosixPath | PureWindowsPath) -> bool:
        return not path.is_absolute() and not path.drive and not path.root and ".." not in path.parts

    short = len(name.encode(errors="surrogatepass")) < 256  # longer ones no file system has
    return bool(name) and short and "\0" not in name and plain(PurePosixPath(name)) and plain(PureWindowsPath(name))


def _complete(folder: Path, shards: list[Path]) -> list[Path]:
    """Shards without an index: their names say how many there must be."""
    numbered = [match for path in shards if (match := _SHARD.search(path.stem))]
    if numbered:
        stem, total = shards[0].stem[: numbered[0].start()], int(numbered[0].group(2))
        wanted: Callable[[int], str] = lambda i: f"{stem}-{i:05d}-of-{total:05d}{shards[0].suffix}"  # noqa: E731
        _refuse_missing(folder, [wanted(i) for i in range(1, total + 1)])
    return shards


def _refuse_missing(folder: Path, names: list[str]) -> None:
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise RodimusError(f"{folder}: missing {listed(missing)}; download the rest of the checkpoint")
