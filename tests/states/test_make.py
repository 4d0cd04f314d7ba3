"""States from files, folders and conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import random_model, tiny_config

from rodimus_mlx.errors import RodimusError
from rodimus_mlx.generation import generate
from rodimus_mlx.states import State, StateInfo, snapshot
from rodimus_mlx.states.compare import compare_states
from rodimus_mlx.states.make import make_state
from rodimus_mlx.states.reading import read_tokens
from rodimus_mlx.states.sources import Source, find_messages, read_sources

QUESTION = [{"role": "user", "content": "well?"}]
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def answer(talker: tuple[Any, Any], state: Any, prompt: Any) -> str:
    return generate(*talker, prompt, max_tokens=15, prompt_cache=snapshot(state.cache))


class TestMake:
    def test_a_text_goes_on(self, talker: tuple[Any, Any]) -> None:
        state = make_state(*talker, Source("one two ", name="t"))
        assert answer(talker, state, "three") == generate(*talker, "one two three", max_tokens=15)
        assert (state.info.tokens, state.info.source, state.info.messages) == (8, "t", [])

    @pytest.mark.parametrize(
        ("source", "options", "before"),
        [
            (Source("be kind"), {"chat": True}, [{"role": "system", "content": "be kind"}]),
            (Source(), {"system": "be kind"}, [{"role": "system", "content": "be kind"}]),
            (Source(messages=TALK), {}, TALK),
            (Source(messages=TALK), {"system": "s"}, [{"role": "system", "content": "s"}, *TALK]),
        ],
        ids=["text", "system", "conversation", "both"],
    )
    def test_a_conversation_goes_on(
        self, talker: tuple[Any, Any], source: Source, options: dict[str, Any], before: list[dict[str, str]]
    ) -> None:
        state = make_state(*talker, source, **options)
        assert (state.info.messages, state.info.unknown) == (before, False)
        assert answer(talker, state, QUESTION) == generate(*talker, before + QUESTION, max_tokens=15)

    def test_in_two_steps(self, talker: tuple[Any, Any]) -> None:
        first = make_state(*talker, Source(name="a"), system="be kind")
        both = make_state(*talker, Source(messages=TALK, name="b"), start=first)
        whole = make_state(*talker, Source(messages=TALK), system="be kind")
        assert both.info.messages == whole.info.messages
        assert both.info.tokens == whole.info.tokens
        assert both.info.source == "a system message, then a, then b"
        assert answer(talker, both, QUESTION) == answer(talker, whole, QUESTION)
        assert (
            answer(talker, both, QUESTION)
            != answer(talker, first, QUESTION)
            == generate(*talker, [*whole.info.messages[:1], *QUESTION], max_tokens=15)
        )

    def test_bare_text_after_a_conversation_is_not_part_of_it(self, talker: tuple[Any, Any]) -> None:
        talk = make_state(*talker, Source(messages=TALK))
        info = make_state(*talker, Source("x"), start=talk).info
        assert (info.messages, info.unknown) == ([], True)

    def test_nothing(self, talker: tuple[Any, Any]) -> None:
        with pytest.raises(RodimusError, match="there is nothing to read: give files, or --system"):
            make_state(*talker, Source())

    def test_long_conversations_are_read_but_not_kept_as_text(self, talker: tuple[Any, Any], monkeypatch: Any) -> None:
        monkeypatch.setattr("rodimus_mlx.states.make._MOST_MESSAGES", 50)
        info = make_state(*talker, Source("x" * 60), chat=True).info
        assert (info.messages, info.unknown) == ([], True)


class TestSources:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name, data in {
            "b.py": b"B = 1\n",
            "a/c.txt": "\u00e9t\u00e9".encode(),
            "a/image.png": b"\x89PNG\0\0",
            "a/latin.txt": b"\xe9t\xe9",
            ".git/config": b"hidden",
            "node_modules/x.js": b"built",
            "empty.txt": b" \n",
        }.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(data)
        return tmp_path

    def test_a_folder(self, folder: Path, talker: tuple[Any, Any]) -> None:
        source = read_sources([str(folder)], talker[1])
        assert source.text == "# file: b.py\nB = 1\n\n# file: a/c.txt\nété\n\n"
        assert source.name == f"{folder} (2 files)"

    def test_a_file_as_it_is(self, folder: Path, talker: tuple[Any, Any]) -> None:
        assert read_sources([str(folder / "b.py")], talker[1]) == Source("B = 1\n", name=str(folder / "b.py"))

    def test_a_code_models_own_mark(self, folder: Path) -> None:
        class Coder:
            def get_vocab(self) -> dict[str, int]:
                return {"<|file_sep|>": 7}

        assert read_sources([str(folder / "b.py"), str(folder / "a")], Coder()).text.startswith("<|file_sep|>")

    @pytest.mark.parametrize(
        "text",
        [
            json.dumps(TALK),
            json.dumps({"messages": TALK, "id": 3}),
            "\n".join(map(json.dumps, TALK)),
            json.dumps({"messages": TALK}) + "\n",
        ],
        ids=["list", "object", "lines", "one line"],
    )
    def test_conversations(self, text: str, tmp_path: Path, talker: tuple[Any, Any]) -> None:
        file = tmp_path / "talk.jsonl"
        file.write_text(text)
        assert read_sources([str(file)], talker[1]).messages == TALK

    @pytest.mark.parametrize("text", ["", "[]", "{}", "[1]", '[{"role": "user"}]', "not json", "[" * 100000])
    def test_other_json_is_text(self, text: str) -> None:
        assert find_messages(text) is None

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("absent", "there is no file or folder .*absent"),
            ("a/latin.txt", "latin.txt is not UTF-8 text: .* at byte 0"),
            ("node_modules/../.git", "there is no text file to read"),
        ],
    )
    def test_refused(self, name: str, message: str, folder: Path, talker: tuple[Any, Any]) -> None:
        (folder / ".git" / "config").unlink()
        with pytest.raises(RodimusError, match=message):
            read_sources([str(folder / name)], talker[1])


class TestCompare:
    def test_distance(self, talker: tuple[Any, Any]) -> None:
        a, b = (make_state(*talker, Source(text)) for text in ("abc", "abd"))
        assert all(each.state == each.window == 0 for each in compare_states(a, a))
        different = compare_states(a, b)
        assert len(different) == 2
        assert all(0 < each.state < 2 and each.window is not None and 0 < each.window < 2 for each in different)

    def test_of_different_models(self, talker: tuple[Any, Any]) -> None:
        other = random_model(tiny_config(d_model=24, attn_cfg={"num_heads": 2}))
        cache = other.make_cache()
        read_tokens(other, cache, [1, 2])
        with pytest.raises(RodimusError, match="they belong to different models"):
            compare_states(make_state(*talker, Source("abc")), State(cache, StateInfo(2)))
