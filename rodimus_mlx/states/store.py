"""The folder of named states: ``~/.rodimus-mlx/states``, or ``states`` in the folder that RODIMUS_HOME names."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import RodimusError

SUFFIX = ".safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def home() -> Path:
    """Where this user's states and chat history are."""
    return Path(os.environ.get("RODIMUS_HOME") or "~/.rodimus-mlx").expanduser()


def state_path(name: str) -> Path:
    """The file of a named state, whether it exists or not.

    Raises:
        RodimusError: the name is not one.
    """
    if not _NAME.fullmatch(name) or name.endswith(SUFFIX):
        raise RodimusError(f"{name!r} cannot be a state's name: use letters, digits, '.', '_' and '-'")
    return home() / "states" / (name + SUFFIX)


def named_state(name: str) -> Path:
    """The file of a named state that exists.

    Raises:
        RodimusError: the name is not one, or there is none.
    """
    path = state_path(name)
    if not path.is_file():
        known = ", ".join(state_names())
        others = f"; there are: {known}" if known else ", and no other: `rodimus-mlx state make` makes them"
        raise RodimusError(f"there is no state {name}{others}")
    return path


def find_state(name_or_path: str) -> Path:
    """The file of a state that exists, by its name or, with a slash or ``.safetensors``, by its path.

    Raises:
        RodimusError: there is none.
    """
    if "/" in name_or_path or "\\" in name_or_path or name_or_path.endswith(SUFFIX):
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise RodimusError(f"there is no file {name_or_path}")
        return path
    return named_state(name_or_path)


def state_names() -> list[str]:
    """All named states, sorted."""
    folder = home() / "states"
    names = [path.name.removesuffix(SUFFIX) for path in folder.glob(f"*{SUFFIX}")] if folder.is_dir() else []
    return sorted(name for name in names if _NAME.fullmatch(name))


def delete_state(name: str) -> None:
    """Delete a named state.

    Raises:
        RodimusError: there is none, or it cannot be deleted.
    """
    path = named_state(name)
    try:
        path.unlink()
    except OSError as error:
        raise RodimusError(f"{path} cannot be deleted: {error.strerror}") from error
