"""``rodimus-mlx perplexity``, ``compare`` and ``inspect`` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import TINY_FOLDER
from rodimus_mlx.cli.app import main
from rodimus_mlx.convert.convert import convert
from rodimus_mlx.convert.schemes import make_scheme

TINY = str(TINY_FOLDER)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("some words, and some more of them; " * 20)
    return str(file)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("models") / "small"
    convert(TINY_FOLDER, out, scheme=make_scheme(3))
    return str(out)


def test_perplexity(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["perplexity", TINY, "--data", text, "--window", "300", "--stride", "100"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert lines[-1].startswith("perplexity ") and " nats a token" in lines[-1]
    assert main(["perplexity", TINY, "--data", text, "--window", "300", "--stride", "100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert f"perplexity {found['perplexity']:.4f} ± " in lines[-1]
    assert (found["window"], found["stride"], found["tokens"]) == (300, 100, 699)
    assert ["0-256", str(found["buckets"][0]["tokens"])] in [line.split()[:2] for line in lines]


def test_perplexity_of_some_tokens(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["perplexity", TINY, "--data", text, "--max-tokens", "50", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 49


def test_compare(text: str, small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "a.png"
    assert main(["compare", TINY, small, "--data", text, "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert picture.stat().st_size > 5000
    assert "perplexity A" in printed and "same top token" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert ["layer", "64", "128", "256", "512"] in lines
    assert main(["compare", TINY, small, "--data", text, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = next(line for line in lines if line and line[0] == "all")
    assert row[1:5] == ["699", *(f"{found[key]['perplexity']:.4f}" for key in "ab"), f"{found['kl']:.5f}"]
    assert len(found["drift"]["layers"]) == 2 and found["kl"] > 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["perplexity", TINY], 2, "Missing option '--data'"),
        (["perplexity", TINY, "--data", "absent.txt"], 1, "there is no file absent.txt"),
        (["perplexity", TINY, "--data", "absent.txt", "--window", "0"], 2, "--window"),
        (["compare", TINY, "absent", "--data", __file__], 1, "there is no folder absent"),
        (["compare", TINY, TINY, "--data", __file__, "--plot", "a.doc"], 1, "a plot's name must end in"),
    ],
)
def test_errors(arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    assert main(arguments) == status
    printed = capsys.readouterr()
    assert printed.err.startswith("Error: ") and message in printed.err and printed.err.count("\n") == 1
