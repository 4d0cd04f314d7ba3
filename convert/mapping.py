"""Names and shapes of the weights: the official format's, fla's, and ours.

Each row of the tables is one of our parameters and the tensors that hold it elsewhere: several are joined along their
rows, in the order given. Everything else (what is missing, unknown, how to split back) follows from the tables.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.errors import RodimusError, RodimusWarning

from .checkpoint import listed

FORMATS = ("official", "fla", "ours")
HEAD, EMBEDDING = "lm_head.weight", "model.embeddings.weight"

_INNER = "mixer.inner_mixer"

# ours: (official, fla)
_TOP = {
    "model.embeddings.weight": (["model.embeddings.weight"], ["model.embeddings.weight"]),
    "model.embed_norm.weight": (["model.embed_norm.weight"], ["model.embed_norm.weight"]),
    "model.norm_f.weight": (["model.norm_f.weight"], ["model.norm.weight"]),
    "lm_head.weight": (["lm_head.weight"], ["lm_head.weight"]),
}
_MIXER = {
    "mixer_norm.weight": (["mixer_norm.weight"], ["mixer_norm.weight"]),
    "mixer.fc.weight": (["mixer.fc.weight"], ["mixer.up_proj.weight", "mixer.gate_proj.weight"]),
    "mixer.conv.weight": ([f"{_INNER}.short_conv.conv1d.weight"], ["mixer.short_conv.weight"]),
    "mixer.conv.bias": ([f"{_INNER}.short_conv.conv1d.bias"], ["mixer.short_conv.bias"]),
    "mixer.qkgt_proj.weight": (
        [f"{_INNER}.in_proj.weight", f"{_INNER}.mem_gate_proj.weight"],
        ["mixer.q_proj.weight", "mixer.k_proj.weight", "mixer.g_gate_proj.weight", "mixer.tau_gate_proj.weight"],
    ),
    "mixer.gate_bias": (
        [f"{_INNER}.mem_gate_proj.bias"],
        ["mixer.g_gate_proj.bias", "mixer.tau_gate_proj.bias"],
    ),
    "mixer.ch_gate_0.weight": ([f"{_INNER}.ch_gate_proj.0.weight"], ["mixer.i_gate_proj.0.weight"]),
    "mixer.ch_gate_1.weight": ([f"{_INNER}.ch_gate_proj.1.weight"], ["mixer.i_gate_proj.1.weight"]),
    "mixer.value_bias": ([f"{_INNER}.ch_gate_proj.1.bias"], ["mixer.i_gate_proj.1.bias"]),
    "mixer.residual_weight": ([f"{_INNER}.residual_weight"], ["mixer.residual_weight"]),
    "mixer.act_norm.weight": (["mixer.act_norm.weight"], ["mixer.activation_norm.weight"]),
    "mixer.out_proj.weight": (["mixer.out_proj.weight"], ["mixer.down_proj.weight"]),
}
_ATTENTION_AND_FFN = {
    "attn_norm.weight": (["attn_norm.weight"], ["ska_attn_norm.weight"]),
    "attn.qkv_proj.weight": (
        ["attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"],
        ["ska_attn.q_proj.weight", "ska_attn.k_proj.weight", "ska_attn.v_proj.weight"],
    ),
    "attn.out_proj.weight": (["attn.out_proj.weight"], ["ska_attn.o_proj.weight"]),
    "ffn_norm.weight": (["ffn_norm.weight"], ["mlp_norm.weight"]),
    "ffn.fc.weight": (["ffn.fc.weight"], ["mlp.up_proj.weight", "mlp.gate_proj.weight"]),
    "ffn.out_proj.weight": (["ffn.out_proj.weight"], ["mlp.down_proj.weight"]),
}
# Buffers of the official cache that get into files saved after generating: dropped on purpose.
_DROPPED = re.compile(r"\.(conv_state|ssm_state|key_cache|value_cache)_\d+$")
# What mlx-lm's quantized layers keep beside a packed `weight`.
_QUANTIZATION = ("scales", "biases")


@dataclass(frozen=True)
class Part:
    """Rows start:stop of our parameter ``ours``: another format's tensor of ``shape``."""

    ours: str
    start: int
    stop: int
    shape: tuple[int, ...]


def expected_shapes(config: RodimusConfig) -> dict[str, tuple[int, ...]]:
    """Our parameters' names and shapes for a config, in the order in which the model uses them."""
    return {name: (sum(rows), *rest) for name, (rows, rest) in _rows(config).items()}


def count_parameters(config: RodimusConfig) -> int:
    """How many numbers the model learns; a tied embedding counts once, an FFN's padding does not."""
    zeros = 3 * config.n_layer * config.d_model * config.ffn_padding
    return sum(math.prod(shape) for shape in expected_shapes(config).values()) - zeros


def parts(config: RodimusConfig, format: str) -> dict[str, Part]:
    """The tensors that a checkpoint in ``format`` must have, and where each goes in ours."""
    result = {}
    for ours, (rows, rest) in _rows(config).items():
        names = _names(ours, format)
        per_part = len(rows) // len(names)  # q, k, g, t are four tensors in fla, two in the official format
        start = 0
        for i, name in enumerate(names):
            stop = start + sum(rows[i * per_part : (i + 1) * per_part])
            is_conv = format != "ours" and ours.endswith("mixer.conv.weight")
            shape = (stop - start, 1, *rest) if is_conv else (stop - start, *rest)
            result[name] = Part(ours, start, stop, shape)
            start = stop
    return result


def detect_format(names: Iterable[str], config: RodimusConfig, where: str) -> str:
    """The format most of whose names are there.

    Raises:
        RodimusError: none is recognised, or the config has more layers than there are tensors.
    """
    names = set(names)
    if config.n_layer > len(names):  # before names are made up for a forged billion of layers
        raise RodimusError(f"{where}: config.json says {config.n_layer} layers, but there are {len(names)} tensors")
    shared = {EMBEDDING, HEAD}  # the same in every format
    found = {format: len((parts(config, format).keys() - shared) & names) for format in FORMATS}
    best = max(FORMATS, key=lambda format: found[format])
    if not found[best]:
        raise RodimusError(f"{where}: no Rodimus weights among its tensors ({listed(sorted(names))})")
    return best


def wanted_names(names: Iterable[str]) -> list[str]:
    """The names without the buffers that are dropped on purpose."""
    return [name for name in names if not _DROPPED.search(name)]


def settle_head(
    names: Iterable[str], config: RodimusConfig, head_is_embedding: Callable[[], bool], where: str
) -> RodimusConfig:
    """The config that the weights bear out: a tied model whose lm_head differs from its embedding becomes untied."""
    if not config.tie_word_embeddings or HEAD not in names or head_is_embedding():
        return config
    warnings.warn(
        f"{where}: config.json ties the embeddings, but {HEAD} differs from {EMBEDDING}: both are kept (untied)",
        RodimusWarning,
        stacklevel=3,
    )
    return replace(config, tie_word_embeddings=False)


def check(
    shapes: Mapping[str, tuple[int, ...]], config: RodimusConfig, format: str, where: str
) -> dict[str, list[str]]:
    """Our parameter names, in the model's order, each with the tensors to join for it.

    Args:
        shapes: the tensors found, dropped ones left out; the redundant head of a tied model may be among them.
        config: settled by `settle_head`.

    Raises:
        RodimusError: with the list of missing and unknown names, or the first tensor whose shape is not the config's.
    """
    expected = parts(config, format)
    sources: dict[str, list[str]] = {}
    for name, part in expected.items():
        sources.setdefault(part.ours, []).append(name)
    packed = {name for name in shapes if format == "ours" and f"{name.removesuffix('.weight')}.scales" in shapes}
    extras = [
        f"{name.removesuffix('.weight')}.{suffix}"
        for name in expected
        if name in packed
        for suffix in _QUANTIZATION
        if f"{name.removesuffix('.weight')}.{suffix}" in shapes
    ]
    redundant = {HEAD} if config.tie_word_embeddings else set()
    missing = [name for name in expected if name not in shapes]
    unknown = sorted(shapes.keys() - expected.keys() - set(extras) - redundant)
    if missing or unknown:
        lines = [f"missing {listed(missing)}"] if missing else []
        lines += [f"unknown {listed(unknown)}"] if unknown else []
        raise RodimusError(
            f"{where}: the weights are not those of its config.json ({format} names): {'; '.join(lines)}"
        )
    for name, part in expected.items():
        found = tuple(shapes[name])
        if found != part.shape and not (name in packed and found[:1] == part.shape[:1]):
            raise RodimusError(
                f"{where}: {name} has shape {list(found)}, but by config.json it is {list(part.shape)}: "
                "the config and the weights disagree"
            )
    return {**sources, **{name: [name] for name in extras}}


def map_weights(weights: Mapping[str, mx.array], config: RodimusConfig, where: str = "weights") -> dict[str, mx.array]:
    """Weights in memory, in any format, under our names.

    A tied model's ``lm_head.weight`` is dropped where it equals the embedding; where it does not, it is in the result
    and the model must be untied (a warning says so).

    Raises:
        RodimusError: as `check` does.
    """
    names = wanted_names(weights)
    config = settle_head(names, config, lambda: _same_bits(weights[HEAD], weights.get(EMBEDDING)), where)
    format = detect_format(names, config, where)
    sources = check({name: weights[name].shape for name in names}, config, format, where)
    shapes = expected_shapes(config)

    def join(ours: str, found: list[str]) -> mx.array:
        rows = [weights[name].reshape(-1, *shapes[ours][1:]) if format != "ours" else weights[name] for name in found]
        return rows[0] if len(rows) == 1 else mx.concatenate(rows)

    return {ours: join(ours, found) for ours, found in sources.items()}


def unmap_weights(weights: Mapping[str, mx.array], config: RodimusConfig, format: str) -> dict[str, mx.array]:
    """Our weights under another format's names ("official" or "fla"): the exact inverse of `map_weights`.

    Raises:
        RodimusError: the weights are quantized, or not those of the config.
    """
    if packed := [name for name in weights if name.endswith(".scales")]:
        raise RodimusError(f"quantized weights have no {format} format ({listed(packed)}); dequantize them first")
    check({name: array.shape for name, array in weights.items()}, config, "ours", "weights")
    return {
        name: weights[part.ours][part.start : part.stop].reshape(part.shape)
        for name, part in parts(config, format).items()
    }


def _rows(c: RodimusConfig) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Our name -> (rows of each of the blocks that it joins, the remaining axes)."""
    d, D, n, r = c.d_model, c.d_inner, c.mem_size, c.input_gate_low_rank
    top: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {"model.embeddings.weight": ((c.vocab_size,), (d,))}
    if c.use_norm_embedding:
        top["model.embed_norm.weight"] = ((d,), ())
    layer: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "mixer_norm.weight": ((d,), ()),
        "mixer.fc.weight": ((D, D), (d,)),
        "mixer.conv.weight": ((D,), (c.d_conv,)),
        "mixer.conv.bias": ((D,), ()),
        "mixer.qkgt_proj.weight": ((n, n, n, n), (D,)),
        "mixer.gate_bias": ((n, n), ()),
        "mixer.ch_gate_0.weight": ((r,), (D,)),
        "mixer.ch_gate_1.weight": ((D,), (r,)),
        "mixer.value_bias": ((D,), ()),
        "mixer.residual_weight": ((D,), ()),
        "mixer.act_norm.weight": ((D,), ()),
        "mixer.out_proj.weight": ((d,), (D,)),
    }
    if c.has_attention:
        heads = (c.num_heads, c.num_heads_k, c.num_heads_v)
        layer |= {
            "attn_norm.weight": ((d,), ()),
            "attn.qkv_proj.weight": (tuple(count * c.head_dim for count in heads), (d,)),
            "attn.out_proj.weight": ((d,), (d,)),  # fewer value heads are repeated up to d before it
            "ffn_norm.weight": ((d,), ()),
            "ffn.fc.weight": ((c.d_ffn, c.d_ffn), (d,)),
            "ffn.out_proj.weight": ((d,), (c.d_ffn,)),
        }
    layers = {f"model.layers.{i}.{name}": rows for i in range(c.n_layer) for name, rows in layer.items()}
    head = {} if c.tie_word_embeddings else {HEAD: ((c.vocab_size,), (d,))}
    return {**top, **layers, "model.norm_f.weight": ((d,), ()), **head}


def _names(ours: str, format: str) -> list[str]:
    if format == "ours":
        return [ours]
    column = FORMATS.index(format)
    if ours in _TOP:
        return _TOP[ours][column]
    _, _, layer, name = ours.split(".", 3)
    return [f"model.layers.{layer}.{other}" for other in {**_MIXER, **_ATTENTION_AND_FFN}[name][column]]


def _same_bits(a: Any, b: Any) -> bool:
    if b is None or a.ndim != 2 or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(mx.array_equal(a.view(mx.uint8), b.view(mx.uint8)))
