"""``rodimus-mlx convert`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import TINY_FOLDER
from rodimus_mlx.cli.app import main

from rodimus_mlx.loading import load_model

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"


def test_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(TINY_FOLDER), str(out), "--dtype", "float32"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{out}: ") and "parameters, float32, " in printed.out
    assert printed.err == ""  # no progress bar where nobody looks
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"
    load_model(out)


@pytest.mark.filterwarnings("default")
def test_a_missing_tokenizer_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(GOLDENS / "plus_bin"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.startswith("Warning: ")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["./absent", "out"], 1, "there is no folder ./absent"),
        ([str(TINY_FOLDER), "taken"], 1, "taken exists and is not empty"),
        ([str(TINY_FOLDER), "out", "--dtype", "int8"], 2, "'float32', 'bfloat16', 'float16'"),
    ],
)
def test_errors(
    arguments: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert main(["convert", *arguments]) == status
    printed = capsys.readouterr()
    assert printed.err.startswith("Error: ") and message in printed.err and printed.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]
