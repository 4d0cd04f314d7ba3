"""Any checkpoint -> a folder of ours, which rodimus-mlx and mlx-lm load; weights stream through in blocks of rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.errors import RodimusError

from .checkpoint import Checkpoint, open_checkpoint, read_json
from .folder import new_folder, refuse_occupied
from .mapping import count_parameters
from .model_card import model_card, origin
from .weights import FLOAT_DTYPES, WeightPlan, plan_weights
from .writer import Spec, sharded_writer, write_json

SHIM_NAME = "rodimus.py"
_SHIM = 'from rodimus_mlx.model import Model, ModelArgs\n\n__all__ = ["Model", "ModelArgs"]\n'
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    *_TEMPLATE_FILES,
)
_SETTINGS, _GENERATION = "tokenizer_config.json", "generation_config.json"
_KEPT_OPTIONS = ("pad_token_id", "quantization", "quantization_config")  # config.json's, beyond RodimusConfig
_SMALL_FILES = 1 << 20  # bytes allowed for what is not weights or tokenizer when asking for disk space


@dataclass(frozen=True)
class Summary:
    """What a conversion did."""

    out: Path
    format: str  # of the source: "official", "fla" or "ours"
    parameters: int
    dtype: str
    weight_bytes: int
    files: tuple[str, ...]
    has_tokenizer: bool


def convert(
    src: str | Path, out: str | Path, dtype: str | None = None, progress: Callable[[int, int], None] | None = None
) -> Summary:
    """Convert an official, fla or converted checkpoint folder into ``out``.

    Memory holds one block of rows at a time. ``out`` appears complete or, whatever happens, not at all.

    Args:
        src: the checkpoint folder.
        out: a folder that does not exist yet, or is empty; not inside ``src``.
        dtype: "float32", "bfloat16" or "float16"; None keeps the source's.
        progress: called with (bytes written, bytes to write) after every block.

    Raises:
        RodimusError: the source is not a sound checkpoint, ``out`` is taken, or the disk is full.
    """
    from rodimus_mlx.tokenizer import is_chat_model, load_tokenizer

    src, out = Path(src), Path(out)
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise RodimusError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}, not {dtype!r}")
    refuse_occupied(out)
    if out.resolve().is_relative_to(src.resolve()):
        raise RodimusError(f"{out} lies inside the source {src}; choose a folder outside it")
    checkpoint = open_checkpoint(src)
    if dtype is not None and "quantization" in checkpoint.config:
        raise RodimusError(f"{src} is quantized: its dtype cannot be changed")
    config = RodimusConfig.from_dict(checkpoint.config)
    plan = plan_weights(checkpoint, config, FLOAT_DTYPES[dtype] if dtype else None)
    specs = {weight.name: Spec(weight.dtype, weight.shape) for weight in plan.weights}
    weight_bytes = sum(spec.nbytes for spec in specs.values())
    source = origin(src)
    tokenizer = load_tokenizer(src, source.name)  # before the long part: a damaged one ends it here
    dtype = _dtype_name(plan)
    copied = sum((src / name).stat().st_size for name in _TOKENIZER_FILES if (src / name).is_file())
    with new_folder(out, weight_bytes + copied + _SMALL_FILES) as folder:
        files = _write_weights(folder, plan, specs, weight_bytes, progress)
        if tokenizer is not None:
            _write_tokenizer(folder, src, is_chat_model(tokenizer))
        _copy_licenses(folder, src)
        write_json(folder / "config.json", _config(checkpoint, plan.config, dtype))
        _write_generation_config(folder, src, plan.config, sorted(tokenizer.eos_token_ids) if tokenizer else [])
        (folder / SHIM_NAME).write_text(_SHIM)
        card = model_card(plan.config, source, out.absolute().name, dtype, plan.format)
        (folder / "README.md").write_text(card, encoding="utf-8")
    parameters = count_parameters(plan.config)
    return Summary(out, plan.format, parameters, dtype, weight_bytes, files, tokenizer is not None)


def _write_weights(
    folder: Path,
    plan: WeightPlan,
    specs: dict[str, Spec],
    total: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[str, ...]:
    done = 0
    with sharded_writer(folder, specs) as writer:
        for weight in plan.weights:
            for block in weight.blocks():
                writer.write(weight.name, block)
                done += block.nbytes
                if progress is not None:
                    progress(done, total)
    mx.clear_cache()
    return tuple(writer.files)


def _config(checkpoint: Checkpoint, config: RodimusConfig, dtype: str) -> dict[str, Any]:
    kept = {key: checkpoint.config[key] for key in _KEPT_OPTIONS if checkpoint.config.get(key) is not None}
    return {**config.to_dict(), **kept, "torch_dtype": dtype, "model_file": SHIM_NAME}


def _write_tokenizer(folder: Path, src: Path, is_chat: bool) -> None:
    """Copy the tokenizer's files, free of what would need its authors' code, and see to a chat template."""
    from rodimus_mlx.tokenizer import CHAT_KEY, CHAT_TEMPLATE

    for name in _TOKENIZER_FILES:
        _copy(src / name, folder)
    settings = read_json(src / _SETTINGS) if (src / _SETTINGS).is_file() else {}
    settings.pop("auto_map", None)
    if (src / "tokenizer.json").is_file():
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings[CHAT_KEY] = is_chat
    write_json(folder / _SETTINGS, settings)
    if "chat_template" not in settings and not any((folder / name).is_file() for name in _TEMPLATE_FILES):
        (folder / _TEMPLATE_FILES[0]).write_text(CHAT_TEMPLATE, encoding="utf-8")


def _copy_licenses(folder: Path, src: Path) -> None:
    for pattern in ("LICENSE*", "NOTICE*"):
        for path in src.glob(pattern):
            _copy(path, folder)


def _write_generation_config(folder: Path, src: Path, config: RodimusConfig, ends: list[int]) -> None:
    if (src / _GENERATION).is_file():
        _copy(src / _GENERATION, folder)
        return
    given = config.eos_token_id
    ends = ends or (list(given) if isinstance(given, tuple) else [given] if given is not None else [])
    values = {"bos_token_id": config.bos_token_id, "eos_token_id": ends or None}
    write_json(folder / _GENERATION, {key: value for key, value in values.items() if value is not None})


def _copy(path: Path, folder: Path) -> None:
    if path.is_file():
        shutil.copyfile(path, folder / path.name)


def _dtype_name(plan: WeightPlan) -> str:
    """The widest floating dtype among the weights: what config.json states."""
    found = {weight.dtype for weight in plan.weights}
    return next((name for name, dtype in FLOAT_DTYPES.items() if dtype in found), "float32")
