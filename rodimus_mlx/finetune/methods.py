"""What is trained: `lora` and `dora` (mlx-lm's layers), `full`, and `state`."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.utils import linear_to_lora_layers

from ..errors import RodimusError
from .initial_state import BIAS, STATE, add_initial_states
from .lora import make_lean
from .parameters import Parameters, named
from .settings import Settings


def prepare(model: Any, settings: Settings) -> Parameters:
    """Change the model for the method, and freeze the rest; returns its trainable parameters by name.

    Raises:
        RodimusError: the model has not what the settings ask for.
    """
    blocks = len(model.layers)
    if settings.num_layers > blocks:
        raise RodimusError(f"--num-layers is {settings.num_layers}, but the model has {blocks} layers")
    mx.random.seed(settings.seed)
    model.freeze()
    if settings.method == "full":
        _thaw(model, settings.num_layers)
    elif settings.method == "state":
        for mixer in add_initial_states(model, settings.num_layers):
            mixer.unfreeze(recurse=False, keys=[STATE, BIAS])
    else:
        _add_lora(model, settings)
    return named(model.trainable_parameters())


def lora_parameters(settings: Settings) -> dict[str, Any]:
    """What mlx-lm's adapter_config.json calls by this name."""
    own: dict[str, Any] = {"rank": settings.rank, "scale": settings.scale, "dropout": settings.dropout}
    return own if settings.keys is None else {**own, "keys": list(settings.keys)}


def _thaw(model: Any, num_layers: int) -> None:
    if any(isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding) for module in model.modules()):
        raise RodimusError("--method full cannot train a quantized model; use lora, dora or state, or dequantize it")
    if num_layers <= 0:
        model.unfreeze()
    else:
        for layer in model.layers[-num_layers:]:
            layer.unfreeze()


def _add_lora(model: Any, settings: Settings) -> None:
    known = {name for layer in model.layers for name, _ in layer.named_modules()}
    known |= {name for name, _ in model.named_modules()}
    if unknown := [key for key in settings.keys or () if key not in known]:
        linear = sorted(name for name, m in model.layers[0].named_modules() if isinstance(m, nn.Linear))
        raise RodimusError(f"lora keys: the model has no layer {unknown[0]!r}; blocks have {', '.join(linear)}")
    try:
        linear_to_lora_layers(model, settings.num_layers, lora_parameters(settings), use_dora=settings.method == "dora")
    except ValueError as error:
        raise RodimusError(f"--method {settings.method} does not fit this model: {error}") from error
    make_lean(model)
    if not named(model.trainable_parameters()):
        raise RodimusError("lora keys: they name no layer that can be trained")
