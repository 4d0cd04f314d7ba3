"""Text in pieces gives the tokens of the whole text."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rodimus_mlx.errors import RodimusError
from rodimus_mlx.states import text_stream
from rodimus_mlx.states.text_stream import text_pieces, token_pieces

CORPUS = "def f(x):\n    return x + 12345\n\n\nclass A:\n  pass  # it's a 'test'...\n" * 50

# The pattern of most tokenizers since: words with the space before them, up to three digits, runs of line ends.
MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(split: Any) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([CORPUS], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {
    "gpt2": trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "modern": trained(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(MODERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    ),
}

texts = st.lists(
    st.sampled_from(["def", " f", "(", "x", "  ", "\n", "\r\n", "\t", "12", " 345", "...", "'s", "é", "_", "漢", ")"]),
    max_size=60,
).map("".join)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=texts, data=st.data())
def test_any_cutting_gives_the_tokens_of_the_whole(kind: str, text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    tokenizer = TOKENIZERS[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_stream, "ENOUGH", 4)
        found = [token for piece in token_pieces(tokenizer, pieces) for token in piece]
    assert found == tokenizer.encode(text)


def test_memory_is_bounded_without_any_place_to_cut() -> None:
    longest = 0

    class Counting:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            nonlocal longest
            longest = max(longest, len(text))
            return [0] * len(text)

    pieces = token_pieces(Counting(), ("x" * 5000 for _ in range(100)))
    assert sum(map(len, pieces)) == 500_000
    assert longest < text_stream._TOO_MANY + 5001


def read(data: bytes, monkeypatch: pytest.MonkeyPatch) -> str:
    """What comes out of a pipe, three bytes at a time."""
    monkeypatch.setattr(text_stream, "_READ", 3)
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        return "".join(text_pieces(file))


def test_characters_across_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "aé漢😀 b"
    assert read(text.encode(), monkeypatch) == text


@pytest.mark.parametrize(
    ("data", "where"), [(b"abcdef\xff", 6), (b"abcd\xe6\xbc", 4), (b"a\xf0\x9f\x98", 1)], ids=["bad", "cut", "cut4"]
)
def test_not_utf8(data: bytes, where: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RodimusError, match=f"standard input is not UTF-8 text: .* at byte {where}$"):
        read(data, monkeypatch)
