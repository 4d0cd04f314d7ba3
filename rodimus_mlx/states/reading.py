"""Moving a cache on over tokens, however many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx

from .snapshot import Cache, evaluate

PREFILL_STEP = 2048  # tokens in one call of the model, as in mlx-lm

Progress = Callable[[int, int], None]


def read_tokens(model: Any, cache: Cache, tokens: Sequence[int], progress: Progress | None = None) -> None:
    """Move the cache on over all the tokens; ``progress`` is called with (tokens done, tokens in all)."""
    for begin in range(0, len(tokens), PREFILL_STEP):
        piece = tokens[begin : begin + PREFILL_STEP]
        model(mx.array(list(piece))[None], cache=cache)  # the logits are never computed: nobody asks for them
        evaluate(cache)
        if progress is not None:
            progress(begin + len(piece), len(tokens))
    mx.clear_cache()


def read_stream(
    model: Any, cache: Cache, pieces: Iterable[Sequence[int]], progress: Callable[[int], None] | None = None
) -> tuple[int, list[int]]:
    """Move the cache on over all tokens but the last, from which generation starts.

    Memory does not grow with their number. ``progress`` is called with the tokens read so far.

    Returns: how many tokens there were, and the last one, in a list; (0, []) where there were none.
    """
    count, waiting = 0, list[int]()
    for piece in pieces:
        waiting += piece
        if len(waiting) > PREFILL_STEP:
            ready, waiting = waiting[:-1], waiting[-1:]
            read_tokens(model, cache, ready)
            count += len(ready)
            if progress is not None:
                progress(count)
    read_tokens(model, cache, waiting[:-1])
    return count + len(waiting), waiting[-1:]
