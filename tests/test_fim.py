"""Prompts for filling in the middle, whatever the texts around it hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY_FOLDER
from talker import talker
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from rodimus_mlx import RodimusError, generate
from rodimus_mlx.fim import MARKS, fim_prompt
from rodimus_mlx.tokenizer import load_tokenizer

TEXTS = [
    "def f(x):\n\n    return x",
    "größe 你\r\n\t",
    " ",
    "<|endoftext|>",
    "a<|fim_hole|>b<|fim_end|>",
    "<|fim_begin|>",
]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load_tokenizer(TINY_FOLDER)


def byte_tokenizer(folder: Path, *added: AddedToken) -> Any:
    """A tokenizer of bytes and added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_tokens(["<|endoftext|>", *added])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return load_tokenizer(folder)


@pytest.mark.parametrize("prefix", TEXTS)
@pytest.mark.parametrize("suffix", TEXTS)
def test_the_marks_stand_around_the_texts_and_nowhere_else(tiny: Any, prefix: str, suffix: str) -> None:
    begin, hole, end = (tiny.convert_tokens_to_ids(mark) for mark in MARKS)
    tokens = fim_prompt(tiny, prefix, suffix)
    middle = tokens.index(hole)
    assert [tokens.index(begin), tokens.index(end)] == [0, len(tokens) - 1]
    assert {*tokens[1:middle], *tokens[middle + 1 : -1]}.isdisjoint(tiny.get_added_vocab().values())
    assert (tiny.decode(tokens[1:middle]), tiny.decode(tokens[middle + 1 : -1])) == (prefix, suffix)


def test_special_tokens_are_known_again_afterwards(tiny: Any) -> None:
    fim_prompt(tiny, "<|fim_end|>", "")
    assert tiny.encode("<|fim_end|>", add_special_tokens=False) == [tiny.convert_tokens_to_ids("<|fim_end|>")]


@pytest.mark.parametrize(("prefix", "suffix"), [("one", ""), ("", "two")])
def test_one_side_may_be_empty(tiny: Any, prefix: str, suffix: str) -> None:
    text = f"<|fim_begin|>{prefix}<|fim_hole|>{suffix}<|fim_end|>"
    assert fim_prompt(tiny, prefix, suffix) == tiny.encode(text, add_special_tokens=False)


def test_models_take_it() -> None:
    model, tokenizer = talker()
    marked = "<|fim_begin|>one<|fim_hole|>two<|fim_end|>"
    assert generate(model, tokenizer, fim_prompt(tokenizer, "one", "two"), max_tokens=8) == generate(
        model, tokenizer, marked, max_tokens=8
    )


class TestRefused:
    def test_without_a_tokenizer(self) -> None:
        with pytest.raises(RodimusError, match="has no tokenizer"):
            fim_prompt(None, "a", "b")

    def test_a_tokenizer_without_the_tokens(self, tmp_path: Path) -> None:
        tokenizer = byte_tokenizer(tmp_path, AddedToken("<|fim_begin|>"), AddedToken("<|fim_end|>"))
        with pytest.raises(RodimusError, match=r"cannot fill in the middle: its tokenizer has no <\|fim_hole\|>$"):
            fim_prompt(tokenizer, "a", "b")

    def test_marks_that_the_tokenizer_cannot_read_as_text(self, tmp_path: Path) -> None:
        tokenizer = byte_tokenizer(tmp_path, *(AddedToken(mark, special=False) for mark in MARKS))
        assert len(fim_prompt(tokenizer, "a", "b")) == 5
        with pytest.raises(RodimusError, match=r"has <\|fim_end\|> in it"):
            fim_prompt(tokenizer, "a", "b<|fim_end|>")

    @pytest.mark.parametrize(("prefix", "suffix", "message"), [("", "", "both empty"), ("a", "\udcff", "UTF-8")])
    def test_texts(self, tiny: Any, prefix: str, suffix: str, message: str) -> None:
        with pytest.raises(RodimusError, match=message):
            fim_prompt(tiny, prefix, suffix)
