"""``rodimus-mlx chat``: a conversation in the terminal."""

from __future__ import annotations

import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RodimusError
from . import line_editor, options
from .progress import ByteProgress, size
from .terminal import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..chat import Chat, Turn
    from ..states import State

EXAMPLE = "  rodimus-mlx chat --model coder-1.6b-chat --save my-talk"


def run(
    model: options.ChatModel = None,
    adapter: options.Adapter = None,
    state: options.State = None,
    save: Annotated[
        str | None, typer.Option("--save", metavar="NAME", help="Go on with the conversation NAME, and keep it.")
    ] = None,
    system: options.System = None,
    max_tokens: options.MaxTokens = 2048,
    temp: options.Temp = 0.7,
    top_p: options.TopP = 0.95,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
) -> None:
    """Talk with a model.

    Ctrl-C stops an answer, Ctrl-D ends the chat, /help lists the commands.
    End a line with a backslash to go on in the next.
    """
    if model is None:
        raise RodimusError(options.NO_CHAT)

    import mlx.core as mx
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    from ..chat import Chat
    from ..loading import load
    from ..states.store import find_state, state_path
    from ..tokenizer import is_chat_model

    saved = state_path(save) if save else None
    start = find_state(state) if state else None
    if saved and saved.exists() and start:
        raise RodimusError(f"there is a conversation {save}: give --save or --state, not both")
    loaded, tokenizer = load(model, adapter_path=adapter)
    if tokenizer is None:
        raise RodimusError("this checkpoint has no tokenizer, so it cannot chat")
    if not is_chat_model(tokenizer):
        print("This is not known as a chat model; its answers may wander.", file=sys.stderr)
    if seed is not None:
        mx.random.seed(seed)
    going_on = saved if saved and saved.exists() else start
    chat = Chat(
        loaded,
        tokenizer,
        start=_load(going_on, loaded) if going_on else None,
        system=system,
        max_tokens=max_tokens,
        sampler=make_sampler(temp, top_p, min_p, top_k=top_k if top_k < loaded.args.vocab_size else 0),
        logits_processors=make_logits_processors(
            repetition_penalty=None if repetition_penalty == 1 else repetition_penalty
        ),
    )
    Terminal(chat, model, save).run()


class Terminal:
    """Reads lines, answers them, and runs the commands."""

    def __init__(self, chat: Chat, model_name: str, save: str | None) -> None:
        self._chat, self._model_name, self._save = chat, model_name, save
        self._interactive = sys.stdin.isatty()
        self._draft = ""  # what the next line starts with
        self._editing = False  # whether the next message takes the last one's place
        self._ended = False

    def run(self) -> None:
        """Until /quit or the end of input."""
        from ..states.store import home

        line_editor.set_up(home() / "history")
        if self._chat.turns:
            self._show_turns()
        while not self._ended:
            try:
                text = self._read()
            except EOFError:
                break
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /quit ends the chat)")
                continue
            try:
                self._handle(text)
            except RodimusError as error:
                print(f"Error: {error}", file=sys.stderr)
        if self._interactive and not self._ended:
            print()

    def _read(self) -> str:
        """A message: a line, several joined by backslashes, or a paste."""
        lines = [line_editor.ask_line("> " if self._interactive else "", self._draft)]
        self._draft = ""
        while lines[-1].endswith("\\") or line_editor.is_pasted_on():
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(line_editor.ask_line(". " if self._interactive else ""))
        return "\n".join(lines).strip()

    def _handle(self, text: str) -> None:
        editing, self._editing = self._editing, False
        if not text.startswith("/"):
            if editing and text:
                self._chat.undo()
            if text:
                self._answer(text)
            return
        name, _, argument = text[1:].partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            raise RodimusError(f"there is no command /{name}; /help lists them")
        command(self, argument.strip())

    def _answer(self, question: str) -> None:
        """Ask, show the answer, and keep the conversation if that is wanted."""
        count = len(self._chat.turns)
        with _ctrl_c(self._chat.stop), ByteProgress("Reading", unit=" tokens") as progress:
            for response in self._chat.ask(question, progress if self._interactive else None):
                print(printable(response.text), end="", flush=True)
        print()
        if len(self._chat.turns) == count:
            self._draft = question if self._interactive else ""
        elif self._save:
            self._write(self._save)

    def _write(self, name: str) -> None:
        from dataclasses import replace

        from ..states import save_state
        from ..states.store import state_path

        state = self._chat.state()
        state.info = replace(state.info, model=self._model_name)
        save_state(state_path(name), self._chat.model, state)

    def _show_turns(self) -> None:
        count = len(self._chat.turns)
        print(f"({count} turn{'s' * (count != 1)}, {self._chat.tokens:,} tokens)")
        _show_turn(self._chat.turns[-1])

    # What follows are the commands: the docstring is the help.

    def help(self, _: str) -> None:
        """/help: this list"""
        for command in dict.fromkeys(COMMANDS.values()):
            usage, _, meaning = (command.__doc__ or "").partition(": ")
            print(f"{usage:16} {meaning}")
        print("Ctrl-C stops an answer. A backslash at a line's end goes on in the next line.")

    def undo(self, argument: str) -> None:
        """/undo [N]: take the last N turns back (1)"""
        count = _number(argument)
        if 0 < len(self._chat.turns) < count:
            raise RodimusError(f"there are {len(self._chat.turns)} turns to take back, not {count}")
        for _ in range(count):
            turn = self._chat.undo()
        print(f"(took back: {_first_line(turn.question)})")

    def retry(self, _: str) -> None:
        """/retry: answer the last question again"""
        self._answer(self._chat.undo().question)

    def edit(self, text: str) -> None:
        """/edit [TEXT]: ask TEXT instead of the last question, or edit that"""
        if text:
            self._chat.undo()
            self._answer(text)
        elif not self._interactive:
            raise RodimusError("/edit needs a text here")
        elif self._chat.turns:
            self._draft, self._editing = self._chat.turns[-1].question, True
        else:
            raise RodimusError("there is nothing to edit")

    def branch(self, name: str) -> None:
        """/branch [NAME]: go to a branch, which begins here if it is new; or list them"""
        if not name:
            for each, line in self._chat.lines.items():
                print(f"{'*' if each == self._chat.branch else ' '} {each}: {len(line.turns)} turns")
        elif self._chat.switch(name):
            print(f"(new branch {name})")
        else:
            print(f"(back on {name})")
            if self._chat.turns:
                self._show_turns()

    def system(self, text: str) -> None:
        """/system [TEXT]: set the system message, or show it"""
        if text:
            self._chat.set_system(text)
        else:
            print(self._chat.system or "(no system message)")

    def save(self, name: str) -> None:
        """/save [NAME]: keep the conversation as a state"""
        from ..states.store import state_path

        name = name or self._save or ""
        if not name:
            raise RodimusError("/save needs a name")
        if name != self._save and state_path(name).exists():
            raise RodimusError(f"there is a state {name}; choose another name")
        self._write(name)
        self._save = name
        print(f"(kept as {name}, also after every answer)")

    def load(self, name: str) -> None:
        """/load NAME: go on from a state"""
        from ..states.store import find_state

        if not name:
            raise RodimusError("/load needs a name")
        self._chat.load(_load(find_state(name), self._chat.model))
        self._save = None
        self._show_turns() if self._chat.turns else print(f"({self._chat.tokens:,} tokens)")

    def stats(self, _: str) -> None:
        """/stats: tokens, memory and speeds"""
        from ..states import cache_bytes

        states, kept = self._chat.kept
        print(f"branch {self._chat.branch}: {len(self._chat.turns)} turns, {self._chat.tokens:,} tokens")
        print(f"state {size(cache_bytes(self._chat.state().cache))}; {states} kept, {size(kept)}")
        if self._chat.last is not None:
            last = self._chat.last
            print(f"last answer: {last.generation_tokens} tokens at {last.generation_tps:.1f} tokens/s")

    def quit(self, _: str) -> None:
        """/quit: end the chat"""
        self._ended = True


COMMANDS: dict[str, Callable[[Terminal, str], None]] = {
    "help": Terminal.help,
    "undo": Terminal.undo,
    "retry": Terminal.retry,
    "edit": Terminal.edit,
    "branch": Terminal.branch,
    "system": Terminal.system,
    "save": Terminal.save,
    "load": Terminal.load,
    "stats": Terminal.stats,
    "quit": Terminal.quit,
    "exit": Terminal.quit,
}


def _load(path: Any, model: Any) -> State:
    from ..states import load_state

    return load_state(path, model, f"the state {path.stem}")


def _number(text: str) -> int:
    if not text:
        return 1
    if not text.isdigit() or int(text) < 1:
        raise RodimusError(f"/undo needs a number, not {text}")
    return int(text)


def _show_turn(turn: Turn) -> None:
    print(f"> {printable(turn.question)}\n{printable(turn.answer)}")


def _first_line(text: str) -> str:
    line = printable(text.partition("\n")[0])
    return line if len(line) <= 60 else line[:57] + "..."


@contextmanager
def _ctrl_c(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls ``stop`` instead of raising anywhere."""
    previous = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
