"""Copies of caches: what happens to one does not reach the other."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from helpers import largest_difference, random_model, random_tokens, tiny_config

from rodimus_mlx.states.reading import read_stream, read_tokens
from rodimus_mlx.states.snapshot import cache_bytes, compact, snapshot

# float32 sums in another order, through a few layers whose logits are of order 10
TOLERANCE = 1e-4
MODELS = {
    "rodimus": tiny_config("rodimus"),
    "plus": tiny_config(),
    "full": tiny_config(attn_cfg={"window_size": None}),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("length", [1, 3, 17], ids="read {}".format)
def test_either_can_go_on_alone(kind: str, length: int) -> None:
    model = random_model(MODELS[kind])
    tokens = random_tokens(model, 1, length + 12)
    head, rest = tokens[:, :length], tokens[:, length:]
    cache = model.make_cache()
    model(head, cache=cache)
    kept = snapshot(cache)
    first = [model(rest[:, i : i + 1], cache=cache) for i in range(12)]  # in place, token by token
    mx.eval(first)
    for other in (snapshot(kept), compact(kept), kept):
        again = [model(rest[:, i : i + 1], cache=other) for i in range(12)]
        assert largest_difference(mx.concatenate(again), mx.concatenate(first)) < TOLERANCE
    other_way = model(rest, cache=cache)
    assert not np.isnan(np.array(other_way)).any()


@pytest.mark.parametrize("kind", ["rodimus", "plus"])
def test_size_does_not_depend_on_length_or_cutting(kind: str) -> None:
    model = random_model(MODELS[kind])
    sizes = set()
    for steps in ([30], [7] * 50, [500], [1] * 25):
        cache = model.make_cache()
        for step in steps:
            model(random_tokens(model, 1, step), cache=cache)
        sizes.add(cache_bytes(compact(cache)))
    assert len(sizes) == 1


@pytest.mark.parametrize("sizes", [[1], [5, 0, 2], [30, 30, 30], [1] * 40], ids=str)
def test_a_stream_is_read_to_its_last_token(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rodimus_mlx.states.reading.PREFILL_STEP", 16)
    model = random_model(MODELS["plus"])
    tokens = random_tokens(model, 1, sum(sizes))[0].tolist()
    ends = np.cumsum([0, *sizes])
    done: list[int] = []
    streamed, whole = model.make_cache(), model.make_cache()
    count, last = read_stream(model, streamed, (tokens[a:b] for a, b in pairwise(ends)), done.append)
    assert (count, last) == (len(tokens), tokens[-1:])
    assert done == sorted(done)
    read_tokens(model, whole, tokens[:-1])
    logits = [model(mx.array([last]), cache=cache) for cache in (streamed, whole)]
    assert largest_difference(*logits) < TOLERANCE


def test_nothing_to_read() -> None:
    model = random_model(MODELS["rodimus"])
    assert read_stream(model, model.make_cache(), []) == (0, [])
