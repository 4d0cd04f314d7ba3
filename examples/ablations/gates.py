"""Models without one of the paper's gates, by weights alone: no switch in the model's code, which runs as it is.

The mixer computes, with g = softplus(.) and t = sigmoid(.) of projections of the text,

    S <- exp(-g t) S + (k / |k| * g**t) v,    v = sigmoid(u) x.

A sigmoid whose projection is zero and whose bias is 100 is exactly 1 in float32, whatever the text; at -100 it is 0.
Its slope is exactly 0 too, so that no gradient reaches its weights: training leaves them alone, and weight decay keeps
zeros zero. What is left is the model without the gate:

    temperature   t = 1:  exp(-g) forgets and g lets in: how long and how much are tied together
    selection     t = 0:  exp(0) = 1 and g**0 = 1: nothing is forgotten or selected, linear attention on unit keys
    input_gate    sigmoid(u) = 1:  v = x, every value enters whole
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

SATURATED = 100.0  # sigmoid of it is 1, and its slope 0, in float32


def temperature(model: Any) -> None:
    """No temperature: t = 1."""
    _fix_temperature(model, SATURATED)


def selection(model: Any) -> None:
    """No selection: t = 0, and with it the forget gate and the gate g**t are 1."""
    _fix_temperature(model, -SATURATED)


def input_gate(model: Any) -> None:
    """No input gate on the values: v = x."""
    for layer in model.layers:
        mixer = layer.mixer
        mixer.ch_gate_0.weight = mx.zeros_like(mixer.ch_gate_0.weight)
        mixer.ch_gate_1.weight = mx.zeros_like(mixer.ch_gate_1.weight)
        mixer.value_bias = mx.full(mixer.value_bias.shape, SATURATED)


def _fix_temperature(model: Any, bias: float) -> None:
    for layer in model.layers:
        mixer = layer.mixer
        n = mixer.gate_bias.size // 2
        mixer.gate_bias[n:] = bias  # of g | t
        mixer.qkgt_proj.weight[3 * n :] = 0  # rows of q | k | g | t


ABLATIONS = {"temperature": temperature, "selection": selection, "input_gate": input_gate}
