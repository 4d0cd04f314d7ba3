"""Through a cache, token by token or in pieces of any size, a text gets the logits that it gets in one call."""

import copy
import itertools

import mlx.core as mx
import pytest
from helpers import VARIANTS, golden_model, largest_difference, random_model, random_tokens, run_in_steps, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

# Logits of size 1 to 5, float32: sums in another order, no more.
DIFFERENCE = 1e-4
GOLDENS = ("plus_bin", "rodimus", "plus_untied_sharded")
LENGTH = 200  # far beyond the goldens' windows of 9 and 17 keys, and beyond three of the recurrence's chunks


@pytest.fixture(scope="module", params=GOLDENS)
def whole(request):
    """A golden model, tokens [1, 200], and their logits in one call without a cache."""
    model = golden_model(request.param)
    tokens = random_tokens(model, 1, LENGTH)
    return model, tokens, model(tokens)


def steps_of(cuts, length):
    edges = [0, *sorted(set(cuts)), length]
    return [b - a for a, b in itertools.pairwise(edges)]


def test_token_by_token(whole):
    model, tokens, expected = whole
    assert largest_difference(run_in_steps(model, tokens, [1] * LENGTH), expected) <= DIFFERENCE


@pytest.mark.parametrize("prompt", [1, 2, 3, 5, 9, 10, 64, 65, 150])
def test_prompt_then_tokens(whole, prompt):
    model, tokens, expected = whole
    steps = [prompt] + [1] * 20
    actual = run_in_steps(model, tokens[:, : sum(steps)], steps)
    assert largest_difference(actual, expected[:, : sum(steps)]) <= DIFFERENCE


@settings(max_examples=15)
@given(cuts=st.lists(st.integers(1, LENGTH - 1), max_size=12))
def test_any_cuts(whole, cuts):
    model, tokens, expected = whole
    assert largest_difference(run_in_steps(model, tokens, steps_of(cuts, LENGTH)), expected) <= DIFFERENCE


@settings(max_examples=15)
@given(steps=st.lists(st.integers(1, 3), min_size=20, max_size=40))
def test_small_cuts(whole, steps):
    """Pieces of 1 to 3 tokens: shorter than the convolution, and mixing the caches' two ways of writing."""
    model, tokens, expected = whole
    length = sum(steps)
    assert largest_difference(run_in_steps(model, tokens[:, :length], steps), expected[:, :length]) <= DIFFERENCE


@settings(max_examples=5)
@given(steps=st.lists(st.integers(1, 20), min_size=3, max_size=8))
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_configs(variant, steps):
    model = random_model(tiny_config(**VARIANTS[variant]))
    tokens = random_tokens(model, 2, sum(steps))
    assert largest_difference(run_in_steps(model, tokens, steps), model(tokens)) <= DIFFERENCE


@pytest.mark.parametrize("prompt", [1, 4, 9, 100])
def test_saved_cache_goes_on(whole, prompt, tmp_path):
    model, tokens, expected = whole
    cache = model.make_cache()
    run_in_steps(model, tokens[:, :prompt], [prompt], cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache, {"note": "middle"})
    loaded, metadata = load_prompt_cache(str(tmp_path / "cache.safetensors"), return_metadata=True)
    assert metadata == {"note": "middle"}
    end = prompt + 13
    for steps in ([1] * 13, [5, 1, 7]):
        actual = run_in_steps(model, tokens[:, prompt:end], steps, copy.deepcopy(loaded))
        assert largest_difference(actual, expected[:, prompt:end]) <= DIFFERENCE


def test_cache_saved_while_decoding_goes_on(whole, tmp_path):
    """The rotating cache is saved in the middle of a turn."""
    model, tokens, expected = whole
    cache = model.make_cache()
    run_in_steps(model, tokens[:, :30], [17] + [1] * 13, cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    actual = run_in_steps(model, tokens[:, 30:50], [1] * 5 + [3] + [1] * 12, loaded)
    assert largest_difference(actual, expected[:, 30:50]) <= DIFFERENCE


def test_copies_of_a_cache_are_independent(whole):
    model, tokens, expected = whole
    cache = model.make_cache()
    run_in_steps(model, tokens[:, :21], [20, 1], cache)
    branch = copy.deepcopy(cache)
    other = random_tokens(model, 1, 15, seed=1)
    run_in_steps(model, other, [1] * 15, branch)
    actual = run_in_steps(model, tokens[:, 21:40], [1] * 19, cache)
    assert largest_difference(actual, expected[:, 21:40]) <= DIFFERENCE


def test_cache_has_one_head_and_the_window():
    """One key head of the head size, all value heads beside it, never more than the window after decoding."""
    model = golden_model("plus_bin")
    cache = model.make_cache()
    run_in_steps(model, random_tokens(model, 1, 40), [30] + [1] * 10, cache)
    for layer in cache:
        conv, state = layer[0][0], layer[0][1]
        assert (conv.shape, state.shape, state.dtype) == ((1, 3, 256), (1, 32, 256), mx.float32)
        assert (layer[1].keys.shape, layer[1].values.shape) == ((1, 1, 9, 32), (1, 1, 9, 128))
