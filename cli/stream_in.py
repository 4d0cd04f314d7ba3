"""``generate --stream-in``: standard input read for as long as it comes, in constant memory."""

from __future__ import annotations

import signal
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import RodimusError
from .progress import ByteProgress

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MARK = "\ue000stdin\ue000"  # private use: in nobody's text


class Reading(NamedTuple):
    """How many tokens were read, the last of them, from which generation starts, and tokens a second."""

    count: int
    last: list[int]
    rate: float


def read_standard_input(model: Any, tokenizer: Any, cache: Any, before: str, after: str) -> Reading:
    """Move the cache on over ``before``, standard input and ``after``. Ctrl-C ends the input, not the command."""
    from itertools import chain

    from ..generation import encode_text
    from ..states.reading import read_stream
    from ..states.text_stream import text_pieces, token_pieces

    parts = chain([before], _until_interrupt(text_pieces(sys.stdin.buffer)))
    pieces = chain(token_pieces(tokenizer, parts), (encode_text(tokenizer, after) for _ in [after] if after))
    begin = time.perf_counter()
    with ByteProgress("Reading", unit=" tokens") as progress:
        count, last = read_stream(model, cache, pieces, lambda done: progress(done, None))
    if not last:
        raise RodimusError("standard input is empty: there is nothing to continue")
    return Reading(count, last, count / (time.perf_counter() - begin))


def frame(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[str, str]:
    """What the chat template puts before and after standard input, which takes the place of MARK in the messages."""
    from ..generation import render_conversation

    before, _, after = render_conversation(tokenizer, messages).partition(MARK)
    return before, after


def _until_interrupt(texts: Iterator[str]) -> Iterable[str]:
    """The texts up to their end or to Ctrl-C, which ends the wait for more but never a computation half-way."""
    waiting = stopped = False

    def handle(*_: object) -> None:
        nonlocal stopped
        stopped = True
        if waiting:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, handle)
    try:
        while not stopped:
            try:
                waiting = True
                text = next(texts)
            except (KeyboardInterrupt, StopIteration):
                return
            finally:
                waiting = False
            yield text
    finally:
        signal.signal(signal.SIGINT, previous)
