"""Blocks, and whole steps, as compiled graphs: what a GPU runs while decoding, here around plain MLX on the CPU."""

from __future__ import annotations

import copy

import mlx.core as mx
import pytest
from helpers import golden_model, largest_difference, random_tokens
from mlx.utils import tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers

from rodimus_mlx import cache as cache_module
from rodimus_mlx import compiled as compiled_module
from rodimus_mlx.model import RodimusModel

LOGITS = 1e-4  # decoding against the whole prompt, as in test_decode
LENGTH = 40  # plus_bin's window is 9


@pytest.fixture(params=["plus_bin", "rodimus"])
def model(request, monkeypatch):
    """A golden whose parts are compiled as on a GPU, while the layers stay with plain MLX."""
    monkeypatch.setattr(compiled_module, "active_backend", lambda: "metal")
    monkeypatch.setattr(cache_module, "active_backend", lambda: "metal")
    return copy.deepcopy(golden_model(request.param))


@pytest.fixture
def steps(monkeypatch):
    """Counts the tokens that go the way of one graph for the whole model."""
    count = [0]
    step = RodimusModel._steady_step

    def counted(self, *arguments):
        count[0] += 1
        return step(self, *arguments)

    monkeypatch.setattr(RodimusModel, "_steady_step", counted)
    return count


def decoded(model, tokens, cache, start=0):
    """Logits of tokens given one by one."""
    return mx.concatenate([model(tokens[:, i : i + 1], cache=cache) for i in range(start, tokens.shape[1])], axis=1)


def test_decoding_equals_prefill(model, steps):
    tokens = random_tokens(model, 1, LENGTH)
    assert largest_difference(decoded(model, tokens, model.make_cache()), model(tokens)) <= LOGITS
    assert steps[0] > LENGTH / 2


def test_steps_mix_with_longer_cuts(model, steps):
    """From one token at a time to several and back, with the window full: the caches mean the same to both ways."""
    tokens = random_tokens(model, 1, LENGTH)
    cache, parts, begin = model.make_cache(), [], 0
    for length in (13, 1, 1, 3, 1, 1, 1, 12, 1, 1, 5):
        parts.append(model(tokens[:, begin : begin + length], cache=cache))
        begin += length
    assert begin == LENGTH and steps[0] == 7
    assert largest_difference(mx.concatenate(parts, axis=1), model(tokens)) <= LOGITS


def test_a_copied_cache_goes_its_own_way(model):
    tokens = random_tokens(model, 1, LENGTH)
    cache = model.make_cache()
    model(tokens[:, :20], cache=cache)
    other = copy.deepcopy(cache)
    first, second = decoded(model, tokens, cache, 20), decoded(model, tokens, other, 20)
    assert largest_difference(first, second) == 0


def test_new_weights_are_seen(model):
    """A compiled graph reads the parameters anew: other weights, other layers."""
    tokens = random_tokens(model, 1, LENGTH)
    before = decoded(model, tokens, model.make_cache())
    model.update(tree_map(lambda p: p * 1.01, model.parameters()))
    after = decoded(model, tokens, model.make_cache())
    assert largest_difference(after, model(tokens)) <= LOGITS
    assert largest_difference(after, before) > 100 * LOGITS

    linear_to_lora_layers(model, -1, {"rank": 2, "scale": 4.0, "dropout": 0.0})
    model.update(tree_map(lambda p: p + 0.01 * (p.ndim > 1), model.trainable_parameters()))
    model.eval()
    adapted = decoded(model, tokens, model.make_cache())
    assert largest_difference(adapted, model(tokens)) <= 4 * LOGITS  # larger logits
    assert largest_difference(adapted, after) > 100 * LOGITS
