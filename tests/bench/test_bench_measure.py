"""What `bench` counts and how it takes turns; its speeds are read from a clock that the tests turn."""

from __future__ import annotations

import itertools

import mlx.core as mx
import pytest
from helpers import random_model, random_tokens, tiny_config
from mlx_lm.models.cache import make_prompt_cache

from rodimus_mlx.bench import measure as module
from rodimus_mlx.bench.measure import bytes_touched, measure, memory_bandwidth
from rodimus_mlx.bench.models import Subject, parameter_bytes


@pytest.fixture
def model():
    return random_model(tiny_config())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds pass between each look at the clock and the next."""
    ticks = itertools.count(0, 2)
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(ticks))


@pytest.mark.usefixtures("clock")
def test_speeds_are_tokens_over_time(model):
    (found,) = measure([Subject("tiny", model)], [30], tokens=6, rounds=3)
    assert (found.prefill, found.decode) == ([15.0] * 3, [3.0] * 3)
    assert (found.name, found.prompt_tokens) == ("tiny", 30)


def test_models_take_turns(monkeypatch, model):
    turns = []
    monkeypatch.setattr(
        module,
        "_pass",
        lambda subject, result, _, __, counted: turns.append((subject.name, result.prompt_tokens, counted)),
    )
    steps = []
    found = measure(
        [Subject("a", model), Subject("b", model)], [1, 9], rounds=2, progress=lambda *done: steps.append(done)
    )
    a_round = [("a", 1), ("b", 1), ("a", 9), ("b", 9)]
    assert turns == [(*each, counted) for counted in (False, True, True) for each in a_round]
    assert [(each.name, each.prompt_tokens) for each in found] == a_round
    assert steps == [(i + 1, 12) for i in range(12)]


def test_a_model_measured_beside_itself(model):
    """Names need not differ: each has its own rounds."""
    found = measure([Subject("same", model)] * 2, [5], tokens=2, rounds=2)
    assert [len(each.decode) for each in found] == [2, 2]


def test_peak_memory_is_the_models_own():
    large = random_model(tiny_config(vocab_size=20_000))
    small = random_model(tiny_config())
    found = measure([Subject("large", large), Subject("small", small)], [5], tokens=2, rounds=1)
    weights = [parameter_bytes(large), parameter_bytes(small)]
    assert found[0].peak[0] >= weights[0] > 10 * weights[1]
    assert weights[1] <= found[1].peak[0] < weights[0]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30])
def test_prefill_in_steps_is_prefill(model, length):
    prompt, cache = random_tokens(model, 1, length), make_prompt_cache(model)
    token, _ = module._prefill(model, prompt, cache, 8)
    assert token.item() == mx.argmax(model(prompt)[0, -1]).item()
    assert cache[0][1].offset == length


def test_decoding_goes_on_from_its_tokens(model):
    prompt, cache = random_tokens(model, 1, 5), make_prompt_cache(model)
    token, _ = module._prefill(model, prompt, cache, 8)
    text = [*prompt[0].tolist(), token.item()]
    for _ in range(3):
        text.append(mx.argmax(model(mx.array([text]))[0, -1]).item())
    token, _ = module._decode(model, token, cache, 3)
    assert token.item() == text[-1]
    assert cache[0][1].offset == len(text) - 1


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("length", [2, 50])
def test_bytes_touched(tied, length):
    """Weights and keys once, states twice; of an embedding that is no head a row, that is nothing."""
    config = tiny_config(tie_word_embeddings=tied)
    model = random_model(config)
    cache = make_prompt_cache(model)
    mx.eval(model(random_tokens(model, 1, length), cache=cache))
    weights = parameter_bytes(model) - (0 if tied else 4 * config.vocab_size * config.d_model)
    states = 4 * config.mem_size * config.d_inner + 4 * (config.d_conv - 1) * config.d_inner
    keys = 4 * min(length, config.window_keys) * (config.head_dim + config.d_model)
    assert bytes_touched(model, cache) == weights + config.n_layer * (2 * states + keys)


@pytest.mark.usefixtures("clock")
def test_bandwidth_counts_what_is_read_and_written(monkeypatch):
    monkeypatch.setattr(module, "COPY_BYTES", 1000)
    assert memory_bandwidth() == 2 * 1000 * module.COPIES / 2


@pytest.mark.usefixtures("clock")
def test_share_of_the_bandwidth(model):
    (found,) = measure([Subject("tiny", model)], [3], tokens=4, rounds=1)
    assert found.bandwidth_share(found.bytes_touched * 8) == 2 / 8  # at 2 tokens/s
    assert found.launches is None  # on the CPU
