"""A conversation whose every turn keeps its state: going back, branching and asking again cost nothing.

The model reads each question and answer once. What it has read is known as text, by the chat template; the next
question reads what the template adds to that, from the state of the turn before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import RodimusError
from .generation import ROLE_TAG, encode_text, render_conversation, stream_generate
from .states.file import State, StateInfo
from .states.reading import Progress, read_tokens
from .states.snapshot import Cache, cache_bytes, snapshot
from .states.sources import Messages

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse

KEPT_BYTES = 2 << 30  # of turns' states; the oldest beyond it are dropped, and read again if they are wanted


@dataclass
class Turn:
    """A question, its answer, and how the model got to the answer's end.

    text: all that was read until then. tokens: what was read after turn ``start`` (0: the beginning). state: None
    where it is not kept.
    """

    question: str
    answer: str
    text: str
    start: int
    tokens: list[int]
    state: Cache | None = None


@dataclass
class Line:
    """One course of the conversation. ``cache`` and ``text``: what was read before the turns; ``before``: messages."""

    cache: Cache
    text: str = ""
    before: Messages = field(default_factory=list)
    unknown: bool = False  # whether something was read that neither text nor messages tell
    read: int = 0  # tokens before the turns
    source: str = ""
    turns: list[Turn] = field(default_factory=list)

    @property
    def messages(self) -> Messages:
        """The whole conversation."""
        pairs = (
            ({"role": "user", "content": t.question}, {"role": "assistant", "content": t.answer}) for t in self.turns
        )
        return self.before + [message for pair in pairs for message in pair]


class Chat:
    """A conversation with a model.

    Args:
        model, tokenizer: what ``load`` returned.
        start: a state to go on from; one of a conversation brings its turns.
        system: a system message.
        kept_bytes: see `KEPT_BYTES`.
        **options: for ``stream_generate``.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        start: State | None = None,
        system: str | None = None,
        kept_bytes: int = KEPT_BYTES,
        **options: Any,
    ) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.branch = "main"
        self.last: GenerationResponse | None = None  # of the last answer, for its speeds
        self._kept_bytes = kept_bytes
        self._stopped = False
        self._asked: tuple[str, Cache] | None = (
            None  # the last question's text and the state at its end but for a token
        )
        self.lines = {self.branch: self._line_of(start) if start else Line(model.make_cache())}
        if system is not None:
            self.set_system(system)

    @property
    def line(self) -> Line:
        """The course that the conversation is on."""
        return self.lines[self.branch]

    @property
    def turns(self) -> list[Turn]:
        """The turns so far."""
        return self.line.turns

    def ask(self, question: str, progress: Progress | None = None) -> Iterator[GenerationResponse]:
        """Ask, and get the answer piece by piece. The turn exists when the iterator has ended.

        After `stop` the turn has the answer up to then, or there is none where no answer had begun.

        Raises:
            RodimusError: the question is empty, or the chat template refuses it.
        """
        if not question:
            raise RodimusError("the question is empty")
        self._stopped = False
        line = self.line
        whole, start, tokens = self._plan(line, question)
        cache = self._read_question(line, whole, start, tokens, progress)
        if cache is None:
            return
        answer, made, finish = "", list[int](), None
        stop = [ROLE_TAG, *self.options.get("stop", ())]
        options = {**self.options, "stop": stop, "prompt_cache": snapshot(cache)}
        for response in stream_generate(self.model, self.tokenizer, tokens[-1:], **options):
            self.last, finish = response, response.finish_reason
            answer += response.text
            made.append(response.token)
            yield response
            if self._stopped:
                break
        if finish == "stop" and made[-1] in self.tokenizer.eos_token_ids:
            made.pop()
        elif finish != "length":  # then the last tokens belong to a stop string, or are not shown
            made = encode_text(self.tokenizer, answer) if answer else []
        if not made and self._stopped:
            return
        read_tokens(self.model, cache, tokens[-1:] + made)
        line.turns.append(Turn(question, answer, whole + answer, start, tokens + made, cache))
        self._drop_old_states()

    def stop(self) -> None:
        """End the answer that is being made; may be called from a signal's handler."""
        self._stopped = True

    def undo(self) -> Turn:
        """Take the last turn back; returns it.

        Raises:
            RodimusError: there is none.
        """
        if not self.turns:
            earlier = self.line.unknown or any(message["role"] != "system" for message in self.line.before)
            raise RodimusError("what came with the state cannot be undone" if earlier else "there is nothing to undo")
        return self.turns.pop()

    def switch(self, name: str) -> bool:
        """Go to a branch, which begins here if there is none of this name; returns whether it is new."""
        new = name not in self.lines
        if new:
            line = self.line
            self.lines[name] = Line(
                line.cache, line.text, line.before, line.unknown, line.read, line.source, list(line.turns)
            )
        self.branch = name
        return new

    @property
    def system(self) -> str | None:
        """The system message."""
        before = self.line.before
        return before[0]["content"] if before and before[0]["role"] == "system" else None

    def set_system(self, text: str) -> None:
        """Give this branch another system message; its turns stay, and are read again with the next question.

        Raises:
            RodimusError: the branch has turns on a state that cannot be made again.
        """
        line = self.line
        if line.unknown and (line.turns or line.before):
            raise RodimusError("this conversation goes on from a state that cannot take another system message")
        rest = line.before[1:] if self.system is not None else line.before
        before = [{"role": "system", "content": text}, *rest]
        cache = line.cache if line.unknown else self.model.make_cache()
        read = line.read if line.unknown else 0
        self.lines[self.branch] = self._with_turns(Line(cache, "", before, line.unknown, read, line.source), line.turns)

    def state(self) -> State:
        """The conversation as a state, to be saved."""
        line = self.line
        source = (
            line.source if line.source.endswith("a chat") else ", then ".join(filter(None, [line.source, "a chat"]))
        )
        cache, unread = self._state(line, len(line.turns)), 0
        if not line.turns and line.before and not line.text:  # a system message that no question has read yet
            tokens = encode_text(self.tokenizer, render_conversation(self.tokenizer, line.before, for_answer=False))
            read_tokens(self.model, cache, tokens)
            unread = len(tokens)
        info = StateInfo(self.tokens + unread, source, messages=line.messages, unknown=line.unknown)
        return State(cache, info)

    def load(self, state: State) -> None:
        """Go on from a state instead; the branches so far are gone."""
        self.branch, self._asked = "main", None
        self.lines = {self.branch: self._line_of(state)}

    @property
    def tokens(self) -> int:
        """How many tokens the state at the end has read."""
        position, count = len(self.turns), 0
        while position:
            turn = self.turns[position - 1]
            position, count = turn.start, count + len(turn.tokens)
        return self.line.read + count

    @property
    def kept(self) -> tuple[int, int]:
        """How many states are kept, of all branches, and their bytes."""
        states = {id(t): t.state for line in self.lines.values() for t in line.turns if t.state is not None}
        return len(states), sum(map(cache_bytes, states.values()))

    def _plan(self, line: Line, question: str) -> tuple[str, int, list[int]]:
        """The text up to the answer, the turn to go on from, and the tokens in between."""
        messages = [*line.messages, {"role": "user", "content": question}]
        whole = render_conversation(self.tokenizer, messages)
        for start, read in ((len(line.turns), line.turns[-1].text if line.turns else line.text), (0, line.text)):
            if whole.startswith(read):
                return whole, start, encode_text(self.tokenizer, whole[len(read) :])
        if line.unknown:
            raise RodimusError("the chat template cannot go on from this state")
        line.cache, line.text, line.read = self.model.make_cache(), "", 0  # the template writes it all anew
        return whole, 0, encode_text(self.tokenizer, whole)

    def _read_question(
        self, line: Line, whole: str, start: int, tokens: list[int], progress: Progress | None
    ) -> Cache | None:
        """A cache that has read all but the last of the tokens; None if it was stopped."""
        if self._asked is not None and self._asked[0] == whole:
            return snapshot(self._asked[1])

        def check(done: int, total: int) -> None:
            if progress is not None:
                progress(done, total)
            if self._stopped:
                raise _Stopped

        try:
            cache = self._state(line, start)
            read_tokens(self.model, cache, tokens[:-1], check)
        except _Stopped:
            return None
        self._asked = whole, snapshot(cache)
        return cache

    def _state(self, line: Line, count: int) -> Cache:
        """The state after so many turns, to be moved on; what is not kept is read again."""
        if count == 0:
            return snapshot(line.cache)
        turn = line.turns[count - 1]
        if turn.state is None:
            cache = self._state(line, turn.start)
            read_tokens(self.model, cache, turn.tokens)
            turn.state = cache
        return snapshot(turn.state)

    def _drop_old_states(self) -> None:
        _, size = self.kept
        lines = sorted(self.lines.items(), key=lambda item: item[0] == self.branch)  # this branch's last
        for _, line in lines:
            for turn in line.turns[:-1]:
                if size <= self._kept_bytes:
                    return
                if turn.state is not None:
                    size -= cache_bytes(turn.state)
                    turn.state = None

    def _with_turns(self, line: Line, turns: list[Turn]) -> Line:
        """The line with these questions and answers behind it, their states yet to be made."""
        for turn in turns:
            whole, start, tokens = self._plan(line, turn.question)
            answer = encode_text(self.tokenizer, turn.answer) if turn.answer else []
            line.turns.append(Turn(turn.question, turn.answer, whole + turn.answer, start, tokens + answer))
        return line

    def _line_of(self, state: State) -> Line:
        """A state as a line, with turns if it is of a conversation."""
        info, messages = state.info, state.info.messages
        if not info.unknown and messages:
            lead = 1 if messages[0]["role"] == "system" else 0
            roles = [message["role"] for message in messages[lead:]]
            if roles and roles == ["user", "assistant"] * (len(roles) // 2):
                contents = [message["content"] for message in messages[lead:]]
                pairs = zip(contents[::2], contents[1::2])
                turns = [Turn(question, answer, "", 0, []) for question, answer in pairs]
                line = self._with_turns(
                    Line(self.model.make_cache(), before=messages[:lead], source=info.source), turns
                )
                line.turns[-1].state = state.cache
                return line
        text = render_conversation(self.tokenizer, messages, for_answer=False) if messages else ""
        return Line(state.cache, text, list(messages), info.unknown, info.tokens, info.source)


class _Stopped(Exception):
    pass
