"""``rodimus-mlx init``, ``finetune`` and ``fuse`` as a user types them."""

from __future__ import annotations

import fcntl
import json
import os

import pytest
from helpers import TINY_FOLDER
from rodimus_mlx.cli.app import main

from rodimus_mlx.loading import load

RECORDS = [{"text": f"x = {i} + {i}\n"} for i in range(12)]


def test_two_runs_into_one_folder(tmp_path, data, capsys):
    out = tmp_path / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert finetune(TINY_FOLDER, data, out, "--seq-len", "64") == 1
    assert "another run writes into" in capsys.readouterr().err
    assert list(out.iterdir()) == []
    os.close(descriptor)
    assert finetune(TINY_FOLDER, data, out, "--seq-len", "64") == 0


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (folder / "valid.jsonl").write_text(json.dumps(RECORDS[0]) + "\n")
    return folder


def finetune(model, data, out, *more):
    places = ["--model", str(model), "--data", str(data), "--out", str(out)]
    return main(["finetune", *places, "--iters", "4", "--report-every", "2", *more])


def test_from_random_weights_to_a_fused_model(tmp_path, data, capsys):
    blank, out, fused = (tmp_path / name for name in ("blank", "adapter", "fused"))
    assert main(["init", str(TINY_FOLDER), str(blank), "--seed", "3"]) == 0
    assert "parameters" in capsys.readouterr().out
    choices = ["--method", "full", "--learning-rate", "1e-3", "--packing", "--seq-len", "64", "--batch-size", "1"]
    assert finetune(blank, data, out, *choices) == 0
    told = capsys.readouterr()
    assert told.out.endswith(f"rodimus-mlx generate --model {blank} --adapter {out}\n")
    for part in ("12 samples, packed into", "step 4: loss ", "step 4: validation loss", "done after 4 steps; best"):
        assert part in told.err
    assert main(["fuse", "--model", str(blank), "--adapter", str(out), "--out", str(fused)]) == 0
    assert str(fused) in capsys.readouterr().out
    _, tokenizer = load(fused)
    assert tokenizer.decode(tokenizer.encode("x = 1")) == "x = 1"
    kinds = [json.loads(line)["event"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["valid", "step", "step", "report", "step", "step", "report", "valid"]


def test_a_config_file_whose_options_the_command_line_overrides(tmp_path, data, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {TINY_FOLDER}\ndata: {data}\nout: {tmp_path / 'out'}\niters: 3\nlora_parameters: {{rank: 2}}\n"
    )
    assert main(["finetune", "--config", str(config), "--iters", "1", "--seq-len", "64"]) == 0
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["settings"]
    assert (settings["iters"], settings["rank"], settings["seq_len"]) == (1, 2, 64)


def test_resuming_a_run_that_is_done(tmp_path, data, capsys):
    assert finetune(TINY_FOLDER, data, tmp_path / "out") == 0
    weights = (tmp_path / "out" / "adapters.safetensors").read_bytes()
    capsys.readouterr()
    assert finetune(TINY_FOLDER, data, tmp_path / "out", "--resume") == 0
    assert "goes on after step 4" in capsys.readouterr().err
    assert (tmp_path / "out" / "adapters.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0"], "--rank must be a whole number from 1 on, not 0"),
        (["--epochs", "2"], "give --iters or --epochs, not both"),
        (["--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["--report-to", "carrier-pigeon"], "--report-to carrier-pigeon"),
        (["--mask-prompt"], "--mask-prompt needs prompt and completion, or messages"),
        (["--batch-size", "99"], "12 samples do not fill a batch of 99"),
    ],
    ids=" ".join,
)
def test_errors_are_one_line_and_leave_nothing(arguments, message, tmp_path, data, capsys):
    assert finetune(TINY_FOLDER, data, tmp_path / "out", *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_missing(capsys):
    assert main(["finetune", "--data", "x", "--out", "y"]) == 1
    assert capsys.readouterr().err == "Error: --model is missing\n"


def test_an_output_folder_with_something_in_it(tmp_path, data, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert finetune(TINY_FOLDER, data, tmp_path) == 1
    assert "is not empty; --resume goes on with its run" in capsys.readouterr().err
    assert finetune(TINY_FOLDER, data, tmp_path / "notes.txt") == 1
    assert "--out must be a folder" in capsys.readouterr().err


def test_a_tokenizer_too_large_for_the_config(tmp_path, capsys):
    config = json.loads((TINY_FOLDER / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
    assert main(["init", str(tmp_path / "config.json"), str(tmp_path / "out"), "--tokenizer", str(TINY_FOLDER)]) == 1
    assert "vocab_size is 200, but the tokenizer has 262 entries" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
