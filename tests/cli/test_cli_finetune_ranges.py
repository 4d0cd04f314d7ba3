"""The numbers that ``rodimus-mlx finetune`` refuses, before it reads a model or data."""

from __future__ import annotations

from pathlib import Path

import pytest
from rodimus_mlx.cli.app import main

PLACES = ["--model", "./absent", "--data", "./absent", "--out", "./absent"]
PAST_THE_CHECKS = "Error: ./absent is neither a folder with train.jsonl"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iters", "0"], "--iters must be 1 or more, not 0"),
        (["--iters", "0", "--epochs", "2"], "--iters must be 1 or more, not 0"),
        (["--iters", "99999999999"], "--iters must be at most 1000000000, not 99999999999"),
        (["--epochs", "0"], "--epochs must be above 0, not 0"),
        (["--epochs", "1e300"], "--epochs must be at most 100000, not 1e+300"),
        (["--warmup", "99999999999"], "--warmup must be at most 1000000000, not 99999999999"),
        (["--val-batches", "0"], "--val-batches must be -1 for all, or 1 or more"),
        (["--early-stop", "0"], "--early-stop must be 1 or more, not 0"),
        (["--segment", "0"], "--segment must be 1 or more, not 0"),
        (["--rank", "4097"], "--rank must be at most 4096, not 4097"),
        (
            ["--seed", "99999999999999999999"],
            "--seed must be at most 18446744073709551615, not 99999999999999999999",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", *PLACES, *arguments]) == 1
    assert capsys.readouterr().err == f"Error: {message}\n"


@pytest.mark.parametrize(
    ("file", "arguments", "message"),
    [
        ("rank: 4097", [], "Error: --rank must be at most 4096, not 4097"),
        ("val_batches: 0", [], "Error: --val-batches must be -1 for all, or 1 or more"),
        ("iters: 5", ["--iters", "0"], "Error: --iters must be 1 or more, not 0"),
        ("iters: 5", ["--iters", "0", "--epochs", "2"], PAST_THE_CHECKS),
        ("{segment: 5, early_stop: 3}", ["--segment", "0", "--early-stop", "0"], PAST_THE_CHECKS),
    ],
)
def test_beside_a_config_file_whose_options_a_0_takes_back(
    file: str, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(file)
    assert main(["finetune", *PLACES, "--config", str(tmp_path / "run.yaml"), *arguments]) == 1
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize(
    "arguments", [["--iters", "1"], ["--epochs", "0.5"], ["--val-batches", "-1"], ["--rank", "4096"]], ids=" ".join
)
def test_the_ends_of_the_ranges(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", *PLACES, *arguments]) == 1
    assert capsys.readouterr().err.startswith(PAST_THE_CHECKS)
