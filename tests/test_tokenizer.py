"""Tokenizers from their files alone: classes, special tokens, streaming, chat template, end tokens."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from helpers import TINY_FOLDER
from hypothesis import given, settings
from hypothesis import strategies as st
from make_tiny import write_tokenizer

from rodimus_mlx.errors import RodimusError, RodimusWarning
from rodimus_mlx.tokenizer import CHAT_TEMPLATE, is_chat_model, load_tokenizer

TEXT = "def f(x):\n    return  x  # é 你 😀 <role>HUMAN</role>\n\n  end"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A byte-level tokenizer; ids 256 and 257 are bos and eos."""
    made = tmp_path / "base"
    made.mkdir()
    write_tokenizer(made)
    return made


def configure(folder: Path, **settings: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def streamed(tokenizer: Any, tokens: list[int]) -> str:
    detokenizer = tokenizer.detokenizer
    pieces = []
    for token in tokens:
        detokenizer.add_token(token)
        pieces.append(detokenizer.last_segment)
    detokenizer.finalize()
    return "".join([*pieces, detokenizer.last_segment])


class TestTokenizerJson:
    def test_a_custom_class_is_read_without_its_code(self, folder: Path) -> None:
        configure(folder, tokenizer_class="RodimusTokenizer", auto_map={"AutoTokenizer": ["trap.Tokenizer", None]})
        (folder / "trap.py").write_text("raise SystemExit('this code must not run')")
        tokenizer = load_tokenizer(folder)
        assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
        assert "auto_map" not in tokenizer.init_kwargs

    def test_special_tokens_and_padding(self, folder: Path) -> None:
        tokenizer = load_tokenizer(folder)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 257)
        assert tokenizer.padding_side == "left"
        assert tokenizer.encode("hi") == tokenizer.encode("hi", add_special_tokens=False)  # no bos
        assert tokenizer.encode("<|fim_hole|>") == [259]

    def test_pad_and_end_are_found_without_a_config(self, folder: Path) -> None:
        (folder / "tokenizer_config.json").unlink()
        tokenizer = load_tokenizer(folder)
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_ids) == (257, 257, {257})

    def test_streaming_keeps_every_character(self, folder: Path) -> None:
        tokenizer = load_tokenizer(folder)
        assert streamed(tokenizer, tokenizer.encode(TEXT)) == TEXT
        assert streamed(tokenizer, tokenizer.encode(" x")) == " x"  # a continuation may begin with a space

    @given(st.text(max_size=30))
    @settings(max_examples=50, deadline=None)
    def test_streaming_any_text(self, text: str) -> None:
        text = text.replace("\0", "")  # mlx-lm's byte table has no NUL
        tiny = load_tokenizer(TINY_FOLDER)
        assert streamed(tiny, tiny.encode(text)) == text

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": 3}'])
    def test_damaged(self, folder: Path, content: str) -> None:
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(RodimusError, match=r"tokenizer\.json"):
            load_tokenizer(folder)

    @pytest.mark.parametrize(
        "content", ['{"eos_token": 7}', '{"added_tokens_decoder": 5}', '{"model_max_length": "x"}']
    )
    def test_damaged_settings(self, folder: Path, content: str) -> None:
        (folder / "tokenizer_config.json").write_text(content)
        with pytest.raises(RodimusError, match=r"tokenizer_config\.json"):
            load_tokenizer(folder)


class TestSentencePiece:
    @pytest.fixture(params=["bpe", "unigram"])
    def folder(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["def f(x): return x"] * 50 + ["the quick brown fox"] * 50),
            model_writer=written,
            model_type=request.param,
            vocab_size=280,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            control_symbols=["<|endoftext|>"],
            minloglevel=2,
        )
        (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
        settings = {"tokenizer_class": "RodimusTokenizer", "eos_token": {"content": "<|endoftext|>"}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return tmp_path

    def test_equals_sentencepiece(self, folder: Path) -> None:
        tokenizer = load_tokenizer(folder)
        reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        assert tokenizer.encode(TEXT, add_special_tokens=False) == reference.encode(TEXT)
        assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT

    def test_streaming_and_ends(self, folder: Path) -> None:
        tokenizer = load_tokenizer(folder)
        # what sentencepiece puts before a text, and a continuation does not lose
        assert streamed(tokenizer, tokenizer.encode(TEXT)) == " " + TEXT
        assert tokenizer.eos_token_ids == {tokenizer.encode("<|endoftext|>")[-1]} == {tokenizer.pad_token_id}

    def test_damaged(self, folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(b"junk")
        with pytest.raises(RodimusError, match=r"tokenizer\.model cannot be read as a sentencepiece model"):
            load_tokenizer(folder)


class TestEnds:
    def test_every_file_that_names_one(self, folder: Path) -> None:
        (folder / "config.json").write_text('{"eos_token_id": 3}')
        (folder / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
        assert load_tokenizer(folder).eos_token_ids == {3, 4, 5, 257}

    @pytest.mark.parametrize("ends", ['"x"', "[null]", "-5", "1.5", "true"])
    def test_what_is_no_token(self, folder: Path, ends: str) -> None:
        (folder / "generation_config.json").write_text(f'{{"eos_token_id": {ends}}}')
        with pytest.raises(RodimusError, match=r"generation_config\.json: eos_token_id must be a token id"):
            load_tokenizer(folder)

    def test_none_named(self, folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        content["added_tokens"] = []
        (folder / "tokenizer.json").write_text(json.dumps(content))
        (folder / "tokenizer_config.json").write_text("{}")
        with pytest.warns(RodimusWarning, match="names no end token"):
            assert load_tokenizer(folder).eos_token_ids == set()


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    with pytest.warns(RodimusWarning, match=r"has no tokenizer\.json and no tokenizer\.model"):
        assert load_tokenizer(tmp_path) is None


class TestChat:
    def render(self, folder: Path, *messages: tuple[str, Any], ask: bool = True) -> str:
        conversation = [{"role": role, "content": content} for role, content in messages]
        return load_tokenizer(folder).apply_chat_template(conversation, tokenize=False, add_generation_prompt=ask)

    def test_built_in_template(self, folder: Path) -> None:
        text = self.render(folder, ("system", "S"), ("user", "U1"), ("assistant", "A1"), ("HUMAN", " U2\n"))
        assert text == (
            "<role>SYSTEM</role>S<role>HUMAN</role>U1<role>ASSISTANT</role>A1<role>HUMAN</role> U2\n"
            "<role>ASSISTANT</role>"
        )

    def test_tools_parts_and_no_answer_asked(self, folder: Path) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        text = self.render(folder, ("Tool", parts), ("observation", "c"), ("assistant", None), ask=False)
        assert text == "<role>OBSERVATION</role>ab<role>OBSERVATION</role>c<role>ASSISTANT</role>"

    def test_unknown_role(self, folder: Path) -> None:
        with pytest.raises(Exception, match="the role is judge, but must be system, user, assistant or tool"):
            self.render(folder, ("judge", "x"))

    def test_the_checkpoints_own_template_wins(self, folder: Path) -> None:
        configure(folder, chat_template="own")
        assert self.render(folder, ("user", "x")) == "own"

    @pytest.mark.parametrize(
        ("settings", "name", "expected"),
        [
            ({}, "Rodimus-Plus-Coder-1.6B-Base", False),
            ({}, "Rodimus-Plus-Coder-1.6B-Chat", True),
            ({}, "rodimus_instruct_4bit", True),
            ({}, "chateau", False),
            ({"chat_template": "own"}, "base", True),
            ({"chat_template": CHAT_TEMPLATE}, "base", False),
            ({"is_chat_model": False, "chat_template": "own"}, "chat", False),
            ({"is_chat_model": True}, "base", True),
        ],
    )
    def test_is_chat_model(self, folder: Path, settings: dict[str, Any], name: str, expected: bool) -> None:
        configure(folder, **settings)
        assert is_chat_model(load_tokenizer(folder, name)) is expected

    def test_no_tokenizer_is_no_chat_model(self) -> None:
        assert is_chat_model(None) is False
