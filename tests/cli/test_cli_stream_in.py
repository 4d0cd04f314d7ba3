"""``rodimus-mlx generate --stream-in``: standard input of any length, from a pipe."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import TINY_FOLDER

import rodimus_mlx

COMMAND = [sys.executable, "-m", "rodimus_mlx.cli.app", "generate", "--stream-in", "-n", "12"]
TINY = str(TINY_FOLDER)
TEXT = "def f(x):\n    return x + 1\n" * 300


def run(text: bytes, *arguments: str, model: str = TINY) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*COMMAND, *arguments, "--model", model], input=text, capture_output=True, timeout=120)


def text_of(prompt: object) -> str:
    return rodimus_mlx.generate(*rodimus_mlx.load(TINY_FOLDER), prompt, max_tokens=12)  # type: ignore[arg-type]


@pytest.mark.parametrize("question", ["", "\n# now"])
def test_equals_reading_at_once(question: str) -> None:
    result = run(TEXT.encode(), *([question] if question else []))
    assert result.stdout.decode() == text_of(TEXT + question) + "\n"
    assert f"prompt {len(TEXT + question)} at " in result.stderr.decode()


def test_in_a_chat(tmp_path: Path) -> None:
    shutil.copytree(TINY_FOLDER, tmp_path / "tiny-chat")
    settings = json.loads((TINY_FOLDER / "tokenizer_config.json").read_text()) | {"is_chat_model": True}
    (tmp_path / "tiny-chat" / "tokenizer_config.json").write_text(json.dumps(settings))
    result = run(b"one two ", "three?", "--system", "s", model=str(tmp_path / "tiny-chat"))
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "one two three?"}]
    assert result.stdout.decode() == text_of(messages) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"", "standard input is empty: there is nothing to continue"), (b"ab\xff", "is not UTF-8 text")],
    ids=["empty", "bytes"],
)
def test_refused(text: bytes, message: str) -> None:
    result = run(text)
    assert (result.returncode, result.stdout) == (1, b"")
    assert message in result.stderr.decode().splitlines()[-1]


def test_ctrl_c_ends_the_input_and_gets_the_answer() -> None:
    with subprocess.Popen(
        [*COMMAND, "--model", TINY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        process.stdin.write(TEXT.encode())
        process.stdin.flush()
        while _unread(process.stdin.fileno()):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert out.decode() == text_of(TEXT) + "\n"


def _unread(pipe: int) -> int:
    """Bytes that wait in a pipe."""
    import array
    import fcntl
    import termios

    count = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0]


def test_memory_does_not_grow() -> None:
    peaks = []
    for repeats in (1, 3):
        result = run(TEXT.encode() * repeats, "--json")
        peaks.append(json.loads(result.stdout)["peak_memory_gb"])
        assert json.loads(result.stdout)["prompt_tokens"] == len(TEXT) * repeats
    assert peaks[1] < peaks[0] * 1.05
