"""Models to measure: the released shapes and their peers with random weights, which are as fast as real ones."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import MODEL_REMAPPING

from ..config import RodimusConfig
from ..convert.schemes import choose, ffn_padding, make_scheme
from ..errors import RodimusError
from ..hub import find_folder
from ..loading import load_model
from ..model import Model

SPREAD = 0.02  # of random weights: activations stay finite through any of these models
ROWS_DRAWN = 64  # of each matrix; its other rows repeat them, because drawing billions of numbers takes minutes


def _plus(d_model: int, n_layer: int, heads: int, tied: bool) -> dict[str, Any]:
    attention = {"num_heads": heads, "num_heads_k": 1, "num_heads_v": heads, "window_size": 4096}
    return {
        **_released(d_model, n_layer, tied),
        "block_type": "rodimus_plus",
        "attn_cfg": {**attention, "ffn_expand_ratio": 4 / 3},
    }


def _released(d_model: int, n_layer: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "rodimus",
        "block_type": "rodimus",
        "d_model": d_model,
        "n_layer": n_layer,
        "vocab_size": 126464,
        "norm_epsilon": 1e-5,
        "tie_word_embeddings": tied,
        "mixer_cfg": {"expand_ratio": 2.0, "mem_size": 64, "normalize_epsilon": 1e-5},
    }


# The released checkpoints, as config.json has them.
SHAPES: dict[str, dict[str, Any]] = {
    "1.6b": _plus(2048, 24, heads=16, tied=True),
    "4b": _plus(3072, 32, heads=24, tied=False),
    "1.4b": _released(2048, 48, tied=True),
}
# What else a user may pick at that size: a transformer, and a recurrent model with a kernel of its own in mlx-lm.
PEERS: dict[str, dict[str, Any]] = {
    "qwen2.5-1.5b": {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
    },
    "mamba2-1.3b": {
        "model_type": "mamba2",
        "num_heads": 64,
        "head_dim": 64,
        "vocab_size": 50288,
        "hidden_size": 2048,
        "intermediate_size": 4096,
        "state_size": 128,
        "ssm_state_size": 128,
        "num_hidden_layers": 48,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": True,
        "time_step_limit": (0.0, float("inf")),
        "time_step_rank": 128,
        "max_position_embeddings": 4096,
    },
}


@dataclass
class Subject:
    """A model under measurement, and what to call it."""

    name: str
    model: Any

    @property
    def weight_bytes(self) -> int:
        """Bytes of all its weights."""
        return parameter_bytes(self.model)


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    parameters: Any = tree_flatten(module.parameters())
    return sum(x.nbytes for _, x in parameters)


def load_subject(path_or_hub_id: str | Path) -> Subject:
    """A Rodimus checkpoint with its own weights.

    Raises:
        RodimusError: as `load_model`.
    """
    model, _ = load_model(path_or_hub_id)
    mx.eval(model.parameters())
    return Subject(Path(path_or_hub_id).name, model)


def random_subject(name: str, bits: int | None = None) -> Subject:
    """A model with random weights in bfloat16, or quantized.

    Args:
        name: of SHAPES or PEERS; or a folder or Hugging Face id, of which only config.json is read.
        bits: of the quantized matrices, as `convert` and mlx-lm choose them; None: config.json's, else bfloat16.

    Raises:
        RodimusError: there is no such folder or model, mlx-lm lacks the architecture, or MLX lacks such bits.
    """
    config = SHAPES.get(name) or PEERS.get(name) or _read_config(name)
    if bits is None and isinstance(config.get("quantization"), dict):
        bits = config["quantization"].get("bits")
    model = random_model(config, bits, name)
    suffix = "" if bits is None else f", {bits} bit"
    return Subject(name + suffix, model)


def random_model(config: Mapping[str, Any], bits: int | None = None, name: str = "the model") -> Any:
    """The model of a config.json with random weights; the arguments and errors are those of `random_subject`."""
    mx.random.seed(0)
    if config.get("model_type") == "rodimus":
        model = _rodimus(RodimusConfig.from_dict(config), bits)
    else:
        model = _of_mlx_lm(config, bits, name)
    model.eval()
    mx.eval(model.parameters())
    return model


def _rodimus(config: RodimusConfig, bits: int | None) -> Model:
    if bits is None:
        return _randomized(Model(config))
    scheme = make_scheme(bits)
    chosen = choose(config, scheme, "default")
    zeros = ffn_padding(config, scheme)
    model = _randomized(Model(replace(config, d_ffn=config.d_ffn + zeros, ffn_padding=zeros)))
    nn.quantize(model, class_predicate=lambda path, _: path in chosen and chosen[path]._asdict())
    return model


def _of_mlx_lm(config: Mapping[str, Any], bits: int | None, name: str) -> Any:
    kind = str(config.get("model_type"))
    try:
        architecture = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(kind, kind)}")
        model = architecture.Model(architecture.ModelArgs.from_dict(dict(config)))
    except ImportError as error:
        raise RodimusError(f"{name}: mlx-lm does not know the architecture {kind!r} of its config.json") from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise RodimusError(f"{name}: mlx-lm's {kind} cannot be made from its config.json: {error}") from error
    _randomized(model)
    if bits is not None:
        scheme = make_scheme(bits)
        nn.quantize(
            model,
            scheme.group_size,
            scheme.bits,
            class_predicate=lambda _, module: (
                hasattr(module, "to_quantized") and module.weight.shape[-1] % scheme.group_size == 0
            ),
        )
    return model


def _randomized(model: Any) -> Any:
    """Random matrices and stock vectors in bfloat16; lazy, so that the float32 originals are never made."""

    def draw(old: mx.array) -> mx.array:
        if old.ndim < 2:
            return old.astype(mx.bfloat16)
        rows, *rest = old.shape
        drawn = mx.random.normal((min(rows, ROWS_DRAWN), *rest)) * SPREAD
        return mx.take(drawn.astype(mx.bfloat16), mx.arange(rows) % drawn.shape[0], axis=0)

    model.update(tree_map(draw, model.parameters()))
    return model


def _read_config(name: str) -> dict[str, Any]:
    if "/" not in name and not Path(name).is_dir():
        raise RodimusError(
            f"there is no model {name}: choose one of {', '.join((*SHAPES, *PEERS))}, a folder, or a Hugging Face id"
        )
    path = find_folder(name, weights=False) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RodimusError(f"{path.parent} is not a model's folder: it has no config.json") from error
    except ValueError as error:
        raise RodimusError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise RodimusError(f"{path} must hold a JSON object")
    return config
