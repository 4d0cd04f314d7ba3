"""A state's file: an mlx-lm prompt cache (safetensors) whose metadata says what was read, and by which model.

``mlx_lm.models.cache.load_prompt_cache`` and ``mlx_lm.generate --prompt-cache-file`` open it as it is. Our part is
one entry of the metadata, ``rodimus_state``: JSON with the fields of `StateInfo` and the version of this format.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, load_prompt_cache, save_prompt_cache

from ..config import RodimusConfig
from ..convert.safetensors_file import read_safetensors
from ..errors import RodimusError
from .fingerprint import fingerprint, refuse_mismatch
from .snapshot import Cache, compact, evaluate
from .store import SUFFIX

VERSION = 1
_KEY = "rodimus_state"
_PADDED = 256  # so that a file's size does not depend on how many digits the count has


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class StateInfo:
    """What is known of a state without its arrays.

    tokens: how many were read. source: from what, for people. model: the name that the model was loaded by.
    messages: the conversation that was read, to its end. unknown: whether something else was read before it.
    """

    tokens: int
    source: str = ""
    model: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    unknown: bool = False
    created: str = field(default_factory=_now)
    fingerprint: dict[str, str] = field(default_factory=dict)


@dataclass
class State:
    """A cache that has read ``info.tokens`` tokens. Whoever moves it on takes a `snapshot` first."""

    cache: Cache
    info: StateInfo


def save_state(path: str | Path, model: Any, state: State) -> StateInfo:
    """Write a state; the file is complete or, if anything goes wrong, what it was before.

    Returns: the info as written, with the model's fingerprint.

    Raises:
        RodimusError: nothing was read, or the file cannot be written.
    """
    if not state.info.tokens:
        raise RodimusError("there is nothing to keep: nothing was read yet")
    path = Path(path)
    info = StateInfo(**{**_shallow(state.info), "fingerprint": fingerprint(model)})
    # "model" and "tokenizer_config" are what mlx-lm's own command looks for
    text = json.dumps({"version": VERSION, **asdict(info)})
    text += " " * (-len(text) % _PADDED)
    metadata = {_KEY: text, "model": info.model, "tokenizer_config": "{}"}
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_prompt_cache(str(partial), compact(state.cache), metadata)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        raise RodimusError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        if partial.exists():
            partial.unlink()
    return info


def load_state(path: str | Path, model: Any, label: str = "") -> State:
    """Read a state made by this very model.

    Raises:
        RodimusError: the file is damaged, of a newer format, or of another model, quantization or adapter.
    """
    path = Path(path)
    label = label or str(path)
    info = read_info(path)
    refuse_mismatch(info.fingerprint, fingerprint(model), label)
    cache = load_cache(path)
    if len(cache) != model.args.n_layer or not all(_fits(layer, model.args) for layer in cache):
        raise RodimusError(f"{path} is damaged: its arrays are not of the model's sizes")
    return State(cache, info)


def load_cache(path: str | Path) -> Cache:
    """Read a file's cache, whatever model it belongs to.

    Raises:
        RodimusError: the file is damaged.
    """
    try:
        cache = load_prompt_cache(str(path))
        evaluate(cache)  # now, so that the file may change or go
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise RodimusError(f"{path} is damaged: {error}") from error
    return cache


def read_info(path: str | Path) -> StateInfo:
    """What a file says of its state, without reading the arrays.

    Raises:
        RodimusError: it is no state's file, cut short, or of a newer format.
    """
    path = Path(path)
    read_safetensors(path)  # checks that the file is whole
    try:
        entries = json.loads(_metadata(path)[f"0.{_KEY}"])  # mlx-lm puts its users' metadata under 0
        if entries.pop("version") > VERSION:
            raise RodimusError(f"{path} was written by a newer rodimus-mlx: update to read it")
        known = {each.name for each in fields(StateInfo)}
        return StateInfo(**{name: value for name, value in entries.items() if name in known})
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise RodimusError(f"{path} is not a state's file: rodimus-mlx state make writes them") from error


def _metadata(path: Path) -> dict[str, str]:
    with open(path, "rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]


def _shallow(info: StateInfo) -> dict[str, Any]:
    return {each.name: getattr(info, each.name) for each in fields(info)}


def _fits(layer: Any, config: RodimusConfig) -> bool:
    """Whether a layer's cache is of the kinds and sizes that `compact` leaves: damage may not show anywhere else."""
    parts: Any = layer.caches if isinstance(layer, CacheList) else [layer]
    window = config.window_keys
    kinds: list[type] = [ArraysCache]
    if config.has_attention:
        kinds.append(KVCache if window is None else RotatingKVCache)
    if [type(part) for part in parts] != kinds:
        return False
    mixer, *attention = parts
    found = [getattr(array, "shape", None) for array in mixer.cache]
    if found != [(1, config.d_conv - 1, config.d_inner), (1, config.mem_size, config.d_inner)]:
        return False
    if not attention:
        return True
    keys = attention[0]
    if type(keys.offset) is not int:
        return False
    length = keys.offset if window is None else min(keys.offset, window)
    if window is not None and (keys.max_size, keys.keep, keys._idx) != (window, 0, length):
        return False
    widths = (heads * config.head_dim for heads in (config.num_heads_k, config.num_heads_v))
    found = [getattr(array, "shape", None) for array in (keys.keys, keys.values)]
    return found == [(1, 1, length, width) for width in widths]
