"""The official initialisation, by its statistics."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from helpers import as_float64, tiny_config

from rodimus_mlx.finetune.initialize import initialize
from rodimus_mlx.finetune.parameters import named

SIZES = {"d_model": 256, "n_layer": 3, "vocab_size": 700, "mixer_cfg": {"expand_ratio": 2, "mem_size": 64}}
SPREAD = 0.05  # of a standard deviation over a few thousand numbers


@pytest.fixture(scope="module", params=["rodimus", "rodimus_plus"])
def model(request):
    return initialize(tiny_config(request.param, **SIZES, attn_cfg={"num_heads": 8}, tie_word_embeddings=False))


def deviation(x):
    return float(as_float64(x).std())


def test_normal_matrices(model):
    kinds = ("fc.weight", "qkv_proj.weight", "embeddings.weight", "lm_head.weight")
    matrices = {name: p for name, p in named(model.parameters()).items() if name.endswith(kinds)}
    assert len(matrices) == (2 + 3 * 3 if model.args.has_attention else 2 + 3)
    for name, matrix in matrices.items():
        assert deviation(matrix) == pytest.approx(0.02, rel=SPREAD), name


def test_output_projections_are_rescaled_by_the_residual_branches(model):
    branches = 3 if model.args.has_attention else 1
    projections = [p for name, p in named(model.parameters()).items() if name.endswith("out_proj.weight")]
    assert len(projections) == branches * 3
    for projection in projections:
        assert deviation(projection) == pytest.approx(0.02 / math.sqrt(branches * 3), rel=SPREAD)


def test_gate_projections_are_xavier_uniform_with_a_small_gain(model):
    mixer = model.layers[0].mixer
    halves = mx.split(mixer.qkgt_proj.weight, 2)
    for matrix in (*halves, mixer.ch_gate_0.weight, mixer.ch_gate_1.weight):
        bound = 2**-2.5 * math.sqrt(6 / sum(matrix.shape))
        assert bound * 0.98 < float(mx.abs(matrix).max()) <= bound
        assert deviation(matrix) == pytest.approx(bound / math.sqrt(3), rel=SPREAD)


def test_gate_biases(model):
    biases = np.concatenate([as_float64(layer.mixer.gate_bias).reshape(2, -1) for layer in model.layers], axis=1)
    selection, temperature = np.log1p(np.exp(biases[0])), 1 / (1 + np.exp(-biases[1]))
    assert selection.min() > 1e-3 * 0.99 and selection.max() < 0.1 * 1.01
    assert np.log(selection).mean() == pytest.approx(math.log(1e-2), abs=0.35)  # 192 draws, uniform in the log
    assert temperature.min() > 1 / 16 and temperature.max() < 0.9
    assert temperature.mean() == pytest.approx((1 / 16 + 0.9) / 2, abs=0.08)


def test_the_rest(model):
    parameters = named(model.parameters())
    for name, p in parameters.items():
        if name.endswith(("norm.weight", "norm_f.weight", "residual_weight")):
            assert mx.all(p == 1), name
        if name.endswith("value_bias"):
            assert mx.all(p == 0), name
        if ".conv." in name:
            assert 0.4 < float(mx.abs(p).max()) <= 0.5, name  # 4 taps: PyTorch's bound 1 / sqrt(4)
        assert p.dtype == mx.float32


def test_a_seed_gives_the_same_model():
    first, again, other = (named(initialize(tiny_config(), seed).parameters()) for seed in (1, 1, 2))
    assert all(mx.array_equal(first[name], again[name]) for name in first)
    assert not mx.array_equal(first["model.embeddings.weight"], other["model.embeddings.weight"])


def test_every_parameter_is_set():
    """None is left at the constructor's own random values: two fresh models differ there, not after this."""
    first, second = initialize(tiny_config(), 3), initialize(tiny_config(), 3)
    assert named(first.parameters()).keys() == named(second.parameters()).keys()
    logits = first(mx.array([[1, 2, 3]]))
    assert float(mx.abs(logits - mx.mean(logits)).max()) < 1  # nothing is known yet
