"""The DDTS mixer: data-dependent tempered selection around a linear recurrence (paper, section 3)."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache

from .config import RodimusConfig
from .recurrence import recurrence

FORGET = -1e4  # a log decay after which nothing is left: exp of it is 0 in float32


class CausalConv(nn.Module):
    """Depthwise causal convolution over time, one filter of `taps` weights for each feature, then SiLU."""

    def __init__(self, features: int, taps: int):
        super().__init__()
        self.weight = mx.zeros((features, taps))  # the last tap meets the current token
        self.bias = mx.zeros((features,))

    def __call__(self, x: mx.array, tail: mx.array, age: mx.array | None = None) -> mx.array:
        """Convolve x [B, T, D] that follows the inputs `tail` [B, taps - 1, D].

        age: [B, T], tokens since the start of each token's document, beyond which no tap reaches; None: no borders.
        """
        taps, length = self.weight.shape[1], x.shape[1]
        padded = mx.concatenate([tail, x], axis=1)
        shifted = [padded[:, i : i + length] for i in range(taps)]
        if age is not None:
            shifted = [mx.where((age >= taps - 1 - i)[..., None], s, 0) for i, s in enumerate(shifted)]
        return _weighted_sum(shifted, [self.weight[:, i] for i in range(taps)], self.bias)


@partial(mx.compile, shapeless=True)
def _weighted_sum(shifted: list[mx.array], weights: list[mx.array], bias: mx.array) -> mx.array:
    total = bias.astype(mx.float32)
    for x, weight in zip(shifted, weights):
        total = total + weight.astype(mx.float32) * x.astype(mx.float32)
    return nn.silu(total).astype(shifted[0].dtype)


def gates(qkgt: mx.array, bias: mx.array, norm_floor: float) -> tuple[mx.array, mx.array, mx.array]:
    """Selection gate g, temperature t, and what they make of the key and the decay.

    g = softplus(.), t = sigmoid(.);  log_decay = -g t;  k <- k / max(|k|, norm_floor) * g**t   (paper, section 3.2)

    Shapes:
        qkgt: [B, T, 4n], the projections q | k | g | t of the convolved input
        bias: [2n], of g | t, added in float32

    Returns:
        q, k and log_decay, each [B, T, n] float32.
    """
    q, k, gate, temperature = mx.split(qkgt.astype(mx.float32), 4, axis=-1)
    gate_bias, temperature_bias = mx.split(bias.astype(mx.float32), 2)
    key, log_decay = _select(k, gate + gate_bias, temperature + temperature_bias, mx.array(norm_floor))
    return q, key, log_decay


@partial(mx.compile, shapeless=True)
def _select(k: mx.array, gate: mx.array, temperature: mx.array, floor: mx.array) -> tuple[mx.array, mx.array]:
    gate = mx.logaddexp(gate, 0.0)
    temperature = mx.sigmoid(temperature)
    k = k / mx.maximum(mx.sqrt((k * k).sum(axis=-1, keepdims=True)), floor)
    return k * gate**temperature, -gate * temperature


@partial(mx.compile, shapeless=True)
def _gate_value(logits: mx.array, x: mx.array) -> mx.array:
    return mx.sigmoid(logits) * x


@partial(mx.compile, shapeless=True)
def _gate_output(o: mx.array, c: mx.array, weight: mx.array, z: mx.array) -> mx.array:
    out = o.astype(mx.float32) + weight.astype(mx.float32) * c.astype(mx.float32)
    return out * nn.silu(z.astype(mx.float32))


class DDTSMixer(nn.Module):
    """h -> fc -> (x, z); convolution and gates from x; the recurrence; a residual; the gate silu(z); norm; out."""

    def __init__(self, config: RodimusConfig):
        super().__init__()
        d, inner, n = config.d_model, config.d_inner, config.mem_size
        self.mem_size = n
        self.norm_floor = config.normalize_epsilon
        self.fc = nn.Linear(d, 2 * inner, bias=False)  # x | z
        self.conv = CausalConv(inner, config.d_conv)
        self.qkgt_proj = nn.Linear(inner, 4 * n, bias=False)
        self.gate_bias = mx.zeros((2 * n,))  # of g | t
        self.ch_gate_0 = nn.Linear(inner, config.input_gate_low_rank, bias=False)
        self.ch_gate_1 = nn.Linear(config.input_gate_low_rank, inner)
        self.residual_weight = mx.zeros((inner,))
        self.act_norm = nn.RMSNorm(inner, eps=config.norm_epsilon)
        self.out_proj = nn.Linear(inner, d, bias=False)

    def __call__(
        self,
        h: mx.array,
        mask: mx.array | None = None,
        cache: ArraysCache | None = None,
        age: mx.array | None = None,
    ) -> mx.array:
        """Mix h [B, T, d] over time; the cache is moved on by T tokens.

        mask: [B, T] bool, False for padding.
        age: [B, T], tokens since the start of each token's document, where several share a row: 0 forgets the past.
        """
        x, z = mx.split(self.fc(h), 2, axis=-1)  # [B, T, D] each
        if mask is not None:
            x = mx.where(mask[..., None], x, 0)
        tail, state = self._recall(x, cache)
        c = self.conv(x, tail, age)
        v = _gate_value(self.ch_gate_1(self.ch_gate_0(x)), x)
        q, k, log_decay = gates(self.qkgt_proj(c), self.gate_bias, self.norm_floor)
        if age is not None:
            log_decay = mx.where((age == 0)[..., None], FORGET, log_decay)
        o, state = recurrence(q, k, v, log_decay, state, mask)
        if cache is not None:
            self._remember(cache, tail, x, state)
        y = _gate_output(o, c, self.residual_weight, z)
        return self.out_proj(mx.fast.rms_norm(y, self.act_norm.weight, self.act_norm.eps).astype(h.dtype))

    def _recall(self, x: mx.array, cache: ArraysCache | None) -> tuple[mx.array, mx.array | None]:
        """The convolution's last inputs [B, taps - 1, D], zeros at the start, and the state."""
        tail, state = (None, None) if cache is None else (cache[0], cache[1])
        if tail is None:
            tail = mx.zeros((x.shape[0], self.conv.weight.shape[1] - 1, x.shape[2]), x.dtype)
        return tail, state

    def _remember(self, cache: ArraysCache, tail: mx.array, x: mx.array, state: mx.array) -> None:
        keep, length = tail.shape[1], x.shape[1]
        inputs = mx.concatenate([tail, x[:, -keep:]], axis=1) if keep else tail
        if cache.lengths is None:
            cache[0] = inputs[:, inputs.shape[1] - keep :]
        else:  # rows are padded on the right: each keeps the inputs before its own end
            ends = mx.clip(cache.lengths, 0, length)
            inputs = mx.concatenate([tail, x], axis=1)
            positions = ends[:, None] + mx.arange(keep)
            cache[0] = mx.take_along_axis(inputs, positions[..., None], axis=1)
        cache[1] = state
        cache.advance(length)
