"""The DDTS mixer: data-dependent tempered selection around a linear recurrence (paper, section 3)."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .config import RodimusConfig
from .layer_ops import FEW_ROWS, conv_gate, low_rank
from .marks import PADDING
from .pieces import split
from .recurrence import mix, type_of_values


class CausalConv(nn.Module):
    """The weights of a depthwise causal convolution over time: `taps` a feature, the last for the current token."""

    def __init__(self, features: int, taps: int):
        super().__init__()
        self.weight = mx.zeros((features, taps))
        self.bias = mx.zeros((features,))


class DDTSMixer(nn.Module):
    """h -> fc -> x, z; from x the convolved c and the gated value v; the recurrence; residual, gate, norm; out.

    c = silu(conv(x))                                 v = sigmoid(ch_gate_1(ch_gate_0(x)) + value_bias) * x
    q, k, g, t = qkgt_proj(c)                         o = recurrence(q, k, v) with the gates of g and t
    y = out_proj(rmsnorm((o + residual_weight * c) * silu(z)))
    """

    def __init__(self, config: RodimusConfig):
        super().__init__()
        d, inner, n = config.d_model, config.d_inner, config.mem_size
        self.norm_floor = max(config.normalize_epsilon, 1e-18)  # its square must be above 0 in float32
        self.fc = nn.Linear(d, 2 * inner, bias=False)  # x | z
        self.conv = CausalConv(inner, config.d_conv)
        self.qkgt_proj = nn.Linear(inner, 4 * n, bias=False)
        self.gate_bias = mx.zeros((2 * n,))  # of g | t
        self.ch_gate_0 = nn.Linear(inner, config.input_gate_low_rank, bias=False)
        self.ch_gate_1 = nn.Linear(config.input_gate_low_rank, inner, bias=False)
        self.value_bias = mx.zeros((inner,))
        self.residual_weight = mx.zeros((inner,))
        self.act_norm = nn.RMSNorm(inner, eps=config.norm_epsilon)
        self.out_proj = nn.Linear(inner, d, bias=False)

    def __call__(
        self,
        h: mx.array,
        tail: mx.array | None = None,
        state: mx.array | None = None,
        marks: mx.array | None = None,
        lengths: mx.array | None = None,
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Mix h [B, T, d] over time.

        Shapes:
            tail: [B, taps - 1, D], the convolution's inputs before h, and state: [B, n, D] float32; None: zeros
            marks: [B, T] as in marks.py
            lengths: [B], the real tokens of each row, where rows are padded on the right; None: all

        Returns:
            the mixed h [B, T, d], and the next tail and state.
        """
        xz = self.fc(h)  # [B, T, 2D]
        x, z = split(xz, xz.shape[-1] // 2) if self.training else (_first_half(xz), None)
        if tail is None:
            tail = mx.zeros((x.shape[0], self.conv.weight.shape[1] - 1, x.shape[2]), x.dtype)
        u, expand = self._input_gate(xz, x)
        conv = self.conv.weight, self.conv.bias
        values = type_of_values(x, self.gate_bias.shape[0] // 2)
        own = x if self.training else None
        c, v, next_tail = conv_gate(xz, u, self.value_bias, tail, *conv, marks, own, expand, values)
        if lengths is not None:
            next_tail = _tail_at(lengths, tail, x, marks)
        y, state = mix(
            self.qkgt_proj(c),
            self.gate_bias,
            v,
            c,
            xz,
            self.residual_weight,
            self.act_norm.weight,
            norm_floor=self.norm_floor,
            norm_epsilon=self.act_norm.eps,
            state=state,
            marks=marks,
            z=z,
        )
        return self.out_proj(y), next_tail, state

    def start(self) -> tuple[mx.array, mx.array] | None:
        """The tail [1, taps - 1, D] and the state [1, n, D] that a text starts from; None: zeros."""
        return None

    def _input_gate(self, xz: mx.array, x: mx.array) -> tuple[mx.array, mx.array | None]:
        """ch_gate_1(ch_gate_0(x)) [B, T, D]; or ch_gate_0(x) [B, T, r] and the weight that `conv_gate` is to apply."""
        down, up = self.ch_gate_0, self.ch_gate_1
        if type(up) is not nn.Linear or "bias" in up:  # quantized, with an adapter ...
            return up(down(x)), None
        if self.training or type(down) is not nn.Linear or "bias" in down or xz.size // xz.shape[-1] <= FEW_ROWS:
            return down(x), up.weight
        return low_rank(xz, down.weight, up.weight), None


def _first_half(xz: mx.array) -> mx.array:
    """x [B, T, D] of xz [B, T, 2D]; a single row without the gap behind it, which would make a GPU copy it."""
    batch, length, width = xz.shape
    if batch == length == 1:
        return xz.reshape(2, width // 2)[:1][None]
    return xz[..., : width // 2]


def _tail_at(lengths: mx.array, tail: mx.array, x: mx.array, marks: mx.array | None) -> mx.array:
    """The convolution's next tail where rows are padded on the right: the inputs before each row's own end."""
    if marks is not None:
        x = mx.where((marks != PADDING)[..., None], x, 0)
    ends = mx.clip(lengths, 0, x.shape[1])
    positions = ends[:, None] + mx.arange(tail.shape[1])
    return mx.take_along_axis(mx.concatenate([tail, x], axis=1), positions[..., None], axis=1)
