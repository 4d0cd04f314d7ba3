"""``rodimus-mlx state`` and ``generate --state``, on a tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import TINY_FOLDER
from rodimus_mlx.cli.app import main

import rodimus_mlx

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process and an empty folder."""
    monkeypatch.setenv("RODIMUS_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("one two three ")
    Path("b.txt").write_text("one two four ")

    def run(*arguments: str) -> tuple[int, str, str]:
        loads = arguments[0] == "generate" or arguments[1:2] == ("make",)
        status = main([*arguments, *(["--model", str(TINY_FOLDER)] if loads and "--model" not in arguments else [])])
        return (status, *capsys.readouterr())

    return run


def test_from_making_to_deleting(run: Run, tmp_path: Path) -> None:
    assert run("state", "list") == (0, "", "No states yet: rodimus-mlx state make NAME FILE\n")
    assert run("state", "make", "first", "a.txt")[:2] == (0, "first: 14 tokens, 0.0 MB\n")
    assert run("state", "make", "second-one", "b.txt")[0] == 0
    status, out, _ = run("state", "list")
    first, second = out.splitlines()
    assert first.split() == ["first", "14", "tokens", "0.0", "MB", "a.txt"]
    assert second.startswith("second-one")

    status, out, _ = run("state", "show", "first")
    assert status == 0
    assert f"file      {tmp_path / 'home' / 'states' / 'first.safetensors'}\n" in out
    assert "tokens    14\n" in out and "  quantization  none\n" in out

    status, out, _ = run("state", "diff", "first", "second-one")
    assert out.startswith("tokens    14 and 13\nread      a.txt and b.txt\nlayer       state      window\n")
    assert len(out.splitlines()) == 5
    assert "0.000e+00" not in out

    assert run("state", "delete", "first", "second-one", "first")[:2] == (0, "first: deleted\nsecond-one: deleted\n")
    assert run("state", "list")[1] == ""


def test_generate_goes_on_from_it(run: Run) -> None:
    run("state", "make", "kept", "a.txt")
    expected = rodimus_mlx.generate(*rodimus_mlx.load(TINY_FOLDER), "one two three four", max_tokens=12)
    for _ in range(2):
        assert run("generate", "four", "--state", "kept", "-n", "12")[1] == expected + "\n"
    run("state", "make", "longer", "--state", "kept", "b.txt")
    assert "tokens    27\nread      a.txt, then b.txt\n" in run("state", "show", "longer")[1]


def test_a_conversation(run: Run) -> None:
    Path("talk.json").write_text(json.dumps([{"role": "user", "content": "hi"}]))
    run("state", "make", "talk", "talk.json", "--system", "be kind")
    assert run("state", "show", "talk")[1].endswith("system    be kind\nuser      hi\n")
    Path("more.json").write_text(json.dumps([{"role": "user", "content": "ho"}]))
    run("state", "make", "other", "more.json", "--system", "be kind")
    assert "messages  2 and 2, the first 1 the same\n" in run("state", "diff", "talk", "other")[1]


def test_another_models_state_is_refused(run: Run, tmp_path: Path) -> None:
    shutil.copytree(TINY_FOLDER, "other")
    config = json.loads(Path("other/config.json").read_text())
    Path("other/config.json").write_text(json.dumps(config | {"norm_epsilon": 1e-6}))
    run("state", "make", "kept", "a.txt")
    status, out, error = run("generate", "x", "--model", "other", "--state", "kept")
    assert (status, out) == (1, "")
    assert error.startswith("Error: the state kept belongs to another model: its architecture is ")


def test_where_there_is_no_state_at_all(run: Run) -> None:
    status, _, error = run("state", "show", "absent")
    assert (status, error) == (
        1,
        "Error: there is no state absent, and no other: `rodimus-mlx state make` makes them\n",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["make", "kept", "b.txt"], "there is a state kept; --force replaces it"),
        (["make", "a/b", "b.txt"], "'a/b' cannot be a state's name: use letters, digits, '.', '_' and '-'"),
        (["make", "x.safetensors", "b.txt"], "'x.safetensors' cannot be a state's name"),
        (["make", "new"], "there is nothing to read: give files, or --system"),
        (["make", "new", "absent.txt"], "there is no file or folder absent.txt"),
        (["show", "absent"], "there is no state absent; there are: kept"),
        (["show", "./absent.safetensors"], "there is no file ./absent.safetensors"),
        (["show", "./a.txt"], "a.txt is not a safetensors file, or is cut short"),
        (["delete", "kept", "absent"], "there is no state absent; there are: kept"),
        (["delete", "kept", "../a.txt"], "'../a.txt' cannot be a state's name"),
        (["delete", "../a.txt"], "'../a.txt' cannot be a state's name"),
        (["make", "new", "a.txt", "--state", "absent"], "there is no state absent; there are: kept"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused(run: Run, arguments: list[str], message: str) -> None:
    run("state", "make", "kept", "a.txt")
    status, out, error = run("state", *arguments)
    assert (status, out) == (1, "")
    assert error.startswith(f"Error: {message}") and error.count("\n") == 1
    assert Path("a.txt").exists()
    assert run("state", "list")[1].count("\n") == 1


def test_force(run: Run) -> None:
    run("state", "make", "kept", "a.txt")
    assert run("state", "make", "kept", "b.txt", "--force")[0] == 0
    assert "read      b.txt\n" in run("state", "show", "kept")[1]


@pytest.mark.parametrize("command", ["", "make", "list", "show", "diff", "delete"])
def test_help(run: Run, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    status, text, _ = run("state", *([command] if command else []), "--help")
    assert status == 0
    assert max(map(len, text.splitlines())) <= 80
    assert text.rstrip().partition("\n  Example:\n")[2].strip().startswith(f"rodimus-mlx state {command}")
