"""What a run leaves in memory, however it ends: the model whole, in its own types, layers and dropouts."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers import largest_difference, random_tokens, run_in_steps
from training import random_samples, small_model

from rodimus_mlx.errors import RodimusError
from rodimus_mlx.finetune.dropout import KeyedDropout
from rodimus_mlx.finetune.parameters import named
from rodimus_mlx.finetune.settings import METHODS, Settings
from rodimus_mlx.finetune.trainer import train

BASE = {"iters": 2, "seq_len": 40, "dropout": 0.2, "grad_checkpoint": True}
WHOLE = 2e-4  # generation's sums are in another order, and logits of order 10


def interrupt(event):
    if event["event"] == "step":
        raise KeyboardInterrupt


def assert_whole(model):
    """Each parameter is there in its size and type, and the model generates."""
    plain = {name: (p.shape, p.dtype) for name, p in named(small_model().parameters()).items()}
    held = {name.replace(".linear.", "."): (p.shape, p.dtype) for name, p in named(model.parameters()).items()}
    assert {name: held[name] for name in plain} == plain
    assert all(p.size for p in named(model.parameters()).values())
    assert [type(layer) for layer in model.layers] == [type(layer) for layer in small_model().layers]
    assert not any(isinstance(module, KeyedDropout) for module in model.modules())
    tokens = random_tokens(model, 1, 12)
    assert largest_difference(run_in_steps(model, tokens, [9, 1, 2]), model(tokens)) <= WHOLE


@pytest.mark.parametrize("method", METHODS)
def test_after_the_end(method):
    model = small_model()
    train(model, random_samples(8), Settings(**BASE, method=method))
    assert_whole(model)


@pytest.mark.parametrize("method", METHODS)
def test_after_ctrl_c_it_holds_the_last_step(method):
    model, expected = small_model(), small_model()
    choices = {**BASE, "method": method, "learning_rate": 0.01}
    with pytest.raises(KeyboardInterrupt):
        train(model, random_samples(8), Settings(**choices), observers=[interrupt])
    assert_whole(model)
    before, after = (named(m.parameters()) for m in (expected, model))
    assert any(name not in before or not mx.array_equal(p, before[name]) for name, p in after.items())


def test_after_a_loss_that_is_not_finite():
    model = small_model()
    model.layers[0].mixer.fc.weight[0, 0] = float("nan")
    with pytest.raises(RodimusError, match="step 1: the loss is nan"):
        train(model, random_samples(8), Settings(**BASE, method="full"))
    assert all(p.size for p in named(model.parameters()).values())


def test_after_an_option_that_is_refused_late():
    model = small_model()
    with pytest.raises(RodimusError, match="optimizer_config does not fit"):
        train(model, random_samples(8), Settings(**BASE, method="full", optimizer_config={"momentum": 1}))
    assert_whole(model)


def test_a_refused_resume_does_not_touch_the_model(tmp_path):
    train(small_model(), random_samples(8), Settings(**BASE), out=tmp_path)
    model = small_model()
    with pytest.raises(RodimusError, match="--seed is 5, but was 0"):
        train(model, random_samples(8), Settings(**BASE, seed=5), out=tmp_path, resume=True)
    before, after = (named(m.parameters()) for m in (small_model(), model))
    assert before.keys() == after.keys() and all(mx.array_equal(p, after[name]) for name, p in before.items())
    assert named(model.trainable_parameters()).keys() == before.keys()


def test_after_a_damaged_checkpoint(tmp_path):
    train(small_model(), random_samples(8), Settings(**BASE), out=tmp_path)
    (tmp_path / "checkpoints/0000002/training.safetensors").write_bytes(b"")
    model = small_model()
    with pytest.raises(RodimusError, match="0000002 cannot be read"):
        train(model, random_samples(8), Settings(**BASE), out=tmp_path, resume=True)
    assert_whole(model)


def test_dropout_in_a_second_run():
    model = small_model()
    for rate in (0.2, 0.4):
        train(model, random_samples(8), Settings(**{**BASE, "dropout": rate}))
    assert any(type(module) is nn.Dropout for module in model.modules())


@pytest.mark.parametrize("own", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("choices", [{"method": "full", "num_layers": 1}, {}, {"method": "state"}], ids=str)
def test_types_are_those_of_before(choices, own):
    model = small_model()
    model.set_dtype(own)
    train(model, random_samples(8), Settings(**BASE, **choices))
    types = {name.replace(".linear.", "."): p.dtype for name, p in named(model.parameters()).items()}
    assert {types[name] for name in named(small_model().parameters())} == {own}
