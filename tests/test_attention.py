"""Sliding-window attention in blocks and bands: the same as one dense score matrix under the window's mask."""

from __future__ import annotations

from unittest import mock

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rodimus_mlx.attention import BAND_BLOCK, AttentionMasks, SharedKeyAttention
from rodimus_mlx.cache import attention_cache, make_cache
from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.kernels import launchers
from rodimus_mlx.kernels.backend import Wish, use_backend

TOLERANCE = 1e-5  # float32 sums of some hundred products in another order
HEADS, HEAD = 4, 8


def attention(window_size: int) -> tuple[RodimusConfig, SharedKeyAttention]:
    mx.random.seed(window_size)
    config = RodimusConfig.from_dict(
        {
            "model_type": "rodimus",
            "block_type": "rodimus_plus",
            "d_model": HEADS * HEAD,
            "n_layer": 1,
            "vocab_size": 8,
            "norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "mixer_cfg": {"mem_size": 16, "expand_ratio": 2.0},
            "attn_cfg": {"num_heads": HEADS, "num_heads_k": 1, "num_heads_v": HEADS, "window_size": window_size},
        }
    )
    layer = SharedKeyAttention(config)
    layer.update({"qkv_proj": {"weight": mx.random.normal(layer.qkv_proj.weight.shape) * (HEADS * HEAD) ** -0.5}})
    layer.eval()
    return config, layer


def dense(layer: SharedKeyAttention, x: mx.array) -> mx.array:
    """softmax(q k' / sqrt(head) + mask) v with all scores at once."""
    length = x.shape[1]
    q, k, v = layer.project(x, mx.array(0))
    scores = q @ k.swapaxes(-1, -2) * HEAD**-0.5  # [1, H, T, T]
    rows, columns = mx.arange(length)[:, None], mx.arange(length)
    seen = (columns <= rows) & (columns > rows - layer.window)
    weights = mx.softmax(mx.where(seen, scores, -mx.inf), axis=-1)
    heads = weights @ v.reshape(1, length, HEADS, HEAD).swapaxes(1, 2)
    return layer.out_proj(heads.swapaxes(1, 2).reshape(1, length, -1))


@settings(max_examples=25, deadline=None)
@given(
    window_size=st.sampled_from([2, 9, 254, 256, 511, 600, 3000]),
    cuts=st.lists(st.integers(1, 3 * BAND_BLOCK), min_size=1, max_size=4),
    backend=st.sampled_from(["plain", "metal"]),  # which decides over the blocks
)
def test_any_cut_is_the_dense_window(window_size: int, cuts: list[int], backend: Wish) -> None:
    config, layer = attention(window_size)
    x = mx.random.normal((1, sum(cuts), HEADS * HEAD))
    cache = attention_cache(make_cache(config)[0])
    outputs, begin = [], 0
    for count in cuts:
        with use_backend(backend), mock.patch.object(launchers, "turns", return_value=False):
            past = layer.past(cache, 1, count)
            projected = layer.project(x[:, begin : begin + count], mx.array(cache.offset), past)
            if past is None:
                heads = layer.attend(*projected, None, cache)
            else:
                heads = layer.attend_joined(*projected, count, AttentionMasks(), cache)
                assert cache.keys.shape[2] == min(begin + count, layer.window)
        outputs.append(layer.out_proj(heads))
        begin += count
        assert cache.offset == begin
    assert mx.abs(mx.concatenate(outputs, axis=1) - dense(layer, x)).max() <= TOLERANCE


@pytest.mark.parametrize("length", [BAND_BLOCK - 1, 9 * BAND_BLOCK + 77])
def test_without_a_cache(length: int) -> None:
    _, layer = attention(600)
    x = mx.random.normal((1, length, HEADS * HEAD))
    assert mx.abs(layer(x) - dense(layer, x)).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("backend", "training", "blocks"),
    [
        ("plain", False, [(0, 1024), (1024, 2048), (2048, 2500)]),
        ("metal", True, [(0, 1024), (1024, 2048), (2048, 2500)]),
        ("metal", False, [(0, 1792), (1792, 2500)]),
        ("cuda", True, [(0, 1792), (1792, 2500)]),
    ],
)
def test_queries_that_see_from_the_start_are_one_block_where_no_scores_are_kept(backend, training, blocks):
    _, layer = attention(600)
    layer.train(training)
    with use_backend(backend):
        assert layer._query_blocks(2500, past=100, window=2000) == blocks
        assert layer._query_blocks(1900, past=100, window=2000)[-1][1] == 1900
        assert layer._query_blocks(0, past=100, window=2000) == []


def test_blocks_with_full_windows_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The band is really taken: 2 blocks before the window of 301 keys is full, one call for the 7 behind."""
    calls = []
    attend = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(
        mx.fast,
        "scaled_dot_product_attention",
        lambda q, *rest, **named: calls.append(q.shape) or attend(q, *rest, **named),
    )
    _, layer = attention(600)
    layer(mx.random.normal((1, 9 * BAND_BLOCK, HEADS * HEAD)))
    assert calls[-1] == (7, HEADS, BAND_BLOCK, HEAD)
    assert sum(batch * length for batch, _, length, _ in calls) == 9 * BAND_BLOCK
