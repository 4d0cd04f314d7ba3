"""Gradients on the path that training takes: against the goldens, and against plain ways to the same numbers."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers import GOLDEN_NAMES, GOLDENS, VARIANTS, as_float64, golden, random_model, relative_error, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from rodimus_mlx.convert.mapping import parts
from training import assert_same, loss_and_gradients, random_samples, small_model, whole_batch

from rodimus_mlx.cache import attention_cache, mixer_cache
from rodimus_mlx.finetune import step
from rodimus_mlx.finetune.batches import assemble, cut
from rodimus_mlx.finetune.initialize import initialize
from rodimus_mlx.finetune.loss import cross_entropy, cross_entropy_value
from rodimus_mlx.finetune.parameters import named
from rodimus_mlx.finetune.settings import Settings
from rodimus_mlx.loading import load_model

GRADIENT = 1e-4  # the goldens' gradients are float32 themselves
SAME = 2e-5  # float32 sums in another order
LOSS = 1e-6
BFLOAT16 = 6e-2  # 8 bits of mantissa through 2 layers and back

FULL = {"method": "full"}
every_golden = pytest.mark.parametrize("name", GOLDEN_NAMES)
with_and_without_recomputing = pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])


def golden_errors(name, gradients):
    """Relative errors of a golden's gradients, by official name."""
    official = parts(load_model(GOLDENS / name)[0].args, "official")
    errors = {}
    for key, expected in golden(name).items():
        if key.startswith("grad/"):
            part = official[key.removeprefix("grad/").replace("/", ".")]
            actual = as_float64(gradients[part.ours])[part.start : part.stop]
            errors[key] = relative_error(actual.reshape(expected.shape), expected)
    return errors


@every_golden
@with_and_without_recomputing
def test_goldens(name, again):
    model = load_model(GOLDENS / name, dtype=mx.float32)[0]
    batch = whole_batch(golden(name)["tokens"])
    loss, gradients = loss_and_gradients(
        model, [batch], 1 / batch.targets.size, Settings(**FULL, grad_checkpoint=again)
    )
    assert loss == pytest.approx(float(golden(name)["loss"]), rel=LOSS)
    errors = golden_errors(name, gradients)
    assert errors and max(errors.values()) <= GRADIENT


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_low_rank_gradients_compiled(again, monkeypatch):
    batch = whole_batch(np.random.default_rng(6).integers(0, 61, (2, 33)))
    segments = cut_at(batch, [16, 16])
    choices = Settings(grad_checkpoint=again)
    loss, expected = loss_and_gradients(small_model(), segments, 1.0, choices, carry=True)
    monkeypatch.setattr(step, "compiled", mx.compile)  # as on a GPU
    compiled_loss, gradients = loss_and_gradients(small_model(), segments, 1.0, choices, carry=True)
    assert compiled_loss == pytest.approx(loss, rel=LOSS)
    assert_same(gradients, expected, SAME)


def test_goldens_compiled_and_in_parts_of_the_vocabulary(monkeypatch):
    monkeypatch.setattr(step, "compiled", mx.compile)  # as on a GPU
    monkeypatch.setattr(step, "tokens_in_part", lambda *_: 7)
    model = load_model(GOLDENS / "plus_bin", dtype=mx.float32)[0]
    batch = whole_batch(golden("plus_bin")["tokens"])
    loss, gradients = loss_and_gradients(model, [batch], 1 / batch.targets.size, Settings(**FULL))
    assert loss == pytest.approx(float(golden("plus_bin")["loss"]), rel=LOSS)
    assert max(golden_errors("plus_bin", gradients).values()) <= GRADIENT


def cut_at(batch, lengths):
    starts = np.cumsum([0, *lengths])
    return [cut(batch, columns=slice(begin, end)) for begin, end in pairwise(starts)]


def through_the_models_own_cache(model, segments, scale):
    """The same loss and gradients by `make_cache` and plain cross entropy, in one backward pass over all segments."""

    def loss(model):
        cache, total = model.make_cache(), 0.0
        for segment in segments:
            logits = model(mx.array(segment.tokens), cache=cache)
            total = total + nn.losses.cross_entropy(logits, mx.array(segment.targets)).sum()
            for layer in cache:
                mixer, attention = mixer_cache(layer), attention_cache(layer)
                mixer.cache = [mx.stop_gradient(x) for x in mixer.cache]
                if attention is not None:
                    attention.keys = mx.stop_gradient(attention.keys)
                    attention.values = mx.stop_gradient(attention.values)
        return scale * total

    value, gradients = nn.value_and_grad(model, loss)(model)
    return value.item(), named(gradients)


@pytest.mark.parametrize("block_type", ["rodimus_plus", "rodimus"])
@with_and_without_recomputing
def test_segments_of_random_cuts(block_type, again):
    batch = whole_batch(np.random.default_rng(1).integers(0, 61, (2, 46)))
    segments = cut_at(batch, [7, 1, 19, 2, 16])
    expected_loss, expected = through_the_models_own_cache(small_model(block_type).train(), segments, 0.25)
    choices = Settings(**FULL, grad_checkpoint=again)
    loss, gradients = loss_and_gradients(small_model(block_type), segments, 0.25, choices, carry=True)
    assert loss == pytest.approx(expected_loss, rel=LOSS)
    assert_same(gradients, expected, SAME)


@pytest.mark.parametrize("variant", VARIANTS)
def test_segments_have_the_loss_of_the_whole(variant):
    config = tiny_config(**VARIANTS[variant])
    batch = whole_batch(np.random.default_rng(2).integers(0, 61, (2, 38)))
    whole, _ = loss_and_gradients(random_model(config), [batch], 1.0, Settings(**FULL))
    segments, _ = loss_and_gradients(
        random_model(config), cut_at(batch, [5, 16, 16]), 1.0, Settings(**FULL), carry=True
    )
    assert segments == pytest.approx(whole, rel=LOSS)


@with_and_without_recomputing
@pytest.mark.parametrize("block_type", ["rodimus_plus", "rodimus"])
def test_packed_samples_have_the_gradients_of_separate_ones(block_type, again):
    samples = random_samples(5, longest=23)
    choices = Settings(**FULL, grad_checkpoint=again)
    packed = assemble(samples, [(0, 1, 2), (3, 4)], 80)
    loss, gradients = loss_and_gradients(small_model(block_type), [packed], 0.1, choices)
    separate = [assemble(samples, [(i,)], None) for i in range(5)]
    expected_loss, expected = loss_and_gradients(small_model(block_type), separate, 0.1, choices)
    assert loss == pytest.approx(expected_loss, rel=LOSS)
    assert_same(gradients, expected, SAME)


@settings(max_examples=25)
@given(
    tokens=st.integers(1, 20),
    part=st.integers(1, 24),
    seed=st.integers(0, 9),
    tied=st.booleans(),
    trained=st.booleans(),
)
def test_cross_entropy_in_parts(tokens, part, seed, tied, trained):
    """Equal to the plain loss and its gradients, whatever the cut and the weights."""
    random = np.random.default_rng(seed)
    h, head = (mx.array(random.standard_normal(shape), mx.float32) for shape in ((tokens, 6), (11, 6)))
    targets = mx.array(random.integers(0, 11, tokens))
    weights = mx.array(random.integers(0, 3, tokens), mx.float32)

    def parted(head, h):
        own = {"w": head} if trained else {}
        fixed = mx.stop_gradient(head)
        return 3 * cross_entropy(lambda p, x: x @ p.get("w", fixed).T, own, h, targets, weights, part)

    def plain(head, h):
        head = head if trained else mx.stop_gradient(head)
        return 3 * (nn.losses.cross_entropy(h @ head.T, targets) * weights).sum()

    loss, gradients = mx.value_and_grad(parted, argnums=(0, 1))(head, h)
    expected_loss, expected = mx.value_and_grad(plain, argnums=(0, 1))(head, h)
    value = cross_entropy_value(lambda p, x: x @ head.T, {}, h, targets, weights, part)
    assert np.allclose([loss.item(), 3 * value.item()], expected_loss.item(), rtol=1e-5, atol=1e-5)
    for actual, wanted in zip(gradients, expected):
        assert np.allclose(actual, wanted, rtol=1e-4, atol=1e-5)


def test_bfloat16_keeps_float32_gradients_near_float32s():
    batch = whole_batch(np.random.default_rng(3).integers(0, 61, (2, 33)))
    _, expected = loss_and_gradients(initialize(tiny_config()), [batch], 1 / 64, Settings(**FULL))
    _, gradients = loss_and_gradients(initialize(tiny_config()), [batch], 1 / 64, Settings(**FULL), dtype=mx.bfloat16)
    assert {g.dtype for g in gradients.values()} == {mx.float32}
    flat, wanted = (np.concatenate([as_float64(g[name]).ravel() for name in expected]) for g in (gradients, expected))
    assert relative_error(flat, wanted) <= BFLOAT16


def test_dropout_follows_the_key_also_where_layers_are_recomputed():
    batch = whole_batch(np.random.default_rng(4).integers(0, 61, (2, 17)))
    kept, again = (Settings(dropout=0.4, grad_checkpoint=flag) for flag in (False, True))
    first, second, other = (mx.array([i, 0], mx.uint32) for i in (1, 1, 2))
    loss, gradients = loss_and_gradients(small_model(), [batch], 1.0, kept, key=first)
    same_loss, same = loss_and_gradients(small_model(), [batch], 1.0, again, key=second)
    _, different = loss_and_gradients(small_model(), [batch], 1.0, kept, key=other)
    assert loss == pytest.approx(same_loss, rel=LOSS)
    for name in gradients:
        assert np.allclose(gradients[name], same[name], rtol=1e-4, atol=1e-5)
    assert any(not np.allclose(gradients[name], different[name], rtol=1e-2) for name in gradients)


def test_recomputing_takes_less_memory():
    batch = whole_batch(np.random.default_rng(5).integers(0, 61, (1, 1025)))
    peaks = []
    for again in (False, True):
        model = small_model(n_layer=6)
        mx.reset_peak_memory()
        loss_and_gradients(model, [batch], 1.0, Settings(grad_checkpoint=again))
        peaks.append(mx.get_peak_memory())
    assert peaks[1] < 0.5 * peaks[0]
