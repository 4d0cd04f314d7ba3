"""A chat answers as if the whole conversation had been read at once, however it went back and forth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from talker import talker

from rodimus_mlx.chat import Chat
from rodimus_mlx.errors import RodimusError
from rodimus_mlx.generation import generate, render_conversation
from rodimus_mlx.states import State, load_state, save_state
from rodimus_mlx.states.make import make_state
from rodimus_mlx.states.sources import Source

COUNT = 8  # tokens of an answer; the window of the small model sees fewer than a turn has

OPTIONS: dict[str, Any] = {"max_tokens": COUNT}


def ask(chat: Chat, question: str) -> str:
    return "".join(response.text for response in chat.ask(question))


def alone(messages: list[dict[str, str]]) -> str:
    """The answer of a model that reads the whole conversation at once."""
    return generate(*talker(), messages, **OPTIONS)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.fixture
def chat() -> Chat:
    return Chat(*talker(), **OPTIONS)


class TestTurns:
    def test_every_answer_is_that_of_the_whole(self, chat: Chat) -> None:
        for question in ("one", "two", "three"):
            before = chat.line.messages
            assert ask(chat, question) == alone([*before, user(question)])
        assert [turn.question for turn in chat.turns] == ["one", "two", "three"]
        whole = render_conversation(talker()[1], chat.line.messages, for_answer=False)
        assert chat.tokens == len(talker()[1].encode(whole))

    def test_answers_depend_on_what_came_before(self, chat: Chat) -> None:
        ask(chat, "one")
        assert ask(chat, "two") != alone([user("two")])

    def test_undo(self, chat: Chat) -> None:
        ask(chat, "one")
        second = ask(chat, "two")
        assert chat.undo().answer == second
        assert ask(chat, "two") == second
        chat.undo()
        assert ask(chat, "other") == alone([*chat.line.messages[:2], user("other")])
        chat.undo()
        chat.undo()
        with pytest.raises(RodimusError, match="there is nothing to undo"):
            chat.undo()

    def test_the_same_question_again_is_not_read_again(self, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
        first = ask(chat, "one")
        chat.undo()
        read: list[int] = []
        monkeypatch.setattr("rodimus_mlx.chat.read_tokens", lambda *a: read.append(len(a[2])))
        assert ask(chat, "one") == first
        assert read == [1 + COUNT]  # the answer and the token before it

    def test_branches(self, chat: Chat) -> None:
        ask(chat, "one")
        assert chat.switch("side")
        on_side = ask(chat, "two")
        assert not chat.switch("main")
        assert len(chat.turns) == 1
        ask(chat, "other")
        chat.switch("side")
        assert [turn.answer for turn in chat.turns][1:] == [on_side]
        assert ask(chat, "three") == alone([*chat.line.messages[:4], user("three")])

    def test_states_beyond_the_limit_are_read_again(self) -> None:
        chat = Chat(*talker(), kept_bytes=1, **OPTIONS)
        for question in ("one", "two", "three"):
            ask(chat, question)
        assert chat.kept[0] == 1
        chat.undo()
        chat.undo()
        assert ask(chat, "four") == alone([*chat.line.messages[:2], user("four")])

    def test_nothing_asked(self, chat: Chat) -> None:
        with pytest.raises(RodimusError, match="the question is empty"):
            ask(chat, "")


class TestStop:
    def test_keeps_what_there_is(self, chat: Chat) -> None:
        shown = ""
        for response in chat.ask("one"):
            shown += response.text
            if len(shown) >= 3:
                chat.stop()
        assert 3 <= len(shown) < COUNT
        assert chat.turns[-1].answer == shown
        assert ask(chat, "two") == alone([user("one"), {"role": "assistant", "content": shown}, user("two")])

    def test_while_it_reads(self, chat: Chat) -> None:
        ask(chat, "one")
        assert list(chat.ask("two", lambda done, total: chat.stop())) == []
        assert len(chat.turns) == 1
        assert ask(chat, "two") == alone([*chat.line.messages[:2], user("two")])

    def test_end_tokens_and_role_tags_are_not_read(self, chat: Chat) -> None:
        tokenizer = talker()[1]
        for script in ([65, 66, tokenizer.eos_token_id], [65, 66, *tokenizer.encode("<role>HUMAN")]):
            tokens = iter(script)
            chat.options["sampler"] = lambda _, tokens=tokens: _array(next(tokens, 0))
            chat.options["max_tokens"] = len(script)
            assert ask(chat, "say it") == tokenizer.decode(script[:2])
        chat.options = OPTIONS
        assert ask(chat, "and now") == alone([*chat.line.messages[:4], user("and now")])


def _array(token: int) -> Any:
    import mlx.core as mx

    return mx.array([token])


class TestSystem:
    def test_from_the_start(self) -> None:
        chat = Chat(*talker(), system="be kind", **OPTIONS)
        assert chat.system == "be kind"
        assert ask(chat, "one") == alone([{"role": "system", "content": "be kind"}, user("one")])

    def test_changed_on_the_way(self, chat: Chat) -> None:
        ask(chat, "one")
        for text in ("be kind", "be brief"):
            chat.set_system(text)
            assert chat.system == text
            expected = alone([{"role": "system", "content": text}, *chat.line.messages[1:], user("two")])
            assert ask(chat, "two") == expected
            chat.undo()


class TestStates:
    def kept(self, chat: Chat, tmp_path: Path) -> State:
        save_state(tmp_path / "chat.safetensors", chat.model, chat.state())
        return load_state(tmp_path / "chat.safetensors", chat.model)

    def again(self, chat: Chat, tmp_path: Path) -> Chat:
        return Chat(*talker(), start=self.kept(chat, tmp_path), **OPTIONS)

    @pytest.mark.parametrize("system", [None, "be kind"])
    def test_history_survives(self, system: str | None, tmp_path: Path) -> None:
        chat = Chat(*talker(), system=system, **OPTIONS)
        ask(chat, "one")
        ask(chat, "two")
        again = self.again(chat, tmp_path)
        assert again.line.messages == chat.line.messages
        assert (again.tokens, again.system) == (chat.tokens, system)
        three = ask(chat, "three")
        assert ask(again, "three") == three
        again.undo()
        again.undo()
        assert ask(again, "other") == alone([*again.line.messages[:-2], user("other")])

    def test_before_the_first_question(self, tmp_path: Path) -> None:
        chat = Chat(*talker(), system="be kind", **OPTIONS)
        again = self.again(chat, tmp_path)
        assert ask(again, "one") == ask(chat, "one")
        assert again.tokens == chat.tokens

    def test_on_a_persona(self, tmp_path: Path) -> None:
        persona = make_state(*talker(), Source(), system="be kind")
        chat = Chat(*talker(), start=persona, **OPTIONS)
        assert ask(chat, "one") == alone([{"role": "system", "content": "be kind"}, user("one")])
        assert self.again(chat, tmp_path).turns[0].question == "one"
        chat.set_system("be brief")
        assert ask(chat, "two") == alone([{"role": "system", "content": "be brief"}, *chat.line.messages[1:-1]])

    def test_on_a_text(self, tmp_path: Path) -> None:
        manual = make_state(*talker(), Source("turn it on. "))
        chat = Chat(*talker(), start=manual, **OPTIONS)
        first = ask(chat, "how?")
        assert first == generate(*talker(), "turn it on. <role>HUMAN</role>how?<role>ASSISTANT</role>", **OPTIONS)
        again = self.again(chat, tmp_path)
        assert again.tokens == chat.tokens
        assert ask(again, "really?") == ask(chat, "really?")
        again.undo()
        with pytest.raises(RodimusError, match="what came with the state cannot be undone"):
            again.undo()
        with pytest.raises(RodimusError, match="goes on from a state that cannot take another system message"):
            again.set_system("x")

    def test_load(self, chat: Chat, tmp_path: Path) -> None:
        ask(chat, "one")
        kept = self.kept(chat, tmp_path)
        chat.switch("side")
        ask(chat, "two")
        chat.load(kept)
        assert (chat.branch, list(chat.lines), len(chat.turns)) == ("main", ["main"], 1)


class TestTemplates:
    """Templates of other models: they close turns, or write answers otherwise than they were given."""

    CLOSING = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}[end]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )

    def test_the_conversation_stays_the_templates(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(talker()[1]._tokenizer, "chat_template", self.CLOSING)
        chat = Chat(*talker(), **OPTIONS)
        tokenizer = talker()[1]
        for script, start in ((b"hi", 1), (b" hi ", 0)):
            tokens = iter(tokenizer.encode(script.decode()))
            chat.options["sampler"] = lambda _, tokens=tokens: _array(next(tokens, tokenizer.eos_token_id))
            ask(chat, "one")
            del chat.options["sampler"]
            expected = alone([*chat.line.messages, user("two")])
            assert ask(chat, "two") == expected
            assert chat.turns[-1].start == start * (len(chat.turns) - 1)
            chat.undo()
            chat.undo()
