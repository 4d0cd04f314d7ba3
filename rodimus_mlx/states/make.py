"""Reading something once into a state."""

from __future__ import annotations

import json
from typing import Any

from ..errors import RodimusError
from ..generation import encode_prompt, render_conversation
from .file import State, StateInfo
from .reading import Progress, read_tokens
from .snapshot import snapshot
from .sources import Messages, Source

_MOST_MESSAGES = 1_000_000  # characters of a conversation that go along in the file's metadata


def make_state(
    model: Any,
    tokenizer: Any,
    source: Source,
    *,
    chat: bool = False,
    system: str | None = None,
    start: State | None = None,
    model_name: str = "",
    progress: Progress | None = None,
) -> State:
    """Read a source into a new state.

    Args:
        source: a conversation is written by the chat template; a text is read as it is or, with ``chat``, as a
            system message.
        system: a system message before it.
        start: a state to go on from; it stays as it is.
        model_name: kept in the info, for people and for mlx-lm.
        progress: called with (tokens done, tokens in all).

    Raises:
        RodimusError: there is nothing to read, or the tokenizer or its template cannot write it.
    """
    before = start.info.messages if start else []
    messages: Messages = [] if system is None else [{"role": "system", "content": system}]
    if source.messages is not None:
        messages += source.messages
    elif chat and source.text:
        messages.append({"role": "system", "content": source.text})
    bare = "" if chat else source.text
    text = (continuation(tokenizer, before, messages) if messages else "") + bare
    if not text:
        raise RodimusError("there is nothing to read: give files, or --system")
    tokens = encode_prompt(model, tokenizer, text)
    cache = snapshot(start.cache) if start else model.make_cache()
    read_tokens(model, cache, tokens, progress)
    known = before + messages
    unknown = bool(bare) or (start is not None and start.info.unknown)
    if bare or len(json.dumps(known)) > _MOST_MESSAGES:
        known, unknown = [], True
    parts = [start.info.source if start else "", "a system message" if system else "", source.name]
    return State(
        cache,
        StateInfo(
            tokens=(start.info.tokens if start else 0) + len(tokens),
            source=", then ".join(filter(None, parts)),
            model=model_name,
            messages=known,
            unknown=unknown,
        ),
    )


def continuation(tokenizer: Any, before: Messages, messages: Messages) -> str:
    """The text that brings a model that has read ``before`` to have read the messages too."""
    if before:
        read = render_conversation(tokenizer, before, for_answer=False)
        whole = render_conversation(tokenizer, before + messages, for_answer=False)
        if whole.startswith(read):
            return whole[len(read) :]
    return render_conversation(tokenizer, messages, for_answer=False)
