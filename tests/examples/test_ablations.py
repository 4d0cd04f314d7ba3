"""A gate that is fixed by weights is a gate that is not there, before training and after it."""

import json
import sys

import ablate
import gates
import mlx.core as mx
import mqar
import numpy as np
import pytest
import tokenize_data
from mlx.utils import tree_flatten

from rodimus_mlx.finetune.initialize import initialize
from rodimus_mlx.finetune.settings import Settings
from rodimus_mlx.finetune.trainer import train
from rodimus_mlx.kernels.reference import sequential_recurrence

CONFIG = mqar.config("rodimus", 8, 32, 16, 8)
FLOAT32 = 1e-5  # the chunked recurrence and the sequential one


def trained(change=None):
    """A small model after some steps, long enough that weight decay would show."""
    model = initialize(CONFIG)
    if change is not None:
        change(model)
    samples = mqar.mixture(64, 16, 2, 16, 0)
    settings = Settings(method="full", seq_len=16, batch_size=16, iters=6, learning_rate=0.01, weight_decay=0.1)
    train(model, samples, settings)
    return model


def weights(model, part):
    return {name: value for name, value in tree_flatten(model.parameters()) if part in name}


@pytest.mark.parametrize("name", gates.ABLATIONS)
def test_training_leaves_a_fixed_gate_as_it_was_and_learns_the_rest(name):
    before = initialize(CONFIG)
    gates.ABLATIONS[name](before)
    after = trained(gates.ABLATIONS[name])
    n = CONFIG.mem_size
    for old, new in zip(before.layers, after.layers):
        old, new = old.mixer, new.mixer
        if name == "input_gate":
            assert not new.ch_gate_0.weight.any() and not new.ch_gate_1.weight.any()
            assert (mx.sigmoid(new.value_bias) == 1).all()
            fixed = new.qkgt_proj.weight, old.qkgt_proj.weight
        else:
            assert not new.qkgt_proj.weight[3 * n :].any()
            assert (mx.sigmoid(new.gate_bias[n:]) == (name == "temperature")).all()
            fixed = new.ch_gate_0.weight, old.ch_gate_0.weight
        assert not mx.allclose(*fixed), "the other gates are learned"


def without(name, mixer, h):
    """The mixer's o by the formula that lacks the gate; h [B, T, d]."""
    n, inner = CONFIG.mem_size, CONFIG.d_inner
    x = mixer.fc(h)[..., :inner]
    padded = mx.pad(x, [(0, 0), (CONFIG.d_conv - 1, 0), (0, 0)])
    taps = [padded[:, i : i + x.shape[1]] * mixer.conv.weight[:, i] for i in range(CONFIG.d_conv)]
    c = sum(taps) + mixer.conv.bias
    c = c * mx.sigmoid(c)
    q, k, g, t = mx.split(mixer.qkgt_proj(c), 4, axis=-1)
    g = mx.logaddexp(g + mixer.gate_bias[:n], 0)
    t = mx.sigmoid(t + mixer.gate_bias[n:])
    k = k / mx.sqrt((k * k).sum(-1, keepdims=True))
    v = x * mx.sigmoid(mixer.ch_gate_1(mixer.ch_gate_0(x)) + mixer.value_bias)
    decay, k = {
        "temperature": lambda: (-g, k * g),
        "selection": lambda: (mx.zeros_like(g), k),
        "input_gate": lambda: (-g * t, k * g**t),
    }[name]()
    v = x if name == "input_gate" else v
    o, _ = sequential_recurrence(q, k, v, decay, mx.zeros((h.shape[0], n, inner)))
    z = mixer.fc(h)[..., inner:]
    y = (o + mixer.residual_weight * c) * z * mx.sigmoid(z)
    return mixer.out_proj(mixer.act_norm(y))


@pytest.mark.parametrize("name", gates.ABLATIONS)
def test_a_fixed_gate_gives_what_the_formula_without_it_gives(name):
    mixer = trained(gates.ABLATIONS[name]).layers[0].mixer
    h = mx.random.normal((2, 20, CONFIG.d_model), key=mx.random.key(0))
    expected = without(name, mixer, h)
    assert mx.abs(mixer(h)[0] - expected).max() < FLOAT32 * mx.abs(expected).max()


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["ablate.py", *map(str, arguments)])
    ablate.main()
    return capsys.readouterr().out.splitlines()


def test_recall_is_measured_for_every_variant(monkeypatch, capsys, tmp_path):
    sizes = "--length 16 --pairs 2 --vocab-size 16 --d-model 32 --mem-size 8 --rows 800 --block rodimus"
    options = ("recall", *sizes.split(), "--steps", 2, "--batch-size", 16, "--out", tmp_path / "out.jsonl")
    lines = run(monkeypatch, capsys, *options)
    assert [line.split(", ")[1].split(" |")[0] for line in lines[-4:]] == list(ablate.VARIANTS)
    assert run(monkeypatch, capsys, *options) == lines[-6:], "nothing is trained twice"


def test_losses_of_text_are_measured_for_every_variant(monkeypatch, capsys, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("train", "valid"):
        tokenize_data.write(tmp_path / f"{name}.npz", [rng.integers(0, 16, 40).tolist() for _ in range(30)])
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    options = ("--steps", 2, "--seq-len", 24, "--batch-size", 4, "--out", tmp_path / "out.jsonl")
    lines = run(monkeypatch, capsys, "text", tmp_path / "config.json", tmp_path, *options)
    assert [line.split(" | ")[0].strip("| ") for line in lines[-4:]] == list(ablate.VARIANTS)
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len({result["loss"] for result in results}) == len(ablate.VARIANTS)
