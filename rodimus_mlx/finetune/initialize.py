"""The official initialisation, for training from scratch.

From the official code's `_init_weights`: matrices and embeddings normal with a deviation of 0.02; every block's output
projections divided by the root of the number of residual branches; the gates' projections xavier-uniform with a gain of
2^-2.5; the selection gate's bias such that softplus of it is log-uniform in [0.001, 0.1], the temperature's such that
sigmoid of it is uniform in [1/16, 0.9]; PyTorch's own uniform for the convolution; ones for norms and residual weights.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from ..config import RodimusConfig
from ..model import Model

DEVIATION = 0.02
GATE_GAIN = 2**-2.5
SELECTION = (1e-3, 1e-1)  # of softplus(bias)
TEMPERATURE = (1 / 16, 0.9)  # of sigmoid(bias)


def initialize(config: RodimusConfig, seed: int = 0) -> Model:
    """A model with random float32 weights to train from scratch; the same for the same seed."""
    mx.random.seed(seed)
    model = Model(config)
    embeddings = model.model.embeddings
    embeddings.weight = _normal(embeddings.weight)
    if "lm_head" in model:
        model.lm_head.weight = _normal(model.lm_head.weight)
    branches = 3 if config.has_attention else 1  # a block's mixer, attention and FFN, or its mixer alone
    rescale = (branches * config.n_layer) ** -0.5
    for layer in model.layers:
        _mixer(layer.mixer, config.mem_size, rescale)
        if config.has_attention:
            layer.attn.qkv_proj.weight = _normal(layer.attn.qkv_proj.weight)
            layer.ffn.fc.weight = _normal(layer.ffn.fc.weight)
            for part in (layer.attn, layer.ffn):
                part.out_proj.weight = _normal(part.out_proj.weight) * rescale
    mx.eval(model.parameters())
    return model


def _mixer(mixer: nn.Module, n: int, rescale: float) -> None:
    mixer.fc.weight = _normal(mixer.fc.weight)
    mixer.out_proj.weight = _normal(mixer.out_proj.weight) * rescale
    features, taps = mixer.conv.weight.shape
    bound = taps**-0.5
    mixer.conv.weight = mx.random.uniform(-bound, bound, (features, taps))
    mixer.conv.bias = mx.random.uniform(-bound, bound, (features,))
    # q | k and g | t are two matrices in the official code, and xavier's bound depends on a matrix' rows.
    mixer.qkgt_proj.weight = mx.concatenate([_xavier(2 * n, features), _xavier(2 * n, features)])
    mixer.gate_bias = mx.concatenate([_selection_bias(n), _temperature_bias(n)])
    for gate in (mixer.ch_gate_0, mixer.ch_gate_1):
        gate.weight = _xavier(*gate.weight.shape)
    mixer.value_bias = mx.zeros(features)
    mixer.residual_weight = mx.ones(features)


def _normal(like: mx.array) -> mx.array:
    return mx.random.normal(like.shape) * DEVIATION


def _xavier(rows: int, columns: int) -> mx.array:
    bound = GATE_GAIN * math.sqrt(6 / (rows + columns))
    return mx.random.uniform(-bound, bound, (rows, columns))


def _selection_bias(n: int) -> mx.array:
    low, high = (math.log(x) for x in SELECTION)
    gate = mx.exp(mx.random.uniform(low, high, (n,)))
    return gate + mx.log(-mx.expm1(-gate))  # the inverse of softplus


def _temperature_bias(n: int) -> mx.array:
    temperature = mx.random.uniform(*TEMPERATURE, (n,))
    return mx.log(temperature) - mx.log1p(-temperature)
