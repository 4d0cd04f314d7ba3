"""State tuning: each mixer learns the state that it starts from, [n, D], instead of starting from zeros.

It costs nothing at inference: the first token finds the learned state where it would find zeros.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..mixer import DDTSMixer

STATE, BIAS = "initial_state", "gate_bias"  # a mixer's learned parameters


class StatefulMixer(DDTSMixer):
    """A mixer that starts from its parameter ``initial_state`` [n, D]."""

    def __call__(
        self, h: mx.array, tail: mx.array | None = None, state: mx.array | None = None, *rest: mx.array | None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """As `DDTSMixer`, with the learned state in place of none."""
        if tail is None or state is None:
            tail, state = self.start()
        tail, state = (mx.broadcast_to(x, (h.shape[0], *x.shape[1:])) for x in (tail, state))
        return super().__call__(h, tail, state, *rest)

    def start(self) -> tuple[mx.array, mx.array]:
        """As `DDTSMixer`; the state is the learned one."""
        features, taps = self.conv.weight.shape
        return mx.zeros((1, taps - 1, features), self.conv.weight.dtype), self[STATE].astype(mx.float32)[None]


def add_initial_states(model: Any, num_layers: int) -> list[StatefulMixer]:
    """Give the mixers of the last ``num_layers`` blocks (0 or less: all) an initial state of zeros; returns them."""
    mixers = []
    for layer in model.layers[-max(num_layers, 0) :]:
        mixer = layer.mixer
        mixer.__class__ = StatefulMixer
        mixer[STATE] = mx.zeros((mixer.gate_bias.shape[0] // 2, mixer.conv.bias.shape[0]))
        mixers.append(mixer)
    return mixers
