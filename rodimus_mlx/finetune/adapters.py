"""Adapter folders, in mlx-lm's format: adapter_config.json and adapters.safetensors.

mlx-lm itself reads those of `lora`, `dora` and `full`; `state` is ours.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import load_adapters

from ..errors import RodimusError
from .initial_state import BIAS, STATE, add_initial_states
from .methods import lora_parameters
from .parameters import named, nested, read
from .settings import METHODS, Settings

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"


def apply(model: Any, folder: str | Path, keep_dtype: bool = False) -> str:
    """Put an adapter on the model it was trained for.

    Args:
        keep_dtype: leave low-rank matrices in their float32; else they get the model's type, which is faster.

    Returns:
        the method it was trained by: "lora", "dora", "full" or "state".

    Raises:
        RodimusError: the folder is not an adapter, it is damaged, or it is one for another model.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    method = config.get("fine_tune_type", "lora")
    if method not in METHODS:
        raise RodimusError(f"{folder / CONFIG}: fine_tune_type {method!r} is not one of {', '.join(METHODS)}")
    if not (folder / WEIGHTS).is_file():
        raise RodimusError(f"{folder} has no {WEIGHTS}: was the training stopped before its first save?")
    try:
        if method == "state":
            _load_states(model, folder, config)
        elif method == "full":
            _require(_names_in_full(model, config), read(folder / WEIGHTS))
            load_adapters(model, str(folder))
        else:
            _check_scale(config)
            another = _low_rank(model)  # mlx-lm wraps its layers, in new ones that no file has
            load_adapters(model, str(folder))
            _require(set() if another else _low_rank(model), read(folder / WEIGHTS))
    except RodimusError:
        raise
    except Exception as error:  # whatever mlx-lm meets in a config or a file that does not fit
        raise RodimusError(f"{folder}: the adapter does not fit this model: {_one_line(error)}") from error
    if method in ("lora", "dora") and not keep_dtype:
        _match_dtype(model)
    model.eval()
    return method


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json as it stands.

    Raises:
        RodimusError: there is none, or it is no JSON object.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise RodimusError(f"{folder} is not an adapter: it has no {CONFIG}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RodimusError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise RodimusError(f"{file} must hold a JSON object")
    return config


def adapter_config(settings: Settings, places: Mapping[str, Any]) -> dict[str, Any]:
    """What adapter_config.json says: mlx-lm's entries and all our settings."""
    lora = lora_parameters(settings) if settings.method in ("lora", "dora") else None
    return {
        **places,
        "fine_tune_type": settings.method,
        "num_layers": settings.num_layers,
        "lora_parameters": lora,
        "settings": settings.to_dict(),
    }


def write_adapter(folder: Path, config: Mapping[str, Any], parameters: Mapping[str, mx.array]) -> None:
    """Write an adapter; each file is the old one or the new one at any time, whatever happens."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    with _replacing(folder / CONFIG) as partial:
        partial.write_text(text, encoding="utf-8")
    with _replacing(folder / WEIGHTS) as partial:
        mx.save_safetensors(str(partial), dict(parameters), {"format": "mlx"})


@contextlib.contextmanager
def _replacing(file: Path) -> Any:
    partial = file.with_name(f".{file.stem}.partial{file.suffix}")
    try:
        yield partial
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _load_states(model: Any, folder: Path, config: Mapping[str, Any]) -> None:
    weights = read(folder / WEIGHTS)
    add_initial_states(model, config["num_layers"])
    tuned = {f"model.layers.{i}.mixer.{leaf}" for i in _last(model, config["num_layers"]) for leaf in (STATE, BIAS)}
    shapes = {name: p.shape for name, p in named(model.parameters()).items() if name in tuned}
    _require(tuned, weights)
    for name, value in weights.items():
        if name not in shapes:
            raise ValueError(f"the model has no {name}")
        if value.shape != shapes[name]:
            raise ValueError(f"{name} is {value.shape}, and the model's {shapes[name]}")
    model.load_weights(list(weights.items()), strict=False)


def _names_in_full(model: Any, config: Mapping[str, Any]) -> set[str]:
    """What `full` trains; of mlx-lm's own adapters, which never hold all parameters, nothing is known."""
    if "settings" not in config:
        return set()
    if config["num_layers"] <= 0:
        return set(named(model.parameters()))
    last = _last(model, config["num_layers"])
    return {f"model.layers.{i}.{name}" for i in last for name in named(model.layers[i].parameters())}


def _check_scale(config: Mapping[str, Any]) -> None:
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not math.isfinite(scale):
        raise ValueError(f"{CONFIG}'s lora_parameters.scale must be a number, not {scale!r}")


def _low_rank(model: Any) -> set[str]:
    return {name for name in named(model.parameters()) if name.endswith((".lora_a", ".lora_b", ".m"))}


def _last(model: Any, num_layers: int) -> range:
    """The numbers of the last blocks; 0 or less: of all."""
    return range(len(model.layers))[-max(num_layers, 0) :]


def _require(names: set[str], weights: Mapping[str, mx.array]) -> None:
    """Raise where an adapter's file lacks one of the names; that it has no other ones is seen when it is loaded."""
    if missing := names - weights.keys():
        raise ValueError(f"the adapter has no {min(missing)}")


def _match_dtype(model: Any) -> None:
    dtype = model.model.norm_f.weight.dtype
    low_rank = {n: p for n, p in named(model.parameters()).items() if n.endswith((".lora_a", ".lora_b"))}
    model.update(nested({name: p.astype(dtype) for name, p in low_rank.items()}))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 300 else f"{text[:300]} ..."
