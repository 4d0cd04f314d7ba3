"""Filling in the middle: the prompt of models that were trained to write what stands between two texts."""

from __future__ import annotations

from typing import Any

from .errors import RodimusError

MARKS = ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")


def fim_prompt(tokenizer: Any, prefix: str, suffix: str) -> list[int]:
    """Token ids after which a model writes what belongs between two texts, and then its end token.

    They are ``<|fim_begin|>prefix<|fim_hole|>suffix<|fim_end|>``, the layout of the released Rodimus+ coders and of
    ``examples/train_small``. In the two texts the names of special tokens are plain text. Usage::

        generate(model, tokenizer, fim_prompt(tokenizer, "def double(x):", "    return y"))

    Args:
        tokenizer: what ``load`` returned.
        prefix, suffix: what stands before and after; one of them may be empty.

    Raises:
        RodimusError: there is no tokenizer, it lacks the three tokens, both texts are empty, or one is not Unicode.
    """
    if tokenizer is None:
        raise RodimusError("this checkpoint has no tokenizer, so it cannot read or write text")
    vocab = tokenizer.get_vocab()
    if missing := [mark for mark in MARKS if mark not in vocab]:
        raise RodimusError(f"this model cannot fill in the middle: its tokenizer has no {missing[0]}")
    if not prefix and not suffix:
        raise RodimusError("prefix and suffix are both empty: there is nothing to fill in between")
    begin, hole, end = (vocab[mark] for mark in MARKS)
    before, after = (_encode_plain(tokenizer, text) for text in (prefix, suffix))
    for mark in MARKS:  # where they are added tokens but not special ones, nothing keeps the tokenizer from them
        if vocab[mark] in {*before, *after}:
            raise RodimusError(f"the text around the middle has {mark} in it, which this tokenizer never reads as text")
    return [begin, *before, hole, *after, end]


def _encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text in which no special token is recognised."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RodimusError("the prompt is not valid UTF-8 text") from error
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
