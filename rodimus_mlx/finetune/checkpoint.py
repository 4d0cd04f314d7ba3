"""Checkpoints from which a run goes on exactly: folders that appear complete or not at all.

OUT/checkpoints/0000100 is an adapter folder with two files more: training.safetensors (what is trained, in float32,
and the optimizer's state) and training.json (the step, and what must be the same to go on).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_map_with_path

from ..errors import RodimusError
from .adapters import write_adapter
from .parameters import Parameters, named, read

FOLDER, ARRAYS, FACTS = "checkpoints", "training.safetensors", "training.json"
_PARTIAL = ".partial-"


class State(NamedTuple):
    """Where a run stands."""

    step: int  # steps done
    parameters: Parameters
    optimizer: Any
    facts: dict[str, Any]  # JSON: what else the trainer remembers


def save(out: Path, state: State, config: Mapping[str, Any], adapter: Mapping[str, mx.array], keep: int = 1) -> Path:
    """Write the checkpoint of a step, then remove all but the last ``keep``; returns its folder.

    Raises:
        RodimusError: the disk is full or not writable; older checkpoints are as they were.
    """
    folder = out / FOLDER / f"{state.step:07d}"
    partial = folder.with_name(_PARTIAL + folder.name)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        write_adapter(partial, config, adapter)
        arrays = {f"parameters.{name}": value for name, value in state.parameters.items()}
        arrays |= {f"optimizer.{name}": value for name, value in named(state.optimizer).items()}
        mx.save_safetensors(str(partial / ARRAYS), arrays, {"format": "mlx"})
        (partial / FACTS).write_text(json.dumps({"step": state.step, **state.facts}), encoding="utf-8")
        for file in partial.iterdir():
            _flush(file)
        os.rename(partial, folder)
        _flush(folder.parent)
    except (OSError, RuntimeError) as error:  # MLX raises the second
        shutil.rmtree(partial, ignore_errors=True)
        last = latest(out)
        rest = f"the last complete one is {last}" if last else "there is none before it"
        raise RodimusError(f"checkpoint {folder} cannot be written: {_reason(error)}; {rest}") from error
    for old in _complete(out)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def latest(out: Path) -> Path | None:
    """The checkpoint of the highest step, or None."""
    return next(reversed(_complete(out)), None)


def read_facts(folder: Path) -> dict[str, Any]:
    """What the trainer remembers, and the step.

    Raises:
        RodimusError: it is damaged.
    """
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        return {**facts, "step": facts["step"], "identity": facts["identity"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RodimusError(f"checkpoint {folder} cannot be read: {error}") from error


def load(folder: Path, like: State) -> State:
    """Read a checkpoint.

    Args:
        like: the run at its start, whose names and structure the saved one must have.

    Raises:
        RodimusError: it is damaged, or of another kind of run.
    """
    facts = read_facts(folder)
    try:
        arrays = read(folder / ARRAYS)
        # In the run's own order, not the file's: sums over all of them, like the gradients' norm, follow it.
        parameters = {name: arrays[f"parameters.{name}"] for name in like.parameters}
        optimizer = tree_map_with_path(lambda path, _: arrays[f"optimizer.{path}"], like.optimizer)
        step = facts.pop("step")
        mx.eval(parameters, optimizer)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise RodimusError(f"checkpoint {folder} cannot be read: {error}") from error
    return State(step, parameters, optimizer, facts)


def _complete(out: Path) -> list[Path]:
    return sorted(path for path in (out / FOLDER).glob("[0-9]*") if (path / FACTS).is_file())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot, for folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    return getattr(error, "strerror", None) or " ".join(str(error).split())
