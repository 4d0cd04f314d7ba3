"""A run that was cut off goes on as if it had not been; what is on disk is complete at any time."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from helpers import TINY_FOLDER
from training import losses_of, random_samples, small_model

from rodimus_mlx.errors import RodimusError
from rodimus_mlx.finetune import checkpoint
from rodimus_mlx.finetune.parameters import named
from rodimus_mlx.finetune.report import describe, metrics_writer
from rodimus_mlx.finetune.settings import Settings
from rodimus_mlx.finetune.trainer import _key, train

KILLS = 5
RUNS = {
    "lora": {"dropout": 0.2, "schedule": "cosine", "warmup": 3, "learning_rate": 1e-2},
    "recomputed": {"dropout": 0.2, "grad_checkpoint": True, "grad_accumulation": 2},
    "packed": {"method": "full", "packing": True, "optimizer": "muon", "weight_decay": 0.1, "learning_rate": 1e-3},
    "segments": {"method": "state", "segment": 16, "weight_decay": 0.1},
    "sgd": {"method": "dora", "optimizer": "sgd", "optimizer_config": {"momentum": 0.9}, "num_layers": 1},
}


class Stopped(Exception):
    """In place of a power cut."""


def stop_at(step):
    def observe(event):
        if event["event"] == "step" and event["step"] == step:
            raise Stopped

    return observe


@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_run_goes_on_exactly(name, tmp_path):
    samples, valid = random_samples(24), random_samples(4, seed=1)
    settings = Settings(iters=9, seq_len=40, save_every=2, eval_every=4, report_every=3, **RUNS[name])
    whole = losses_of(small_model(), samples, settings, tmp_path / "whole", valid=valid)
    with pytest.raises(Stopped):
        train(small_model(), samples, settings, valid=valid, out=tmp_path / "cut", observers=[stop_at(6)])
    rest = losses_of(small_model(), samples, settings, tmp_path / "cut", valid=valid, resume=True)
    assert rest == whole[4:]  # the checkpoint of step 4 was the last one before
    for file in ("adapters.safetensors", "checkpoints/0000009/training.safetensors"):
        expected, actual = (mx.load(str(tmp_path / run / file)) for run in ("whole", "cut"))
        assert all(mx.array_equal(actual[key], expected[key]) for key in expected), file


def events(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def numbers(out):
    """What was measured, but for times and memory."""
    kept = ("event", "step", "loss", "grad_norm", "tokens", "learning_rate", "better")
    return [{key: event[key] for key in kept if key in event} for event in events(out)]


def test_killed_at_any_step_it_goes_on_exactly(tmp_path):
    """Five times kill -9, wherever the run happens to be."""
    draw = random.Random(0)
    words = ["def", "return", "for", "in", "if", "not", "x", "y", "z", "self", "None", "import"]
    for split, count in (("train", 40), ("valid", 6)):
        lines = [json.dumps({"text": " ".join(draw.choices(words, k=draw.randrange(4, 16)))}) for _ in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    command = [sys.executable, "-m", "rodimus_mlx.cli.app", "finetune", "--model", str(TINY_FOLDER)]
    command += [
        "--data",
        str(tmp_path),
        "--iters",
        "60",
        "--save-every",
        "4",
        "--eval-every",
        "7",
        "--report-every",
        "5",
    ]
    command += ["--dropout", "0.1", "--schedule", "linear", "--learning-rate", "1e-3", "--batch-size", "2"]
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True, timeout=120)
    out = tmp_path / "cut"
    killed = 0
    for last in sorted(draw.sample(range(2, 34), KILLS)):
        process = subprocess.Popen([*command, "--out", str(out), "--resume"], stderr=subprocess.DEVNULL)
        while process.poll() is None and not (out / "metrics.jsonl").exists():
            time.sleep(0.01)
        while process.poll() is None and f'"step": {last},' not in (out / "metrics.jsonl").read_text():
            time.sleep(0.002)
        process.kill()
        killed += process.wait() != 0
    assert killed == KILLS
    subprocess.run([*command, "--out", str(out), "--resume"], check=True, capture_output=True, timeout=120)
    assert numbers(out) == numbers(tmp_path / "whole")


def test_no_checkpoint_yet_starts_from_the_beginning(tmp_path):
    settings = Settings(iters=2, seq_len=40)
    assert losses_of(small_model(), random_samples(8), settings, tmp_path, resume=True) == losses_of(
        small_model(), random_samples(8), settings
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 4}, r"--rank is 4, but was 8 in .*0000002; give the old one"),
        ({"seed": 5}, "--seed is 5, but was 0"),
        ({"method": "dora"}, "--method is 'dora', but was 'lora'"),
        ({"iters": 7, "schedule": "cosine"}, "--schedule is 'cosine'"),
        ({"data": 1}, "the training data is not what"),
    ],
    ids=str,
)
def test_what_changes_the_run_is_refused(changed, message, tmp_path):
    base = {"iters": 2, "seq_len": 40}
    train(small_model(), random_samples(8), Settings(**base), out=tmp_path)
    samples = random_samples(8, seed=changed.pop("data", 0))
    with pytest.raises(RodimusError, match=message):
        train(small_model(), samples, Settings(**{**base, **changed}), out=tmp_path, resume=True)


def test_a_run_at_a_constant_rate_may_be_made_longer(tmp_path):
    samples = random_samples(8)
    whole = losses_of(small_model(), samples, Settings(iters=5, seq_len=40))
    train(small_model(), samples, Settings(iters=3, seq_len=40), out=tmp_path)
    longer = Settings(iters=5, seq_len=40, report_every=1, save_every=1)
    assert losses_of(small_model(), samples, longer, tmp_path, resume=True) == whole[3:]


@pytest.mark.parametrize("changed", ["data", "val_batches", None])
def test_another_validation_starts_the_comparison_anew(changed, tmp_path):
    """Its losses say nothing beside the old best one, here below all of them."""
    base = {"iters": 4, "seq_len": 40, "eval_every": 2, "early_stop": 1, "batch_size": 2}
    train(small_model(), random_samples(8), Settings(**base), valid=random_samples(6, seed=1), out=tmp_path)
    file = checkpoint.latest(tmp_path) / "training.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps({**facts, "best_loss": 0.0, "best_step": 2, "stale": 1}))
    seen = []
    settings = Settings(**{**base, "iters": 6}, val_batches=1 if changed == "val_batches" else 25)
    valid = random_samples(6, seed=2 if changed == "data" else 1)
    model = small_model()
    choices = {"valid": valid, "out": tmp_path, "resume": True, "observers": [seen.append]}
    result = train(model, random_samples(8), settings, **choices)
    lines = [line for event in seen for line in describe(event)]
    assert ("the validation is not the one of before: the best loss is looked for anew" in lines) == bool(changed)
    if changed is None:
        assert (result.best_loss, result.steps, result.stopped_early) == (0.0, facts["step"], True)
        return
    losses = {event["step"]: event["loss"] for event in seen if event["event"] == "valid"}
    assert set(losses) == {facts["step"], *range(facts["step"] + 2, result.steps + 1, 2)} and len(losses) > 1
    assert result.best_loss == min(losses.values()) == losses[result.best_step]
    weights = mx.load(str(tmp_path / "adapters.safetensors"))
    assert all(mx.array_equal(p, weights[name]) for name, p in named(model.trainable_parameters()).items())


def test_a_checkpoint_that_does_not_know_its_validation_goes_on(tmp_path):
    settings, valid = Settings(iters=2, seq_len=40, eval_every=1), random_samples(4, seed=1)
    before = train(small_model(), random_samples(8), settings, valid=valid, out=tmp_path)
    file = checkpoint.latest(tmp_path) / "training.json"
    facts = json.loads(file.read_text())
    del facts["identity"]["validation"]
    file.write_text(json.dumps(facts))
    after = train(small_model(), random_samples(8), settings, valid=valid, out=tmp_path, resume=True)
    assert (after.best_loss, after.best_step) == (before.best_loss, before.best_step)


@pytest.mark.parametrize("broken", ["adapters", "training"])
def test_a_full_disk_leaves_the_last_checkpoint(broken, tmp_path, monkeypatch):
    save = mx.save_safetensors

    def full_disk(file, arrays, *rest):
        if "0000004" in file and broken in file:
            with open(file, "wb") as half:
                half.write(b"half")
            raise RuntimeError("[write] Unable to write 39090 bytes to file.")
        save(file, arrays, *rest)

    monkeypatch.setattr(mx, "save_safetensors", full_disk)
    samples, settings = random_samples(8), Settings(iters=6, seq_len=40, save_every=2)
    with pytest.raises(RodimusError, match=r"0000004 cannot be written: .*; the last complete one is .*0000002"):
        train(small_model(), samples, settings, out=tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0000002"]
    monkeypatch.undo()
    whole = losses_of(small_model(), samples, settings)
    assert losses_of(small_model(), samples, settings, tmp_path, resume=True) == whole[2:]


def test_too_small_a_disk_is_said_before_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(RodimusError, match=r"checkpoints need [\d,]+ bytes, 1,000 are free"):
        train(small_model(), random_samples(8), Settings(iters=2, seq_len=40), out=tmp_path)


def test_a_half_written_checkpoint_is_not_taken(tmp_path):
    train(small_model(), random_samples(8), Settings(iters=2, seq_len=40), out=tmp_path)
    good = checkpoint.latest(tmp_path)
    (tmp_path / "checkpoints" / ".partial-0000003").mkdir()
    (tmp_path / "checkpoints" / "0000004").mkdir()
    assert checkpoint.latest(tmp_path) == good


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    train(small_model(), random_samples(8), Settings(iters=2, seq_len=40), out=tmp_path)
    (tmp_path / "checkpoints/0000002/training.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(RodimusError, match="0000002 cannot be read"):
        train(small_model(), random_samples(8), Settings(iters=4, seq_len=40), out=tmp_path, resume=True)


def test_metrics_after_the_checkpoint_and_half_lines_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [{"event": "step", "step": i, "loss": 1.0} for i in (1, 2, 3)]
    file.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"event": "st')
    write = metrics_writer(file)
    write({"event": "start", "step": 2})
    write({"event": "step", "step": 3, "loss": 0.5})
    assert [event["loss"] for event in events(tmp_path)] == [1.0, 1.0, 0.5]


def test_random_keys_differ_from_step_to_step():
    numbers = itertools.product(range(5), range(3), range(3), range(2))
    keys = {tuple(np.array(_key(0, *each)).tolist()) for each in numbers}
    assert len(keys) == 90
