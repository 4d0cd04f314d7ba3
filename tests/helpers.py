"""What several tests share: the goldens, small random models, and how an error is measured."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.loading import load_model
from rodimus_mlx.model import Model

DATA = Path(__file__).parent / "data"
TINY_FOLDER = DATA / "tiny"  # a random checkpoint with a tokenizer of bytes; make_tiny.py wrote it
GOLDENS = DATA / "goldens"
GOLDEN_NAMES = ("plus_bin", "plus_fla", "plus_untied_sharded", "rodimus")

# What no golden has: other convolution widths (1: no memory at all), heads that share keys or values, no window.
VARIANTS: dict[str, dict[str, Any]] = {
    "conv1": {"mixer_cfg": {"d_conv": 1}},
    "conv2": {"mixer_cfg": {"d_conv": 2}},
    "conv7": {"mixer_cfg": {"d_conv": 7}},
    "keys2": {"attn_cfg": {"num_heads_k": 2}},
    "keys6": {"attn_cfg": {"num_heads_k": 6}},
    "keys3_values2": {"attn_cfg": {"num_heads_k": 3, "num_heads_v": 2}},
    "values1": {"attn_cfg": {"num_heads_v": 1}},
    "window1": {"attn_cfg": {"window_size": 1}},
    "window3": {"attn_cfg": {"window_size": 3}},
    "full": {"attn_cfg": {"window_size": None}},
    "no_rope": {"attn_cfg": {"rotary_emb_dim": 0}},
    "half_rope": {"attn_cfg": {"rotary_emb_dim": 4}},
    "scaled": {"use_scale_embedding": True},
    "normed": {"use_norm_embedding": True},
    "untied": {"tie_word_embeddings": False},
    "rodimus": {"block_type": "rodimus"},
    "rodimus_conv1": {"block_type": "rodimus", "mixer_cfg": {"d_conv": 1}},
}


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of a golden: tokens and what the model must make of them."""
    with np.load(GOLDENS / name / "golden.npz") as arrays:
        return dict(arrays)


@functools.cache
def golden_model(name: str, dtype: mx.Dtype = mx.float32) -> Model:
    """A golden's checkpoint; shared by the tests, which leave it as it is."""
    return load_model(GOLDENS / name, dtype=dtype)[0]


def config_dict(name: str, **changes: Any) -> dict[str, Any]:
    """A golden's config.json with changes; a table's (`attn_cfg={...}`) change its entries, the rest stays."""
    config = json.loads((GOLDENS / name / "config.json").read_text())
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            config[key] = {**config[key], **value}
        else:
            config[key] = value
    return config


def tiny_config(block_type: str = "rodimus_plus", **changes: Any) -> RodimusConfig:
    """Sizes that are not round and all different: a layer that mixes up two of them fails."""
    config: dict[str, Any] = {
        "block_type": block_type,
        "d_model": 48,
        "n_layer": 2,
        "vocab_size": 61,
        "norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "mixer_cfg": {"expand_ratio": 1.5, "mem_size": 20, "normalize_epsilon": 1e-5},
        "attn_cfg": {"num_heads": 6, "window_size": 10, "ffn_expand_ratio": 4 / 3},
    }
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    return RodimusConfig.from_dict(config)


def random_model(config: RodimusConfig, seed: int = 0) -> Model:
    """A model with random weights in every parameter, biases and norms included, large enough to matter."""
    rng = np.random.default_rng(seed)
    model = Model(config)

    def draw(name: str, old: mx.array) -> mx.array:
        values = rng.standard_normal(old.shape)
        if name.endswith("norm.weight") or name.endswith("norm_f.weight"):
            values = 1 + 0.2 * values
        elif len(old.shape) == 2 and not name.endswith("conv.weight"):
            values = values * 1.5 * old.shape[1] ** -0.5
        return mx.array(values.astype(np.float32))

    drawn = [(name, draw(name, old)) for name, old in tree_flatten(model.parameters())]
    model.update(tree_unflatten(drawn))
    model.eval()
    return model


def random_tokens(model: Model, batch: int, length: int, seed: int = 0) -> mx.array:
    """[batch, length] random tokens of the model's vocabulary."""
    return mx.array(np.random.default_rng(seed).integers(0, model.args.vocab_size, (batch, length)))


def run_in_steps(model: Model, tokens: mx.array, steps: list[int], cache: list[Any] | None = None) -> mx.array:
    """Logits [B, L, vocab] of tokens that go through a cache in pieces of the given lengths."""
    cache = model.make_cache() if cache is None else cache
    outputs, begin = [], 0
    for step in steps:
        outputs.append(model(tokens[:, begin : begin + step], cache=cache))
        mx.eval(outputs[-1], [layer.state for layer in cache])
        begin += step
    assert begin == tokens.shape[1]
    return mx.concatenate(outputs, axis=1)


def relative_error(actual: Any, expected: Any) -> float:
    """|actual - expected| / |expected| in the Euclidean norm over all elements, in float64."""
    actual, expected = as_float64(actual), as_float64(expected)
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def worst_position(actual: Any, expected: Any) -> float:
    """The largest `relative_error` of a single position, for [..., positions, features]."""
    actual, expected = as_float64(actual), as_float64(expected)
    assert actual.shape == expected.shape
    errors = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return float(errors.max())


def largest_difference(actual: Any, expected: Any) -> float:
    """max |actual - expected|."""
    actual, expected = as_float64(actual), as_float64(expected)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max())


def as_float64(x: Any) -> np.ndarray:
    """An array of MLX or numpy as float64; bfloat16 goes by float32, which holds it exactly."""
    if isinstance(x, mx.array):
        x = np.array(x.astype(mx.float32) if x.dtype in (mx.bfloat16, mx.float16) else x)
    return np.asarray(x, np.float64)
