"""Generation around mlx-lm's: prompts of three kinds, stop strings, ends."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from helpers import TINY_FOLDER
from hypothesis import given
from hypothesis import strategies as st

import rodimus_mlx
from rodimus_mlx.errors import RodimusError
from rodimus_mlx.generation import StopStrings, encode_prompt, stream_generate

PROMPT = "def f(x):"


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return rodimus_mlx.load(TINY_FOLDER)


class TestStopStrings:
    def feed(self, stops: list[str], pieces: list[str]) -> str:
        cutter, shown = StopStrings(stops), ""
        for piece in pieces:
            text, stopped = cutter.feed(piece)
            shown += text
            if stopped:
                return shown
        return shown + cutter.flush()

    @given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
    def test_any_cutting_ends_at_the_first_stop_to_appear(
        self, text: str, stops: list[str], data: st.DataObject
    ) -> None:
        # one letter at a time: the first prefix that ends in a stop string decides
        ends = [
            (end, max(len(s) for s in stops if text[:end].endswith(s)))
            for end in range(1, len(text) + 1)
            if any(text[:end].endswith(s) for s in stops)
        ]
        expected = text[: ends[0][0] - ends[0][1]] if ends else text
        assert self.feed(stops, list(text)) == expected
        # coarser pieces may hold several stops: then the earliest to begin decides
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        shown = self.feed(stops, pieces)
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
        assert (shown == text) == (not any(stop in text for stop in stops))

    def test_what_only_begins_a_stop_is_shown_in_the_end(self) -> None:
        assert self.feed(["<role>"], ["a <ro", "le", " b <rol"]) == "a <role b <rol"

    def test_nothing_of_a_stop_is_shown_early(self) -> None:
        cutter = StopStrings(["\n\n", "END"])
        assert [cutter.feed(piece)[0] for piece in ("a", "\n", "b", " E", "N", "x")] == ["a", "", "\nb", " ", "", "ENx"]


class TestStream:
    def test_equals_mlx_lm(self, tiny: tuple[Any, Any]) -> None:
        assert rodimus_mlx.generate(*tiny, PROMPT, max_tokens=20) == mlx_lm.generate(*tiny, PROMPT, max_tokens=20)

    def test_stop_string_across_tokens(self, tiny: tuple[Any, Any]) -> None:
        whole = rodimus_mlx.generate(*tiny, PROMPT, max_tokens=20)
        stop = whole[8:11]  # each token is one letter
        responses = list(stream_generate(*tiny, PROMPT, max_tokens=20, stop=[stop]))
        assert "".join(r.text for r in responses) == whole[: whole.index(stop)]
        assert responses[-1].finish_reason == "stop"
        assert all(r.finish_reason is None for r in responses[:-1])

    def test_length(self, tiny: tuple[Any, Any]) -> None:
        responses = list(stream_generate(*tiny, PROMPT, max_tokens=7))
        assert (len(responses), responses[-1].generation_tokens, responses[-1].finish_reason) == (7, 7, "length")

    def test_end_token(self, tiny: tuple[Any, Any]) -> None:
        model, tokenizer = tiny

        def end_next(_: mx.array) -> mx.array:
            return mx.array([tokenizer.eos_token_id])

        responses = list(stream_generate(model, tokenizer, PROMPT, sampler=end_next))
        assert [(r.text, r.finish_reason) for r in responses] == [("", "stop")]

    def test_a_role_tag_ends_an_answer_but_not_a_text(self, tiny: tuple[Any, Any]) -> None:
        model, tokenizer = tiny
        script = tokenizer.encode("yes<role>HUMAN</role>")

        def answer(prompt: Any) -> str:
            tokens = iter(script)
            return rodimus_mlx.generate(
                model, tokenizer, prompt, max_tokens=len(script), sampler=lambda _: mx.array([next(tokens, 0)])
            )

        assert answer([{"role": "user", "content": "well?"}]) == "yes"
        assert answer("well?") == "yes<role>HUMAN</role>"


class TestEncode:
    def test_three_kinds_of_prompt(self, tiny: tuple[Any, Any]) -> None:
        model, tokenizer = tiny
        text = "<role>SYSTEM</role>s<role>HUMAN</role>u<role>ASSISTANT</role>"
        messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
        tokens = tokenizer.encode(text)
        assert encode_prompt(model, tokenizer, text) == tokens
        assert encode_prompt(model, tokenizer, messages) == tokens
        assert encode_prompt(model, tokenizer, tokens) == tokens
        assert encode_prompt(model, tokenizer, mx.array(tokens)) == tokens

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ("", "the prompt is empty"),
            ([], "the prompt is empty"),
            ([5, 400], "token 400, but the model's vocab_size is 262"),
            ([-1, 5], "token -1, but"),
            ("\udcff", "not valid UTF-8"),
            ([{"role": "judge", "content": "x"}], "chat template cannot write this conversation: the role is judge"),
            ([{"content": "x"}], "chat template cannot write this conversation"),
        ],
    )
    def test_refused(self, tiny: tuple[Any, Any], prompt: Any, message: str) -> None:
        with pytest.raises(RodimusError, match=message):
            encode_prompt(*tiny, prompt)

    def test_no_tokenizer(self, tiny: tuple[Any, Any]) -> None:
        with pytest.raises(RodimusError, match=r"put its tokenizer\.json or tokenizer\.model into"):
            rodimus_mlx.generate(tiny[0], None, "x")
