"""``rodimus-mlx generate --fim-prefix --fim-suffix`` as a user types it, on a tiny model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TINY_FOLDER
from rodimus_mlx.cli.app import main

import rodimus_mlx

TINY = ["--model", str(TINY_FOLDER)]
COMMAND = [sys.executable, "-m", "rodimus_mlx.cli.app", "generate"]
PREFIX, SUFFIX = "def f(x):\n    y = ", "\n    return y\n"


def middle(prefix: str, suffix: str) -> str:
    prompt = f"<|fim_begin|>{prefix}<|fim_hole|>{suffix}<|fim_end|>"
    return rodimus_mlx.generate(*rodimus_mlx.load(TINY_FOLDER), prompt, max_tokens=12)


@pytest.mark.parametrize("given", [{"prefix": PREFIX, "suffix": SUFFIX}, {"prefix": PREFIX}, {"suffix": SUFFIX}])
def test_fills_the_middle(capsys: pytest.CaptureFixture[str], given: dict[str, str]) -> None:
    options = [part for side, text in given.items() for part in (f"--fim-{side}", text)]
    assert main(["generate", *options, "-n", "12", *TINY]) == 0
    assert capsys.readouterr().out == middle(given.get("prefix", ""), given.get("suffix", "")) + "\n"


def test_as_a_process_that_has_nothing_on_standard_input() -> None:
    command = [*COMMAND, "--fim-prefix", PREFIX, "--fim-suffix", SUFFIX, "--no-chat", "-n", "12", *TINY]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert result.stdout.decode() == middle(PREFIX, SUFFIX) + "\n"


def test_after_a_state(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RODIMUS_HOME", str(tmp_path))
    (tmp_path / "code.py").write_text("before = 1\n")
    assert main(["state", "make", "code", str(tmp_path / "code.py"), *TINY]) == 0
    capsys.readouterr()
    assert main(["generate", "--fim-prefix", "a", "--state", "code", "-n", "12", "--lookup", *TINY]) == 0
    prompt = "before = 1\n<|fim_begin|>a<|fim_hole|><|fim_end|>"
    whole = rodimus_mlx.generate(*rodimus_mlx.load(TINY_FOLDER), prompt, max_tokens=12)
    assert capsys.readouterr().out == whole + "\n"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(["x"], "PROMPT"), (["--chat"], "--chat"), (["--system", "s"], "--system"), (["--stream-in"], "--stream-in")],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("side", ["--fim-prefix", "--fim-suffix"])
def test_excludes(capsys: pytest.CaptureFixture[str], side: str, arguments: list[str], name: str) -> None:
    assert main(["generate", side, "a", *arguments]) == 2
    message = f"Error: Invalid value for '--fim-prefix' / '--fim-suffix': not together with {name}\n"
    assert capsys.readouterr() == ("", message)


def test_a_chat_model_fills_without_a_chat(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copytree(TINY_FOLDER, tmp_path / "tiny-chat")
    settings = json.loads((TINY_FOLDER / "tokenizer_config.json").read_text()) | {"is_chat_model": True}
    (tmp_path / "tiny-chat" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert main(["generate", "--fim-prefix", "a", "-n", "12", "--model", str(tmp_path / "tiny-chat")]) == 0
    assert capsys.readouterr().out == middle("a", "") + "\n"


def test_a_tokenizer_without_the_tokens(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copytree(TINY_FOLDER, tmp_path / "tiny")
    file = tmp_path / "tiny" / "tokenizer.json"
    file.write_text(file.read_text().replace("<|fim_hole|>", "<|other|>"))
    assert main(["generate", "--fim-prefix", "a", "--model", str(tmp_path / "tiny")]) == 1
    message = "Error: this model cannot fill in the middle: its tokenizer has no <|fim_hole|>\n"
    assert capsys.readouterr() == ("", message)
