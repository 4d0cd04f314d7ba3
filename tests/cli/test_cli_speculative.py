"""``rodimus-mlx generate --draft-model`` and ``--lookup``: the same text."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from helpers import TINY_FOLDER
from rodimus_mlx.cli.app import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["generate", "def f(x): def f(", "-n", "25", "--model", str(TINY_FOLDER), *arguments])
        return (status, *capsys.readouterr())

    return run


@pytest.mark.parametrize("option", [["--lookup"], ["--draft-model", str(TINY_FOLDER), "--draft-tokens", "3"]])
def test_same_text(run: Run, option: list[str]) -> None:
    assert run(*option)[:2] == run()[:2]


def test_tokens_a_step(run: Run) -> None:
    option = ["--draft-model", str(TINY_FOLDER)]
    assert json.loads(run(*option, "--json")[1])["tokens_per_step"] == 5
    assert "(5.00 a step), peak" in run(*option)[2]


def test_either_of_the_two(run: Run) -> None:
    status, _, error = run("--lookup", "--draft-model", "x")
    assert status == 2
    assert error == "Error: Invalid value for '--draft-model' / '--lookup': either of the two, not both\n"
