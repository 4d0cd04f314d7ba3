"""``rodimus-mlx chat`` as a terminal program, over a pseudo-terminal, and with lines from a pipe."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import TINY_FOLDER
from rodimus_mlx.cli.app import main
from rodimus_mlx.cli.chat import COMMANDS
from rodimus_mlx.cli.line_editor import _is_libedit
from rodimus_mlx.cli.terminal import printable
from talker import save_talker, talker

import rodimus_mlx

COMMAND = [sys.executable, "-m", "rodimus_mlx.cli.app", "chat"]
# The first terminal that a new session opens becomes the one whose Ctrl-C it gets.
IN_TERMINAL = "import os, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); os.execv(sys.argv[1], sys.argv[1:])"
SECONDS = 60  # after which a test has failed; nothing depends on how long anything takes

CTRL_C, CTRL_D, CTRL_A, CTRL_K, BACKSPACE, UP = "\x03", "\x04", "\x01", "\x0b", "\x7f", "\x1b[A"
ESCAPES = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]")


class Session:
    """A chat in a terminal of its own."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self.screen, terminal = pty.openpty()
        environment = os.environ | {"RODIMUS_HOME": str(home), "TERM": "xterm", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_TERMINAL, *COMMAND, *arguments],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            env=environment,
        )
        os.close(terminal)
        self._unseen = ""

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def until(self, wanted: str, seconds: float = SECONDS) -> str:
        """What appears up to and with the wanted text."""
        deadline = time.monotonic() + seconds
        while wanted not in self._unseen:
            ready, _, _ = select.select([self.screen], [], [], max(0, deadline - time.monotonic()))
            try:
                data = os.read(self.screen, 4096) if ready else b""
            except OSError:  # Linux's way to say that the other side is gone
                data = b""
            assert data, f"no {wanted!r} in {self._unseen!r}"
            self._unseen = ESCAPES.sub("", self._unseen + data.decode(errors="replace").replace("\r", ""))
        shown, _, self._unseen = self._unseen.partition(wanted)
        return shown + wanted

    def shows(self, wanted: str) -> bool:
        """Whether the wanted text appears within a second."""
        try:
            self.until(wanted, seconds=1)
        except AssertionError:
            return False
        return True

    def ask(self, text: str) -> str:
        """Type a line; what is shown for it, up to the next prompt."""
        self.type(text + "\n")
        self.until("\n")  # the line itself
        return self.until("\n> ").removesuffix("\n> ")

    def end(self) -> int:
        self.type(CTRL_D)
        return self.process.wait(SECONDS)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.screen)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RODIMUS_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_talker(tmp_path_factory.mktemp("models") / "talker"))


@pytest.fixture
def short(home: Path, model: str) -> Iterator[Session]:
    """A chat with short answers, at its first prompt."""
    session = Session(home, "--model", model, "--temp", "0", "--max-tokens", "6")
    session.until("> ")
    yield session
    session.close()


def answer(*contents: str) -> str:
    """The model's answer to a conversation that begins with the user."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return rodimus_mlx.generate(*talker(), messages, max_tokens=6)


def test_every_command(short: Session, home: Path) -> None:
    one = answer("one")
    assert short.ask("one") == one
    two = answer("one", one, "two")
    assert short.ask("two") == two
    assert all(f"/{name}" in (text := short.ask("/help")) for name in COMMANDS if name != "exit"), text
    assert short.ask("/undo") == "(took back: two)"
    assert short.ask("/branch side") == "(new branch side)"
    assert short.ask("three") == answer("one", one, "three")
    assert short.ask("/branch") == "  main: 1 turns\n* side: 2 turns"
    assert short.ask("/branch main").startswith("(back on main)\n(1 turn, ")
    short.until("one\n" + one + "\n> ")
    assert short.ask("/retry") == one
    assert short.ask("/edit else") == answer("else")
    assert short.ask("/system") == "(no system message)"
    short.type("/system be kind\n")
    short.until("> ")
    assert short.ask("/system") == "be kind"
    assert short.ask("/stats").startswith("branch main: 1 turns, ")
    assert short.ask("/save kept") == "(kept as kept, also after every answer)"
    assert (home / "states" / "kept.safetensors").exists()
    assert short.ask("more") != ""
    assert short.ask("/undo 2") == "(took back: else)"
    assert short.ask("/load kept").startswith("(2 turns, ")
    short.until("more\n")
    short.until("\n> ")
    assert short.ask("/undo 3") == "Error: there are 2 turns to take back, not 3"
    assert short.ask("/undo x") == "Error: /undo needs a number, not x"
    assert short.ask("/undo 2") == "(took back: else)"
    assert short.ask("/edit") == "Error: there is nothing to edit"
    assert short.ask("/bogus") == "Error: there is no command /bogus; /help lists them"
    assert short.ask("/load absent") == "Error: there is no state absent; there are: kept"
    assert short.ask("/save kept") == "Error: there is a state kept; choose another name"
    short.type("/quit\n")
    assert short.process.wait(SECONDS) == 0


def test_editing_and_history(short: Session) -> None:
    short.type("tow" + BACKSPACE * 2 + "wo\n")
    short.until("wo\n")
    assert short.until("\n> ") == answer("two") + "\n> "
    short.type("/edit\n")
    short.until("> two")
    short.type(CTRL_A + CTRL_K + "three\n")
    short.until("three\n")
    assert short.until("\n> ") == answer("three") + "\n> "
    assert short.ask("/stats").startswith("branch main: 1 turns")
    short.type(UP + UP + UP + "\n")  # /stats, three, /edit
    short.until("> three")
    short.type("\n")
    short.until("> ")
    assert short.end() == 0


@pytest.mark.skipif(_is_libedit(), reason="libedit does not tell a paste from typing")
@pytest.mark.parametrize("typed", ["\x1b[200~a\n\n  b\x1b[201~\n", "a\\\n\\\n  b\n"], ids=["paste", "backslash"])
def test_several_lines_are_one_message(short: Session, typed: str) -> None:
    short.type(typed)
    short.until("b\n")
    assert short.until("\n> ") == answer("a\n\n  b") + "\n> "
    assert short.ask("/stats").startswith("branch main: 1 turns")


def test_ctrl_c_at_the_prompt(short: Session) -> None:
    short.type("half a li")
    short.until("half a li")
    # Python loses an interrupt that comes just while a key is being handled: like a user, press again
    while not short.shows("(Ctrl-D or /quit ends the chat)\n> "):
        short.type(CTRL_C)
    assert short.ask("one") == answer("one")
    assert short.end() == 0


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(home: Path, model: str) -> None:
    session = Session(home, "--model", model, "--temp", "0", "--max-tokens", "1000000", "--save", "kept")
    session.until("> ")
    session.type("one\n")
    session.until("\n")
    start = answer("one")
    session.until(start)
    session.type(CTRL_C)
    session.until("\n> ")
    assert session.ask("/stats").startswith("branch main: 1 turns")
    assert (home / "states" / "kept.safetensors").exists()
    assert session.end() == 0
    session.close()

    session = Session(home, "--model", model, "--save", "kept")
    session.until("(1 turn, ")
    session.until(f"> one\n{start}")
    session.until("\n> ")
    assert session.end() == 0
    session.close()


def pipe(model: str, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "--model", model, "--temp", "0", "--max-tokens", "6", *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=SECONDS)


def test_lines_from_a_pipe(home: Path, model: str) -> None:
    result = pipe(model, "one\n/undo\nno end of line")
    assert result.stdout == f"{answer('one')}\n(took back: one)\n{answer('no end of line')}\n"
    assert result.returncode == 0


def test_a_persona(home: Path, model: str) -> None:
    main(["state", "make", "kind", "--system", "be kind", "--model", model])
    assert pipe(model, "/system\n", "--state", "kind").stdout == "be kind\n"


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[2J\x07\tb\nc\x9b1m") == "a[2J\tb\nc1m"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--state", "absent"], "there is no state absent; there are: kept"),
        (["--state", "kept", "--save", "kept"], "there is a conversation kept: give --save or --state, not both"),
        (["--save", "a/b"], "'a/b' cannot be a state's name: use letters, digits, '.', '_' and '-'"),
    ],
    ids=" ".join,
)
def test_refused(home: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["state", "make", "kept", "--system", "x", "--model", str(TINY_FOLDER)])
    capsys.readouterr()
    assert main(["chat", "--model", str(TINY_FOLDER), *arguments]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"Error: {message}"


def test_the_bundled_model_does_not_chat(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat"]) == 1
    assert capsys.readouterr().err == (
        "Error: the bundled model completes Python and does not chat: "
        "give --model, say codefuse-ai/Rodimus-Plus-Coder-1.6B-Chat\n"
    )
