"""``rodimus-mlx convert``, ``quantize`` and ``inspect`` with weights of a few bits, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import TINY_FOLDER
from rodimus_mlx.cli.app import main

from rodimus_mlx.loading import load_model

TINY = str(TINY_FOLDER)
TEXT = "def f(x):\n    return x + 1  # and a little more text than nothing\n" * 40


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return str(file)


def quantization(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization"]


@pytest.mark.parametrize(
    ("command", "options", "bits", "group_size", "mode"),
    [
        ("convert", ["--bits", "4"], 4, 64, "affine"),
        ("convert", ["--bits", "3", "--group-size", "32"], 3, 32, "affine"),
        ("convert", ["--mode", "mxfp8"], 8, 32, "mxfp8"),
        ("convert", ["--recipe", "mixed_3_6"], 3, 64, "affine"),
        ("quantize", [], 4, 64, "affine"),
        ("quantize", ["--bits", "8", "--recipe", "all"], 8, 64, "affine"),
        ("quantize", ["--mode", "nvfp4"], 4, 16, "nvfp4"),
    ],
)
def test_schemes(
    command: str,
    options: list[str],
    bits: int,
    group_size: int,
    mode: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert main([command, TINY, str(out), *options]) == 0
    assert "bits per weight, " in capsys.readouterr().out
    table = quantization(out)
    assert (table["bits"], table["group_size"], table["mode"]) == (bits, group_size, mode)
    load_model(out)


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, full, official = (str(tmp_path / name) for name in ("small", "full", "official"))
    assert main(["convert", TINY, small, "--bits", "8"]) == 0
    assert main(["convert", small, full, "--dequantize", "--dtype", "float32"]) == 0
    assert main(["convert", full, official, "--to-official"]) == 0
    assert main(["convert", official, str(tmp_path / "fla"), "--to-fla"]) == 0
    found = json.loads((tmp_path / "fla" / "config.json").read_text())
    assert found["hidden_size"] == 64 and found["torch_dtype"] == "float32" and "quantization" not in found
    load_model(tmp_path / "fla")


@pytest.mark.parametrize("method", ["gptq", "dynamic", "dwq"])
def test_calibrated(method: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    few = ["--samples", "24", "--seq-len", "32", "--batch", "2"]
    assert main(["quantize", TINY, str(out), "--bits", "2", "--calibrate", method, "--data", text, *few]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1 and "bits per weight" in printed.out
    card = (out / "README.md").read_text()
    assert f"by mlx-lm's {method}, calibrated on 768 tokens of `text.txt`" in card and str(tmp_path) not in card
    model, config = load_model(out)
    assert config["quantization"]["bits"] == 2 and model.args.ffn_padding == 40


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_a_text_that_cannot_be_measured_is_found_first(command: str, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("a")
    assert main([command, TINY, str(tmp_path / "out"), "--measure", str(tmp_path / "short")]) == 1
    assert not (tmp_path / "out").exists()


def test_measured(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", TINY, str(tmp_path / "out"), "--bits", "8", "--measure", text]) == 0
    assert "Perplexity " in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("## Measured") == 1 and "Perplexity on `text.txt`" in card and "| 0-256 | 256 |" in card


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["convert", TINY, "out", "--bits", "7"], 1, "affine has bits 2, 3, 4, 5, 6, 8, not 7"),
        (["convert", TINY, "out", "--bits", "8", "--mode", "mxfp4"], 1, "mxfp4 has bits 4, not 8"),
        (["convert", TINY, "out", "--mode", "gguf"], 2, "'affine', 'mxfp4', 'mxfp8', 'nvfp4'"),
        (["convert", TINY, "out", "--recipe", "best"], 2, "'default', 'all', 'mixed_2_6'"),
        (["convert", TINY, "out", "--dequantize"], 1, "is not quantized: there is nothing to dequantize"),
        (["convert", TINY, "out", "--to-official", "--to-fla"], 1, "--to-official or --to-fla, not both"),
        (["convert", TINY, "out", "--to-fla", "--bits", "4"], 1, "does not go with --bits"),
        (["convert", TINY, "out", "--to-fla", "--measure", "x"], 1, "--measure does not go with --to-fla"),
        (["quantize", TINY, "out", "--calibrate", "gptq"], 1, "--calibrate needs --data"),
        (["quantize", TINY, "out", "--data", "x"], 1, "--data is for --calibrate"),
        (["quantize", TINY, "out", "--calibrate", "gptq", "--data", "x", "--bits", "3"], 1, "gptq has bits 2, 4, 8"),
        (["quantize", TINY, "out", "--calibrate", "dwq", "--data", "x", "--bits", "8"], 1, "nothing to gain at 8 bits"),
        (["quantize", TINY, "out", "--calibrate", "dwq", "--data", "x", "--mode", "mxfp4"], 1, "in mode affine"),
        (["quantize", TINY, "out", "--calibrate", "dwq", "--data", "x", "--recipe", "all"], 1, "the recipe 'default'"),
        (["quantize", TINY, "out", "--calibrate", "gptq", "--data", "absent"], 1, "there is no file absent"),
        (["inspect", "absent"], 1, "there is no folder absent"),
        (["inspect", "."], 1, "is not a checkpoint"),
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
    assert main(arguments) == status
    printed = capsys.readouterr()
    assert printed.err.startswith("Error: ") and message in printed.err and printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_too_little_text(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["quantize", TINY, str(tmp_path / "out"), "--calibrate", "gptq", "--data", text, "--seq-len", "2000"]
    assert main(arguments) == 1
    assert "too few to calibrate on: give 16,000 or more" in capsys.readouterr().err
