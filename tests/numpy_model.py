"""The whole model in numpy and float64, written from the formulas token by token and head by head.

It shares nothing with the package but the names of the weights; the goldens vouch for it (test_goldens.py), and it
vouches for the configs that no golden has.
"""

from __future__ import annotations

import numpy as np

from rodimus_mlx.config import RodimusConfig


def logits(weights: dict[str, np.ndarray], config: RodimusConfig, tokens: np.ndarray) -> np.ndarray:
    """[L] tokens -> [L, vocab] float64; weights by our names, in float64."""
    h = weights["model.embeddings.weight"][tokens]
    if config.use_scale_embedding:
        h = h * np.sqrt(config.mem_size)
    if config.use_norm_embedding:
        h = _norm(h, weights["model.embed_norm.weight"], config)
    for i in range(config.n_layer):
        prefix = f"model.layers.{i}."
        layer = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        m = h + _mixer(_norm(h, layer["mixer_norm.weight"], config), layer, config)
        if config.block_type == "rodimus":
            h = m
        else:
            a = _attention(_norm(m, layer["attn_norm.weight"], config), layer, config)
            value, gate = np.split(_norm(m + a, layer["ffn_norm.weight"], config) @ layer["ffn.fc.weight"].T, 2, -1)
            h = m + (_silu(gate) * value) @ layer["ffn.out_proj.weight"].T
    h = _norm(h, weights["model.norm_f.weight"], config)
    return h @ weights["model.embeddings.weight" if config.tie_word_embeddings else "lm_head.weight"].T


def _mixer(h: np.ndarray, w: dict[str, np.ndarray], config: RodimusConfig) -> np.ndarray:
    n, taps = config.mem_size, config.d_conv
    x, z = np.split(h @ w["mixer.fc.weight"].T, 2, -1)
    c = np.zeros_like(x) + w["mixer.conv.bias"]
    for t in range(len(x)):
        for i in range(taps):
            if t - i >= 0:
                c[t] += w["mixer.conv.weight"][:, taps - 1 - i] * x[t - i]
    c = _silu(c)
    q, k, g, temperature = np.split(c @ w["mixer.qkgt_proj.weight"].T, 4, -1)
    g = np.log1p(np.exp(g + w["mixer.gate_bias"][:n]))
    temperature = _sigmoid(temperature + w["mixer.gate_bias"][n:])
    k = k / np.maximum(np.linalg.norm(k, axis=-1, keepdims=True), config.normalize_epsilon) * g**temperature
    low_rank = x @ w["mixer.ch_gate_0.weight"].T
    v = _sigmoid(low_rank @ w["mixer.ch_gate_1.weight"].T + w["mixer.value_bias"]) * x
    state, o = np.zeros((n, x.shape[1])), np.zeros_like(x)
    for t in range(len(x)):
        state = np.exp(-g[t] * temperature[t])[:, None] * state + np.outer(k[t], v[t])
        o[t] = q[t] / np.sqrt(n) @ state
    y = (o + w["mixer.residual_weight"] * c) * _silu(z)
    return _norm(y, w["mixer.act_norm.weight"], config) @ w["mixer.out_proj.weight"].T


def _attention(x: np.ndarray, w: dict[str, np.ndarray], config: RodimusConfig) -> np.ndarray:
    size = config.d_model // config.num_heads
    qkv = (x @ w["attn.qkv_proj.weight"].T).reshape(len(x), -1, size)
    q, k, v = np.split(qkv, [config.num_heads, config.num_heads + config.num_heads_k], axis=1)
    rotated = size if config.rotary_emb_dim == -1 else config.rotary_emb_dim
    q, k = _rope(q, rotated, config.rotary_emb_base), _rope(k, rotated, config.rotary_emb_base)
    reach = len(x) if config.window_size is None else config.window_size // 2
    out = np.zeros((len(x), config.num_heads, size))
    for i in range(len(x)):
        first = max(0, i - reach)
        for head in range(config.num_heads):
            scores = k[first : i + 1, head % config.num_heads_k] @ q[i, head] / np.sqrt(size)
            share = np.exp(scores - scores.max())
            out[i, head] = share / share.sum() @ v[first : i + 1, head % config.num_heads_v]
    return out.reshape(len(x), -1) @ w["attn.out_proj.weight"].T


def _rope(x: np.ndarray, dims: int, base: float) -> np.ndarray:
    """[L, heads, size]: the halves of the first `dims` features are the two coordinates that turn."""
    if not dims:
        return x
    angle = np.arange(len(x))[:, None, None] * base ** (-np.arange(0, dims, 2) / dims)
    a, b, rest = np.split(x, [dims // 2, dims], axis=-1)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle), rest], -1)


def _norm(x: np.ndarray, weight: np.ndarray, config: RodimusConfig) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_epsilon) * weight


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _silu(x: np.ndarray) -> np.ndarray:
    return x * _sigmoid(x)
