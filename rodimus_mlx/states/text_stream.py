"""Endless text to tokens: in pieces, in constant memory, as the whole text would be cut into tokens."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import RodimusError

ENOUGH = 1 << 14  # characters that are worth a call of the tokenizer
_TOO_MANY = 1 << 16  # characters without a good place to cut, after which any place will do
_READ = 1 << 16  # bytes

# Byte-level tokenizers never join a line's end with the next line's start, nor a word with the next one's space.
_LINE = re.compile(r"\n(?=\S)")
_WORD = re.compile(r"(?<=\S)(?= \w)")


def text_pieces(file: Any, name: str = "standard input") -> Iterator[str]:
    """The text of a binary file, as it comes.

    Raises:
        RodimusError: it is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    while True:
        data = os.read(file.fileno(), _READ)  # unlike file.read, returns what is there
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            start = done - (len(error.object) - len(data)) + error.start
            raise RodimusError(f"{name} is not UTF-8 text: {error.reason} at byte {start}") from error
        done += len(data)
        if text:
            yield text
        if not data:
            return


def token_pieces(tokenizer: Any, texts: Iterable[str]) -> Iterator[list[int]]:
    """The tokens of texts that follow each other without a gap; each piece holds as much as came so far."""
    held = ""
    for text in texts:
        held += text
        if len(held) >= ENOUGH and (cut := _last_cut(held)):
            yield tokenizer.encode(held[:cut], add_special_tokens=False)
            held = held[cut:]
    if held:
        yield tokenizer.encode(held, add_special_tokens=False)


def _last_cut(text: str) -> int:
    """Where to cut so that tokens are those of the whole; 0: nowhere yet."""
    tail = max(0, len(text) - ENOUGH)
    for pattern in (_LINE, _WORD):
        if found := [match.end() for match in pattern.finditer(text, tail)]:
            return found[-1]
    return len(text) if len(text) > _TOO_MANY else 0
