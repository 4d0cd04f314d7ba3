"""The loop: it learns, validates, keeps the best, stops, and ends clearly where something is wrong."""

from __future__ import annotations

import json
import math
import sys

import mlx.core as mx
import numpy as np
import pytest
from helpers import largest_difference, random_tokens, tiny_config
from training import losses_of, random_samples, small_model

from rodimus_mlx.errors import RodimusError
from rodimus_mlx.finetune import memory
from rodimus_mlx.finetune.adapters import apply
from rodimus_mlx.finetune.data import sample
from rodimus_mlx.finetune.initialize import initialize
from rodimus_mlx.finetune.optimizer import learning_rate
from rodimus_mlx.finetune.parameters import named
from rodimus_mlx.finetune.report import describe, plot
from rodimus_mlx.finetune.settings import Settings, from_options, read_config
from rodimus_mlx.finetune.step import compute_dtype
from rodimus_mlx.finetune.trainer import train

SAME = 1e-5  # float32 sums in another order
LEARN = {"learning_rate": 0.01, "seq_len": 40}


def counting(count=16, length=30):
    """Samples that can be learned: each counts up from somewhere."""
    starts = np.random.default_rng(0).integers(0, 61, count)
    return [sample((start + np.arange(length + 1)) % 61) for start in starts]


@pytest.mark.parametrize(
    "choices",
    [
        {"method": "lora", "learning_rate": 3e-3},
        {"method": "dora", "grad_checkpoint": True, "learning_rate": 3e-3},
        {"method": "full", "packing": True, "seq_len": 64, "optimizer": "muon", "batch_size": 2},
        {"method": "full", "segment": 16, "dtype": "bfloat16", "learning_rate": 2e-3},
    ],
    ids=lambda choices: "-".join(map(str, choices.values())),
)
def test_it_learns(choices):
    losses = losses_of(small_model(), counting(), Settings(**{**LEARN, "iters": 30, **choices}))
    assert losses[-1] < 0.3 * losses[0]


def test_a_state_learns_a_little():
    settings = Settings(method="state", iters=30, seq_len=40, learning_rate=0.1)
    losses = losses_of(small_model(), counting(), settings)
    assert min(losses[-5:]) < 0.8 * losses[0]


@pytest.mark.parametrize("packing", [False, True], ids=["alone", "packed"])
def test_accumulated_batches_equal_one_large_batch(packing):
    base = {**LEARN, "iters": 4, "method": "full", "packing": packing}
    whole = losses_of(small_model(), random_samples(16), Settings(**base, batch_size=4))
    parts = losses_of(small_model(), random_samples(16), Settings(**base, batch_size=4, grad_accumulation=1, segment=0))
    assert whole == parts
    # Rows of one epoch in the same order: batches of 2 x 2 rows take the same rows as batches of 4.
    samples = [random_samples(1, seed=7)[0]] * 16
    large = losses_of(small_model(), samples, Settings(**base, batch_size=4))
    small = losses_of(small_model(), samples, Settings(**base, batch_size=2, grad_accumulation=2))
    assert np.allclose(large, small, rtol=SAME)


def test_the_best_is_published_and_the_last_kept_apart(tmp_path):
    """Validation on other data gets worse while training: the best is an early one."""
    valid = random_samples(6, seed=5)
    settings = Settings(**LEARN, iters=12, eval_every=2, save_every=4)
    events = []
    model = initialize(tiny_config())
    result = train(model, counting(), settings, valid=valid, out=tmp_path, observers=[events.append])
    validations = {e["step"]: e["loss"] for e in events if e["event"] == "valid"}
    assert set(validations) == {0, 2, 4, 6, 8, 10, 12}
    after_start = {step: loss for step, loss in validations.items() if step}
    assert result.best_step == min(after_start, key=after_start.__getitem__) and result.best_step < 12
    tokens = random_tokens(model, 1, 20)
    best, last = initialize(tiny_config()), initialize(tiny_config())
    apply(best, tmp_path)
    apply(last, tmp_path / "checkpoints" / "0000012")
    assert largest_difference(best(tokens), last(tokens)) > 0.01
    assert largest_difference(best(tokens), model(tokens)) <= 1e-4  # the model holds the best
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0000012"]


def test_early_stop(tmp_path):
    settings = Settings(**LEARN, iters=60, eval_every=2, early_stop=2)
    valid = random_samples(6, seed=5)
    result = train(initialize(tiny_config()), counting(), settings, valid=valid, out=tmp_path)
    assert result.stopped_early and result.steps == result.best_step + 4 < 60
    again = train(initialize(tiny_config()), counting(), settings, valid=valid, out=tmp_path, resume=True)
    assert again == result  # it stays stopped


def test_the_validation_loss_is_the_mean_over_targets():
    samples = random_samples(7)
    model = small_model()
    total = sum(
        float(mx.logsumexp(row, axis=-1) - row[target])
        for each in samples
        for row, target in zip(model(mx.array(each.tokens[None, :-1]))[0], each.tokens[1:].tolist())
    )
    seen = []
    settings = Settings(**LEARN, iters=1, segment=16, val_batches=-1, batch_size=3)
    train(model, samples, settings, valid=samples, observers=[seen.append])
    first = next(event for event in seen if event["event"] == "valid")
    assert first["loss"] == pytest.approx(total / sum(each.length for each in samples), rel=1e-5)


def test_a_loss_that_is_not_finite_names_its_step(tmp_path):
    settings = Settings(**{**LEARN, "learning_rate": 1e30}, iters=30, method="full", max_grad_norm=0.0, save_every=1)
    with pytest.raises(RodimusError, match=r"step \d+: the (loss|gradients' norm) is (nan|inf); lower --learning-rate"):
        train(small_model(), counting(), settings, out=tmp_path)
    for folder in (tmp_path / "checkpoints").iterdir():
        arrays = mx.load(str(folder / "training.safetensors"))
        assert all(mx.all(mx.isfinite(a)) for name, a in arrays.items() if name.startswith("parameters."))


def test_a_bad_weight_ends_the_first_step():
    model = small_model()
    model.layers[0].mixer.fc.weight[0, 0] = math.nan
    with pytest.raises(RodimusError, match=r"step 1: the loss is nan"):
        train(model, counting(), Settings(**LEARN, iters=2))


def test_a_validation_loss_that_is_not_finite_is_no_best_one(tmp_path):
    settings = Settings(**{**LEARN, "learning_rate": 1e38}, iters=1, method="full", max_grad_norm=0.0)
    with pytest.raises(RodimusError, match=r"step 1: the validation loss is (nan|inf); lower --learning-rate"):
        train(small_model(), counting(), settings, valid=counting()[:2], out=tmp_path)
    assert not (tmp_path / "adapters.safetensors").exists()


def test_fewer_samples_than_a_batch():
    with pytest.raises(RodimusError, match="3 samples do not fill a batch of 4; lower --batch-size"):
        train(small_model(), random_samples(3), Settings(**LEARN, iters=1))


def test_tokens_beyond_the_vocabulary():
    with pytest.raises(RodimusError, match="the data has token 61, but the model's vocabulary has 61"):
        train(small_model(), [sample([1, 61])] * 4, Settings(**LEARN, iters=1))


def test_epochs():
    result = train(small_model(), random_samples(10), Settings(**LEARN, epochs=2, grad_accumulation=2, batch_size=2))
    assert result.steps == 5


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ({}, [1.0, 1.0, 1.0]),
        ({"warmup": 4}, [0.2, 1.0, 1.0]),
        ({"schedule": "linear"}, [1.0, 0.6, 0.0]),
        ({"schedule": "cosine", "final_learning_rate": 0.2}, [1.0, 0.7236, 0.2]),
        ({"lr_schedule": {"name": "linear_schedule", "arguments": [0.5, 0.1, 10]}}, [0.5, 0.34, 0.1]),
    ],
    ids=str,
)
def test_schedules(choices, expected):
    rate = learning_rate(Settings(learning_rate=1.0, **choices), 10)
    values = [float(rate(mx.array(step)) if callable(rate) else rate) for step in (0, 4, 10)]
    assert values == pytest.approx(expected, abs=1e-4)


def test_what_is_computed_in():
    model = small_model()
    assert compute_dtype(model, "auto") == mx.float32
    model.set_dtype(mx.float16)
    assert compute_dtype(model, "auto") == mx.float32  # a CPU multiplies 16-bit matrices slowly
    assert compute_dtype(model, "bfloat16") == mx.bfloat16


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("block_type", ["rodimus", "rodimus_plus"])
def test_the_predicted_memory_is_near_the_measured(block_type, again):
    model = small_model(block_type, d_model=96, n_layer=4, attn_cfg={"window_size": 128})
    samples = [sample(np.arange(601) % 61) for _ in range(4)]
    settings = Settings(iters=1, batch_size=2, seq_len=600, grad_checkpoint=again)
    seen = []
    resting = mx.get_active_memory() - sum(p.nbytes for p in named(model.parameters()).values())
    train(model, samples, settings, observers=[seen.append])
    predicted = next(event["peak_memory"] for event in seen if event["event"] == "start")
    assert 0.6 < predicted / (mx.get_peak_memory() - resting) < 1.6


def test_segments_take_the_memory_of_one():
    peaks = []
    for length in (512, 4096):
        samples = [sample(np.arange(length + 1) % 61)]
        settings = Settings(iters=2, batch_size=1, seq_len=4096, segment=256)
        train(small_model(), samples, settings)
        peaks.append(mx.get_peak_memory())
    assert peaks[1] < 1.1 * peaks[0]


def test_a_memory_limit_holds_for_the_run_and_no_longer():
    before = mx.set_memory_limit(10**12)
    seen = []

    def look(event):
        limit = mx.set_memory_limit(10**12)
        mx.set_memory_limit(limit)
        seen.append((event["event"], limit, event.get("available_memory")))

    try:
        choices = {"iters": 1, "batch_size": 1, "seq_len": 16}
        train(small_model(), [sample(np.arange(9))], Settings(memory_limit=0.25, **choices), observers=[look])
        assert mx.set_memory_limit(before) == 10**12
    finally:
        mx.set_memory_limit(before)
    assert {limit for _, limit, _ in seen} == {250_000_000}
    assert seen[0] == ("start", 250_000_000, 250_000_000)


def test_a_lower_limit_of_the_callers_stays():
    before = mx.set_memory_limit(5 * 10**8)
    try:
        with memory.limited(10**9):
            assert mx.set_memory_limit(5 * 10**8) == 5 * 10**8
    finally:
        mx.set_memory_limit(before)


@pytest.mark.parametrize("there", [10**9, 100 * 10**9])
def test_without_a_limit_a_run_holds_what_a_step_needs_and_some_work_in_flight(there, monkeypatch):
    monkeypatch.setattr(memory, "_available", lambda: there)
    before = mx.set_memory_limit(10**12)
    seen = []

    def look(event):
        limit = mx.set_memory_limit(10**12)
        mx.set_memory_limit(limit)
        seen.append((limit, event.get("peak_memory")))

    others = mx.zeros(10**8, mx.float32)
    mx.eval(others)
    try:
        choices = Settings(iters=1, batch_size=1, seq_len=16)
        train(small_model(), [sample(np.arange(9))], choices, observers=[look])
        assert mx.set_memory_limit(before) == 10**12
    finally:
        mx.set_memory_limit(before)
    limit, foretold = seen[0]
    assert {each for each, _ in seen} == {limit}
    usual = max(foretold + 10**9, there // 4)
    assert limit == pytest.approx(others.nbytes + usual, rel=0.01)


def test_advice_where_memory_is_short():
    model, settings = small_model(n_layer=12), Settings(seq_len=4096)
    choices = (model, 1000, settings, mx.float32, 4096)
    peak = memory.predict_peak(*choices)
    assert memory.advice(*choices, peak) is None
    assert memory.advice(*choices, peak // 2) == "try --grad-checkpoint"
    assert memory.advice(*choices, peak // 30) == "try --grad-checkpoint --batch-size 1 --segment 1024"
    assert memory.advice(*choices, 1000) == "use a smaller or a quantized model"


def test_lines_for_people():
    lines = []
    settings = Settings(**LEARN, iters=4, report_every=2, eval_every=2)
    train(small_model(), counting(), settings, valid=counting(3), observers=[lambda e: lines.extend(describe(e))])
    text = "\n".join(lines)
    for part in (
        "trains 18,816 of 74,384 parameters",
        "16 samples, 480 tokens an epoch, the longest 30; 3 to validate",
    ):
        assert part in text
    for part in ("4 steps of 4 rows: 1.00 epochs", "it fits", "step 2: loss ", " tokens/s", "step 4: validation loss "):
        assert part in text


def test_the_last_line_without_validation():
    lines = []
    settings = Settings(**LEARN, iters=2)
    train(small_model(), counting(), settings, observers=[lambda e: lines.extend(describe(e))])
    assert lines[-1] == "done after 2 steps"


def test_the_plot_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not plot(tmp_path / "metrics.jsonl", tmp_path / "loss.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "--rank must be a whole number from 1 on, not 0"),
        ({"rank": 1.5}, "--rank must be a whole number"),
        ({"method": "magic"}, "--method must be one of lora, dora, full, state, not 'magic'"),
        ({"dropout": 1.0}, "--dropout must be from 0 to below 1"),
        ({"learning_rate": math.nan}, "--learning-rate must be a number from 0 on"),
        ({"learning_rate": "fast"}, "--learning-rate must be a number"),
        ({"num_layers": 0}, "--num-layers must be -1 for all layers, or 1 or more"),
        ({"iters": 5, "epochs": 1.0}, "give --iters or --epochs, not both"),
        ({"packing": True, "method": "state"}, "--packing does not go with --method state"),
        ({"packing": True, "segment": 512}, "--packing does not go with --segment"),
        ({"colour": 1}, "unknown option 'colour'; known are batch_size"),
    ],
    ids=str,
)
def test_settings_that_are_wrong(options, message):
    with pytest.raises(RodimusError, match=message):
        from_options(options)


def test_a_wrong_optimizer_option():
    with pytest.raises(RodimusError, match=r"optimizer_config does not fit adamw: .*'momentum'"):
        train(small_model(), counting(), Settings(**LEARN, optimizer_config={"momentum": 1}))


def test_a_config_file_in_mlx_lms_names(tmp_path):
    file = tmp_path / "lora.yaml"
    file.write_text(
        "model: some/model\ntrain: true\nfine_tune_type: dora\nlearning_rate: 1e-5\nsteps_per_eval: 7\n"
        "max_seq_length: 99\nadapter_path: out\noptimizer: sgd\noptimizer_config:\n  sgd: {momentum: 0.9}\n"
        "lora_parameters:\n  keys: [mixer.fc]\n  rank: 4\n  scale: 2.0\n  dropout: 0.1\n"
        "lr_schedule:\n  name: cosine_decay\n  arguments: [1e-5, 10]\n"
    )
    options = read_config(file)
    assert (options.pop("model"), options.pop("out")) == ("some/model", "out")
    settings = from_options(options)
    assert (settings.method, settings.rank, settings.keys, settings.learning_rate) == ("dora", 4, ("mixer.fc",), 1e-5)
    assert (settings.eval_every, settings.seq_len, settings.optimizer_config) == (7, 99, {"momentum": 0.9})
    assert json.dumps(settings.to_dict())


@pytest.mark.parametrize("text", ["- a\n", "a: [\n", "just words\n"])
def test_config_files_that_are_none(text, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(RodimusError, match=r"x\.yaml (cannot be read|must hold options)"):
        read_config(tmp_path / "x.yaml")
