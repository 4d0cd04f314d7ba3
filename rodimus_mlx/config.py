"""One dataclass for every format's config.json: the official code's, flash-linear-attention's (fla), and ours.

Ours is the official format: a converted folder's config.json is what `RodimusConfig.to_dict` writes.
Whatever changes the maths and is not supported is refused by name; nothing is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import RodimusError

BLOCK_TYPES = ("rodimus", "rodimus_plus")
DEFAULT_CONV_WIDTH = 4
DEFAULT_ROPE_BASE = 10000.0
DEFAULT_FFN_RATIO = 4 / 3
KEY_NORM_FLOOR = 1e-12  # the floor of |k| where a config gives none
_MAX_SIZE = 2**31 - 1  # of any width, count or token id: MLX keeps sizes in 32 bits

# Keys of the official nested tables that choose an implementation or a training setting, never the function computed.
_MIXER_IGNORED = {"mode", "layer_idx", "use_fast_path", "dropout", "activation_dropout"}
_ATTN_IGNORED = {"layer_idx", "dropout", "activation_dropout", "attention_dropout", "max_position_embeddings"}
# Keys that change the maths, with the only value supported; the official code has more.
_MIXER_ONLY = {"causal": True, "norm_epsilon": None, "post_norm_epsilon": None}
_ATTN_ONLY = {"causal": True, "softmax_scale": None, "rotary_emb_scale_base": None, "rotary_emb_interleaved": False}


def align8(x: float) -> int:
    """Round up to a multiple of 8 after cutting the fraction, as the official code sizes its widths."""
    return (int(x) + 7) // 8 * 8


@dataclass(frozen=True)
class RodimusConfig:
    """Sizes and switches of a Rodimus or Rodimus+ model.

    Symbols of the paper: d = ``d_model``, D = ``d_inner``, n = ``mem_size``, r = ``input_gate_low_rank``,
    H = ``num_heads``, f = ``d_ffn``.
    """

    block_type: str  # "rodimus": mixer only; "rodimus_plus": mixer, sliding-window attention, FFN
    d_model: int
    n_layer: int
    vocab_size: int
    d_inner: int  # D, width of the values
    mem_size: int  # n, key size: the state is n x D
    d_conv: int  # taps of the causal depthwise convolution
    input_gate_low_rank: int  # r
    normalize_epsilon: float  # floor of |k| in k / max(|k|, eps)
    norm_epsilon: float  # eps of every RMSNorm
    num_heads: int = 0  # H, query heads; the four below are 0 or None without attention
    num_heads_k: int = 0
    num_heads_v: int = 0
    d_ffn: int = 0
    window_size: int | None = None  # official W: a token sees W // 2 + 1 keys; None: full causal attention
    rotary_emb_dim: int = -1  # rotated features of a head: -1 all, 0 none
    rotary_emb_base: float = DEFAULT_ROPE_BASE
    tie_word_embeddings: bool = False
    use_scale_embedding: bool = False  # embedding times sqrt(n)
    use_norm_embedding: bool = False  # RMSNorm after the embedding
    residual_in_fp32: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    max_position_embeddings: int | None = None  # length seen in training; nothing is limited by it
    ffn_padding: int = 0  # of the d_ffn features, the last so many are zeros: a quantized width must be round

    @property
    def has_attention(self) -> bool:
        """Whether blocks have attention and FFN (Rodimus+)."""
        return self.block_type == "rodimus_plus"

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.d_model // self.num_heads

    @property
    def window_keys(self) -> int | None:
        """Keys that a token sees, itself included: W // 2 + 1; None for full attention."""
        return None if self.window_size is None else self.window_size // 2 + 1

    @property
    def rope_dims(self) -> int:
        """Rotated features of each head, 0 for none."""
        return self.head_dim if self.rotary_emb_dim == -1 else self.rotary_emb_dim

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> RodimusConfig:
        """Read an official, fla or converted config.json.

        Raises:
            RodimusError: naming the key that is missing, wrong, or not supported.
        """
        model_type = config.get("model_type", "rodimus")
        if model_type != "rodimus":
            raise RodimusError(
                f"config.json: model_type is {_shown(model_type)}, but only 'rodimus' models can be read"
            )
        parsed = _from_fla(config) if "hidden_size" in config else _from_official(config)
        _validate(parsed)
        return parsed

    def to_dict(self) -> dict[str, Any]:
        """The same config in the official format, with every choice spelled out."""
        mixer_cfg = {
            "expand_ratio": self.d_inner / self.d_model,
            "input_gate_low_rank": self.input_gate_low_rank,
            "mem_size": self.mem_size,
            "d_conv": self.d_conv,
            "normalize_epsilon": self.normalize_epsilon,
        }
        attn_cfg = {
            "ffn_expand_ratio": self.d_ffn / self.d_model,
            "num_heads": self.num_heads,
            "num_heads_k": self.num_heads_k,
            "num_heads_v": self.num_heads_v,
            "rotary_emb_base": self.rotary_emb_base,
            "rotary_emb_dim": self.rotary_emb_dim,
            "rotary_emb_scale_base": None,
            "window_size": self.window_size,
        }
        result: dict[str, Any] = {
            "model_type": "rodimus",
            "architectures": ["RodimusForCausalLM"],
            "block_type": self.block_type,
            "d_model": self.d_model,
            "n_layer": self.n_layer,
            "vocab_size": self.vocab_size,
            "norm_epsilon": self.norm_epsilon,
            "residual_in_fp32": self.residual_in_fp32,
            "use_scale_embedding": self.use_scale_embedding,
            "use_norm_embedding": self.use_norm_embedding,
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": self.max_position_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id,
            "mixer_cfg": mixer_cfg,
            "attn_cfg": attn_cfg if self.has_attention else {},
            "ffn_padding": self.ffn_padding or None,
        }
        return {key: value for key, value in result.items() if value is not None}


def _from_official(config: Mapping[str, Any]) -> RodimusConfig:
    mixer = _table(config, "mixer_cfg")
    attn = _table(config, "attn_cfg")
    d_model = _size(config, "d_model")
    block_type = _block_type(config)
    plus = block_type == "rodimus_plus"
    _check_options("mixer_cfg", mixer, _MIXER_KEYS | _MIXER_IGNORED, _MIXER_ONLY)
    if plus:
        _check_options("attn_cfg", attn, _ATTN_KEYS | _ATTN_IGNORED, _ATTN_ONLY)
    else:
        attn = {}
    heads = _size(attn, "attn_cfg.num_heads", max(d_model // 128, 1)) if plus else 0
    window = _whole(attn, "attn_cfg.window_size", 0)
    ffn_ratio = _number(attn, "attn_cfg.ffn_expand_ratio", DEFAULT_FFN_RATIO)
    return RodimusConfig(
        block_type=block_type,
        d_model=d_model,
        n_layer=_size(config, "n_layer"),
        vocab_size=_size(config, "vocab_size"),
        d_inner=_width(d_model * _number(mixer, "mixer_cfg.expand_ratio", 2.0), "mixer_cfg.expand_ratio"),
        mem_size=_size(mixer, "mixer_cfg.mem_size", 64),
        d_conv=_size(mixer, "mixer_cfg.d_conv", DEFAULT_CONV_WIDTH),
        input_gate_low_rank=_low_rank(mixer, "mixer_cfg.input_gate_low_rank", d_model),
        normalize_epsilon=_number(mixer, "mixer_cfg.normalize_epsilon", KEY_NORM_FLOOR, zero=KEY_NORM_FLOOR),
        norm_epsilon=_number(config, "norm_epsilon"),
        num_heads=heads,
        num_heads_k=_size(attn, "attn_cfg.num_heads_k", 1) if plus else 0,
        num_heads_v=_size(attn, "attn_cfg.num_heads_v", heads) if plus else 0,
        d_ffn=_width(d_model * ffn_ratio, "attn_cfg.ffn_expand_ratio") if plus else 0,
        window_size=window if window > 0 else None,
        rotary_emb_dim=max(_whole(attn, "attn_cfg.rotary_emb_dim", -1), -1),
        rotary_emb_base=_number(attn, "attn_cfg.rotary_emb_base", DEFAULT_ROPE_BASE, zero=DEFAULT_ROPE_BASE),
        residual_in_fp32=_flag(config, "residual_in_fp32", True),
        **_common(config),
    )


def _from_fla(config: Mapping[str, Any]) -> RodimusConfig:
    config = {**_FLA_DEFAULTS, **config}
    d_model = _size(config, "hidden_size")
    block_type = _block_type(config)
    plus = block_type == "rodimus_plus"
    _refuse("attn", config.get("attn"), (None,))
    _refuse("use_short_conv", config.get("use_short_conv", True), (True,))
    _refuse("hidden_act", config.get("hidden_act", "swish"), ("swish", "silu"))
    ska = _table(config, "ska_attn") if plus else {}
    _check_options("ska_attn", ska, {"num_heads", "window_size", "rope_theta"}, {"qkv_bias": False, "qk_norm": False})
    heads = _size(ska, "ska_attn.num_heads", max(d_model // 128, 1)) if plus else 0
    keys = _whole({"window_size": FLA_WINDOW, **ska}, "ska_attn.window_size", 0) if plus else 0
    width = _width(d_model * _number(config, "hidden_ratio", DEFAULT_FFN_RATIO), "hidden_ratio")
    return RodimusConfig(
        block_type=block_type,
        d_model=d_model,
        n_layer=_size(config, "num_hidden_layers"),
        vocab_size=_size(config, "vocab_size"),
        d_inner=2 * d_model,
        mem_size=_size(config, "expand_ratio"),
        d_conv=_size(config, "conv_size", DEFAULT_CONV_WIDTH),
        input_gate_low_rank=_low_rank(config, "input_gate_low_rank", d_model),
        normalize_epsilon=_number(config, "k_norm_eps", KEY_NORM_FLOOR, zero=KEY_NORM_FLOOR),
        norm_epsilon=_number(config, "norm_eps"),
        num_heads=heads,
        num_heads_k=1 if plus else 0,
        num_heads_v=heads,
        d_ffn=_size(config, "intermediate_size", width) if plus else 0,
        window_size=max(2 * (keys - 1), 1) if keys > 0 else None,  # fla counts keys: W // 2 + 1
        rotary_emb_base=_number(ska, "ska_attn.rope_theta", DEFAULT_ROPE_BASE, zero=DEFAULT_ROPE_BASE),
        residual_in_fp32=_flag(config, "residual_in_fp32", True) and _flag(config, "block_residual_in_fp32", True),
        **_common(config),
    )


# What fla's own config class assumes where a file is silent; transformers leaves out what it thinks is usual.
_FLA_DEFAULTS = {"block_type": "rodimus_plus", "tie_word_embeddings": True}
FLA_WINDOW = 1024
_MIXER_KEYS = {"expand_ratio", "mem_size", "d_conv", "input_gate_low_rank", "normalize_epsilon"}
_HEAD_KEYS = {"num_heads", "num_heads_k", "num_heads_v"}
_ATTN_KEYS = {"ffn_expand_ratio", "rotary_emb_base", "rotary_emb_dim", "window_size"} | _HEAD_KEYS


def _common(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tie_word_embeddings": _flag(config, "tie_word_embeddings", False),
        "use_scale_embedding": _flag(config, "use_scale_embedding", False),
        "use_norm_embedding": _flag(config, "use_norm_embedding", False),
        "bos_token_id": _optional(config, "bos_token_id"),
        "eos_token_id": _end_tokens(config),
        "max_position_embeddings": _optional(config, "max_position_embeddings"),
        "ffn_padding": _whole(config, "ffn_padding", 0),
    }


def _validate(c: RodimusConfig) -> None:
    for name in ("d_inner", "d_ffn"):
        if getattr(c, name) % 8:  # only fla's can be: the official format has ratios, rounded to 8
            raise RodimusError(f"config.json: its {name} is {getattr(c, name)}, but widths must be multiples of 8")
    if not c.has_attention:
        return
    if c.d_model % c.num_heads:
        raise RodimusError(f"config.json: num_heads {c.num_heads} does not divide the model width {c.d_model}")
    for name in ("num_heads_k", "num_heads_v"):
        if c.num_heads % getattr(c, name):
            raise RodimusError(f"config.json: {name} {getattr(c, name)} does not divide num_heads {c.num_heads}")
    dims = c.rotary_emb_dim
    if dims != -1 and (dims > c.head_dim or dims % 2):
        raise RodimusError(
            f"config.json: rotary_emb_dim must be -1, 0, or an even number up to the head size {c.head_dim}, not {dims}"
        )
    if not 0 <= c.ffn_padding < c.d_ffn:
        raise RodimusError(f"config.json: ffn_padding must be from 0 to below the FFN's width, not {c.ffn_padding}")


def _table(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RodimusError(f"config.json: {key} must be a table of options, not {_shown(value)}")
    return value


def _block_type(config: Mapping[str, Any]) -> str:
    value = config.get("block_type", "rodimus")
    if value not in BLOCK_TYPES:
        raise RodimusError(f"config.json: unknown block_type {_shown(value)}; known are {' and '.join(BLOCK_TYPES)}")
    return value


def _given(table: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of a path's last name; null counts as absent, and without a default it must be there."""
    value = table.get(path.rsplit(".", 1)[-1])
    value = default if value is None else value
    if value is None:
        raise RodimusError(f"config.json: {path} is missing; is this the config of a Rodimus model?")
    return value


def _whole(table: Mapping[str, Any], path: str, default: int | None = None, least: int | None = None) -> int:
    value = _given(table, path, default)
    if type(value) is not int or abs(value) > _MAX_SIZE or (least is not None and value < least):
        kind = "whole" if least is None else "positive whole"
        raise RodimusError(f"config.json: {path} must be a {kind} number, not {_shown(value)}")
    return value


def _size(table: Mapping[str, Any], path: str, default: int | None = None) -> int:
    return _whole(table, path, default, least=1)


def _number(table: Mapping[str, Any], path: str, default: float | None = None, zero: float | None = None) -> float:
    """A positive number; ``zero``: what 0 stands for where it is allowed."""
    value = _given(table, path, default)
    if zero is not None and type(value) in (int, float) and value == 0:
        return zero
    if type(value) not in (int, float) or not 0 < value < 1e300:
        raise RodimusError(f"config.json: {path} must be a positive number, not {_shown(value)}")
    return float(value)


def _flag(table: Mapping[str, Any], path: str, default: bool) -> bool:
    value = _given(table, path, default)
    if type(value) is not bool:
        raise RodimusError(f"config.json: {path} must be true or false, not {_shown(value)}")
    return value


def _optional(table: Mapping[str, Any], key: str) -> int | None:
    return None if table.get(key) is None else _whole(table, key)


def _end_tokens(table: Mapping[str, Any]) -> int | tuple[int, ...] | None:
    value = table.get("eos_token_id")
    if isinstance(value, list):
        return tuple(_whole({"eos_token_id": each}, "eos_token_id") for each in value)
    return _optional(table, "eos_token_id")


def _low_rank(table: Mapping[str, Any], path: str, d_model: int) -> int:
    if _given(table, path, "auto") == "auto":
        return max(d_model // 64, 16)
    return _size(table, path)


def _width(width: float, path: str) -> int:
    if not width < _MAX_SIZE:
        raise RodimusError(f"config.json: {path} makes a layer {width:.3g} wide, which no array can be")
    return align8(width)


def _shown(value: Any) -> str:
    text = "a number of thousands of digits" if isinstance(value, int) and abs(value) > 1e300 else repr(value)
    return text if len(text) < 100 else f"{text[:100]}..."


def _refuse(path: str, value: Any, supported: tuple[Any, ...]) -> None:
    if value not in supported:
        raise RodimusError(f"config.json: {path} = {_shown(value)} is not supported (supported: {supported[0]!r})")


def _check_options(table: str, given: Mapping[str, Any], known: set[str], only: Mapping[str, Any]) -> None:
    for key, supported in only.items():
        if key in given:
            _refuse(f"{table}.{key}", given[key], (supported, None))
    unknown = sorted(set(given) - known - set(only))
    if unknown:
        raise RodimusError(f"config.json: {table} has options that are not supported: {', '.join(unknown)}")
