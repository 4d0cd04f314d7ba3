"""The reference for streamed quantizing: a model in memory, padded and quantized at once by MLX's own function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from rodimus_mlx.convert.schemes import Scheme

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.model import Model


def quantized_in_memory(config: RodimusConfig, weights: dict[str, mx.array], chosen: Mapping[str, Scheme]) -> Model:
    """A model with each of the chosen modules quantized, its FFN as wide as that takes.

    The weights are taken out of their dict, and go when they have been quantized: a large model fits only once.
    """
    zeros = -config.d_ffn % max([64, *(scheme.group_size for scheme in chosen.values())])
    for i in range(config.n_layer if zeros else 0):
        into, outof = f"model.layers.{i}.ffn.fc.weight", f"model.layers.{i}.ffn.out_proj.weight"
        value, gate = (mx.pad(half, [(0, zeros), (0, 0)]) for half in mx.split(weights[into], 2))
        weights[into] = mx.concatenate([value, gate])
        weights[outof] = mx.pad(weights[outof], [(0, 0), (0, zeros)])
    model = Model(replace(config, d_ffn=config.d_ffn + zeros, ffn_padding=zeros))
    model.load_weights(list(weights.items()))
    weights.clear()
    nn.quantize(model, class_predicate=lambda path, _: chosen[path]._asdict() if path in chosen else False)
    for module in model.modules():
        mx.eval(module.parameters() if not module.children() else {})
    model.eval()
    return model
