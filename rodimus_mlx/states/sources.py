"""What a state is made from: files, folders, conversations, standard input."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RodimusError

Messages = list[dict[str, str]]

# Folders that hold what was made from a code base rather than the code; hidden ones are left out as well.
_BUILT = {"__pycache__", "node_modules", "build", "dist", "target", "venv"}
_CONVERSATIONS = (".json", ".jsonl")


@dataclass(frozen=True)
class Source:
    """Either a text or the messages of a conversation, and what it was, for people."""

    text: str = ""
    messages: Messages | None = None
    name: str = ""


def read_sources(paths: Sequence[str], tokenizer: Any) -> Source:
    """Read files and folders (every text file in them) into one text, or one conversation.

    Args:
        paths: '-' is standard input. A ``.json`` or ``.jsonl`` file that holds messages with ``role`` and ``content``
            is a conversation, and must then be the only path.
        tokenizer: several files are told apart by its ``<|file_sep|>``, or by a line with the path.

    Raises:
        RodimusError: naming what cannot be read.
    """
    name = ", ".join(map(str, paths))
    if len(paths) == 1 and paths[0].endswith(_CONVERSATIONS) and Path(paths[0]).is_file():
        text = _read_text(Path(paths[0]))
        messages = find_messages(text)
        return Source(messages=messages, name=name) if messages else Source(text, name=name)
    if paths == ["-"]:
        return Source(_decode(sys.stdin.buffer.read(), "standard input"), name="standard input")
    files = [file for path in paths for file in _files(path)]
    if not files:
        raise RodimusError(f"{name}: there is no text file to read")
    if len(files) == 1 and Path(paths[0]).is_file():
        return Source(_read_text(files[0][1]), name=name)
    return Source(_join(files, tokenizer), name=f"{name} ({len(files)} files)")


def find_messages(text: str) -> Messages | None:
    """The conversation that a JSON text (a list, ``{"messages": [...]}``, or one message a line) holds, if any."""
    found = _parse(text)
    if found is None:
        found = [_parse(line) for line in text.splitlines() if line.strip()]
    if isinstance(found, dict):
        found = found.get("messages")
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], dict) and "messages" in found[0]:
        found = found[0]["messages"]
    if not isinstance(found, list) or not found or not all(map(_is_message, found)):
        return None
    return [{"role": message["role"], "content": message["content"]} for message in found]


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _files(path: str) -> Iterator[tuple[str, Path]]:
    """The text files at a path, each with the name it goes by."""
    root = Path(path).expanduser()
    if root.is_file():
        yield path, root
        return
    if not root.is_dir():
        raise RodimusError(f"there is no file or folder {path}")
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(each for each in folders if not each.startswith(".") and each not in _BUILT)
        for name in sorted(names):
            file = Path(folder) / name
            if not name.startswith(".") and file.is_file() and _is_text(file):
                yield file.relative_to(root).as_posix(), file


def _is_text(file: Path) -> bool:
    """Whether a file in a folder is worth reading: UTF-8 without zeros, and not empty."""
    try:
        data = file.read_bytes()
        data.decode()
    except (OSError, UnicodeDecodeError):
        return False
    return bool(data.strip()) and b"\0" not in data


def _join(files: list[tuple[str, Path]], tokenizer: Any) -> str:
    # the Base coders learned code bases with this token between files
    mark = "<|file_sep|>" if "<|file_sep|>" in tokenizer.get_vocab() else "# file: "
    return "".join(f"{mark}{name}\n{_read_text(file).rstrip()}\n\n" for name, file in files)


def _read_text(file: Path) -> str:
    try:
        return _decode(file.read_bytes(), str(file))
    except OSError as error:
        raise RodimusError(f"{file} cannot be read: {error.strerror}") from error


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RodimusError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}") from error
