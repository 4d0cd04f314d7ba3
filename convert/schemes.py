"""Which matrices are quantized, and how: MLX's modes, recipes, and config.json's `quantization` table (mlx-lm's form).

What decides over the state stays in 16 bits by default: q, k and the gates come from one matrix, the value's gate from
a low-rank pair. Together with norms and convolutions these are 2% of the weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.errors import RodimusError, RodimusWarning

from .checkpoint import listed

# mode -> (bits, group sizes), the default first
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
FFN_MULTIPLE = 64  # what the FFN's width is padded to at least: MLX's matrix kernels take 32 columns at a time

_EMBEDDINGS = ("model.embeddings", "lm_head")
_LARGE = ("mixer.fc", "mixer.out_proj", "attn.qkv_proj", "attn.out_proj", "ffn.fc", "ffn.out_proj")
SENSITIVE = ("mixer.qkgt_proj", "mixer.ch_gate_0", "mixer.ch_gate_1")
_SPARED = ("mixer.out_proj", "attn.qkv_proj", "ffn.out_proj")  # what mixed recipes give more bits in some layers
_MIXED = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}  # mlx-lm's names
RECIPES = ("default", "all", *_MIXED)


class Scheme(NamedTuple):
    """How a matrix is quantized: along its rows, in groups that share a scale."""

    bits: int
    group_size: int
    mode: str = "affine"

    def columns(self, count: int) -> tuple[int, int]:
        """Columns of the packed matrix (32-bit words) and of its scales."""
        return count * self.bits // 32, count // self.group_size

    def __str__(self) -> str:
        return f"{self.bits} bit {self.mode}, groups of {self.group_size}"


def make_scheme(bits: int | None = None, group_size: int | None = None, mode: str | None = None) -> Scheme:
    """A scheme from what is given; the rest is the mode's default.

    Raises:
        RodimusError: MLX has no such combination.
    """
    mode = mode or "affine"
    if mode not in MODES:
        raise RodimusError(f"the mode must be one of {', '.join(MODES)}, not {mode!r}")
    all_bits, sizes = MODES[mode]
    bits = all_bits[0] if bits is None else bits
    group_size = sizes[0] if group_size is None else group_size
    for name, value, known in (("bits", bits, all_bits), ("group size", group_size, sizes)):
        if value not in known:
            raise RodimusError(f"{mode} has {name} {', '.join(map(str, sorted(known)))}, not {value}")
    return Scheme(bits, group_size, mode)


def scheme_of(recipe: str, bits: int | None, group_size: int | None, mode: str | None) -> Scheme:
    """The scheme that a recipe starts from.

    Raises:
        RodimusError: an unknown recipe, or one that does not go with the rest.
    """
    if recipe not in RECIPES:
        raise RodimusError(f"the recipe must be one of {', '.join(RECIPES)}, not {recipe!r}")
    if recipe in _MIXED:
        low = _MIXED[recipe][0]
        if mode not in (None, "affine") or bits not in (None, low):
            raise RodimusError(f"the recipe {recipe} chooses the bits itself, in mode affine")
        bits = low
    return make_scheme(bits, group_size, mode)


def choose(config: RodimusConfig, base: Scheme, recipe: str) -> dict[str, Scheme]:
    """The modules to quantize and how, for a config whose FFN is not padded yet.

    A matrix whose rows the group size does not divide gets a smaller one, or stays as it is.

    Raises:
        RodimusError: nothing can be quantized.
    """
    inner = {"mixer.out_proj", "mixer.qkgt_proj", "mixer.ch_gate_0"}
    widths = dict.fromkeys(inner, config.d_inner) | {"mixer.ch_gate_1": config.input_gate_low_rank}
    widths["ffn.out_proj"] = config.d_ffn + ffn_padding(config, base)
    chosen: dict[str, Scheme] = {}
    kept: list[str] = []

    def add(path: str, columns: int, scheme: Scheme) -> None:
        sizes = [size for size in (scheme.group_size, *_smaller(scheme)) if columns % size == 0]
        if sizes:
            chosen[path] = scheme._replace(group_size=sizes[0])
        else:
            kept.append(path)

    spared = base._replace(bits=_MIXED[recipe][1]) if recipe in _MIXED else base
    for path in _EMBEDDINGS[: 1 if config.tie_word_embeddings else 2]:
        add(path, config.d_model, spared)
    parts = (*_LARGE, *(SENSITIVE if recipe == "all" else ()))
    for i in range(config.n_layer):
        for part in parts:
            if config.has_attention or part.startswith("mixer."):
                scheme = spared if part in _SPARED and _wants_more(i, config.n_layer) else base
                add(f"model.layers.{i}.{part}", widths.get(part, config.d_model), scheme)
    if not chosen:
        raise RodimusError(f"nothing can be quantized: the widths are no multiples of {base.group_size}, nor of 32")
    large = [path for path in kept if not path.endswith(SENSITIVE)]
    if large:
        warnings.warn(
            f"{listed(large)} cannot be quantized (their rows are no multiple of a group): they stay as they are",
            RodimusWarning,
            stacklevel=2,
        )
    return chosen


def ffn_padding(config: RodimusConfig, scheme: Scheme) -> int:
    """Zeros that the FFN's width, as it is, lacks to a multiple that can be quantized."""
    return -config.d_ffn % max(FFN_MULTIPLE, scheme.group_size)


def to_table(base: Scheme, chosen: Mapping[str, Scheme]) -> dict[str, Any]:
    """config.json's `quantization`: the base, and an entry for every module that differs from it."""
    different = {path: scheme._asdict() for path, scheme in chosen.items() if scheme != base}
    return {**base._asdict(), **different}


def read_table(config: Mapping[str, Any], paths: Collection[str], where: str) -> dict[str, Scheme]:
    """The schemes of a checkpoint's quantized modules.

    Args:
        paths: the modules that have scales.

    Raises:
        RodimusError: config.json does not say how they are quantized, or says what MLX does not have.
    """
    table = config.get("quantization")
    if not paths and table is None:
        return {}
    if not isinstance(table, Mapping):
        raise RodimusError(f"{where}: its weights are quantized, but config.json has no table named quantization")
    if not paths:
        raise RodimusError(f"{where}: config.json says that the weights are quantized, but none is")
    base = _read_scheme(table, where, "scheme (bits, group_size, mode)")
    own = [path for path in paths if path in table]
    return dict.fromkeys(paths, base) | {
        path: _read_scheme(table[path], where, f"scheme of {path}") for path in own if table[path] is not True
    }


def _read_scheme(entry: Any, where: str, what: str) -> Scheme:
    fields = entry if isinstance(entry, Mapping) else {}
    bits, group_size, mode = fields.get("bits"), fields.get("group_size"), fields.get("mode", "affine")
    if type(bits) is int and type(group_size) is int and isinstance(mode, str) and mode in MODES:
        all_bits, sizes = MODES[mode]
        if bits in all_bits and group_size in sizes:
            return Scheme(bits, group_size, mode)
    raise RodimusError(f"{where}: config.json's quantization does not fit the weights: MLX has no {what} like it")


def _smaller(scheme: Scheme) -> list[int]:
    return sorted((size for size in MODES[scheme.mode][1] if size < scheme.group_size), reverse=True)


def _wants_more(layer: int, layers: int) -> bool:
    """The first and last eighth and every third layer between, as mlx-lm and llama.cpp choose them."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
