"""State tuning: each mixer learns the state that it starts from, [n, D], instead of starting from zeros.

It costs nothing at inference: the first token finds the learned state where it would find zeros.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from ..mixer import DDTSMixer

STATE, BIAS = "initial_state", "gate_bias"  # a mixer's learned parameters


class StatefulMixer(DDTSMixer):
    """A mixer that starts from its parameter ``initial_state`` [n, D]."""

    def __call__(self, x: mx.array, marks: mx.array | None = None, cache: ArraysCache | None = None) -> mx.array:
        """As `DDTSMixer`; a cache without a state gets the learned one first."""
        if cache is None:
            cache = ArraysCache(2)
        if cache[1] is None:
            state = self[STATE].astype(mx.float32)
            cache[1] = mx.broadcast_to(state, (x.shape[0], *state.shape))
        return super().__call__(x, marks, cache)


def add_initial_states(model: Any, num_layers: int) -> list[StatefulMixer]:
    """Give the mixers of the last ``num_layers`` blocks (0 or less: all) an initial state of zeros; returns them."""
    mixers = []
    for layer in model.layers[-max(num_layers, 0) :]:
        mixer = layer.mixer
        mixer.__class__ = StatefulMixer
        mixer[STATE] = mx.zeros((mixer.gate_bias.shape[0] // 2, mixer.conv.bias.shape[0]))
        mixers.append(mixer)
    return mixers
