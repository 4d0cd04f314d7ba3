"""A file of text to windows of tokens, and windows to batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import RodimusError
from ..finetune.data import load_data, tokenize
from ..generation import encode_text
from ..tokenizer import is_chat_model


class Window(NamedTuple):
    """Tokens that are read from an empty state on; the targets from number ``scored`` on count."""

    tokens: np.ndarray  # [n + 1] int32: n inputs, and the target of each is the next token
    scored: int

    @property
    def length(self) -> int:
        """Inputs."""
        return len(self.tokens) - 1


class Rows(NamedTuple):
    """Windows side by side, padded on the right."""

    tokens: np.ndarray  # [R, L] int32
    targets: np.ndarray  # [R, L] int32
    counts: np.ndarray  # [R, L] bool: which targets count
    lengths: np.ndarray  # [R] inputs of each window


def read_documents(file: str | Path, tokenizer: Any, max_tokens: int | None = None) -> list[np.ndarray]:
    """The tokens of each document of a file.

    A ``.jsonl`` file has a document a line, in one of mlx-lm's formats (text, prompt and completion, or messages);
    each gets the end token. Any other file is one document of plain text.

    Args:
        max_tokens: stop after so many.

    Raises:
        RodimusError: the file cannot be read, is empty, or a line of it is wrong.
    """
    file = Path(file)
    if not file.is_file():
        raise RodimusError(f"there is no file {file}; give a text, or a .jsonl with a document a line")
    if tokenizer is None:
        raise RodimusError("the model has no tokenizer, which reading text needs")
    if file.suffix == ".jsonl":
        records, _ = load_data(file)
        samples = tokenize(records, tokenizer, mask_prompt=False, chat=is_chat_model(tokenizer))
        documents = [sample.tokens for sample in samples]
    else:
        documents = [np.asarray(encode_text(tokenizer, _read(file)), np.int32)]
    documents = [document for document in documents if len(document) > 1]
    if not documents:
        raise RodimusError(f"{file} is too short: there is no token after the first")
    return documents if max_tokens is None else _first(documents, max_tokens)


def windows(documents: Sequence[np.ndarray], window: int, stride: int) -> list[Window]:
    """Cut documents into windows of at most ``window`` inputs, one every ``stride`` tokens.

    Every target counts once, in the first window that has it: the first window's all, then each one's last
    ``stride``. Documents do not see each other.
    """
    result = []
    for document in documents:
        done = 0  # targets that have counted
        for start in range(0, len(document) - 1, stride):
            tokens = document[start : start + window + 1]
            result.append(Window(tokens, done - start))
            done = start + len(tokens) - 1
            if done == len(document) - 1:
                break
    return result


def batches(all_windows: Sequence[Window], size: int) -> Iterator[Rows]:
    """Rows of at most ``size`` windows, those of like length together, the longest first."""
    order = sorted(all_windows, key=lambda window: -window.length)
    for i in range(0, len(order), size):
        yield _rows(order[i : i + size])


def _rows(group: Sequence[Window]) -> Rows:
    shape = (len(group), max(window.length for window in group))
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    counts = np.zeros(shape, bool)
    for r, window in enumerate(group):
        tokens[r, : window.length] = window.tokens[:-1]
        targets[r, : window.length] = window.tokens[1:]
        counts[r, window.scored : window.length] = True
    return Rows(tokens, targets, counts, np.array([window.length for window in group]))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RodimusError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise RodimusError(f"{file} cannot be read: {error.strerror or error}") from error


def _first(documents: list[np.ndarray], max_tokens: int) -> list[np.ndarray]:
    kept: list[np.ndarray] = []
    for document in documents:
        if max_tokens < 2:
            break
        kept.append(document[:max_tokens])
        max_tokens -= len(kept[-1])
    return kept
