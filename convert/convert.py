"""Any checkpoint -> a folder of ours, which rodimus-mlx and mlx-lm load; weights stream through in blocks of rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.errors import RodimusError

from .checkpoint import Checkpoint, open_checkpoint, read_json
from .fla import fla_config
from .folder import new_folder, refuse_occupied
from .mapping import count_parameters
from .model_card import CARD_NAME, Facts, export_card, model_card, origin
from .outputs import Prepared, Wish, prepare
from .schemes import Scheme
from .state_dict_pickle import shown
from .streams import Output
from .weights import FLOAT_DTYPES
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
_KEPT_OPTIONS = ("pad_token_id",)  # config.json's, beyond RodimusConfig
_SMALL_FILES = 1 << 20  # bytes allowed for what is not weights or tokenizer when asking for disk space


Progress = Callable[[int, int], None]  # called with (bytes written, bytes to write) after every block


@dataclass(frozen=True)
class Summary:
    """What a conversion did."""

    out: Path
    format: str  # of the source: "official", "fla" or "ours"
    parameters: int
    dtype: str  # of what is not quantized
    weight_bytes: int
    files: tuple[str, ...]
    has_tokenizer: bool
    quantization: dict[str, Any] | None  # config.json's table

    @property
    def bits_per_weight(self) -> float:
        """Bits in the file for each of the model's parameters."""
        return 8 * self.weight_bytes / self.parameters


def convert(
    src: str | Path,
    out: str | Path,
    dtype: str | None = None,
    progress: Progress | None = None,
    *,
    scheme: Scheme | None = None,
    recipe: str = "default",
    dequantize: bool = False,
    to: str = "ours",
) -> Summary:
    """Convert an official, fla or converted checkpoint folder into ``out``.

    Memory holds one block of rows at a time. ``out`` appears complete or, whatever happens, not at all.

    Args:
        src: the checkpoint folder.
        out: a folder that does not exist yet, or is empty; not inside ``src``.
        dtype: "float32", "bfloat16" or "float16"; None keeps the source's, but takes bfloat16 for float32 where
            weights are quantized.
        scheme: quantize the large matrices so; ``recipe``, one of `schemes.RECIPES`, says which.
        dequantize: write a quantized source's weights in full.
        to: the format to write: "ours", or "official" or "fla" for PyTorch, the exact inverse of converting from it.

    Raises:
        RodimusError: the source is not a sound checkpoint, ``out`` is taken, the disk is full, or the choices do not
            go together.
    """
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise RodimusError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}, not {dtype!r}")
    refuse_bad_place(src, out)
    checkpoint = open_checkpoint(src)
    prepared = prepare(checkpoint, Wish(dtype, scheme, recipe, dequantize, to))
    return write_checkpoint(checkpoint, prepared, Path(out), progress, to)


def refuse_bad_place(src: str | Path, out: str | Path) -> None:
    """Refuse an ``out`` that is taken or inside the source.

    Raises:
        RodimusError: so it is.
    """
    refuse_occupied(Path(out))
    if Path(out).resolve().is_relative_to(Path(src).resolve()):
        raise RodimusError(f"{out} lies inside the source {src}; choose a folder outside it")


def write_checkpoint(
    checkpoint: Checkpoint,
    prepared: Prepared,
    out: Path,
    progress: Progress | None = None,
    to: str = "ours",
    history: str | None = None,
) -> Summary:
    """Write a folder with the prepared weights and everything else that the source has for them.

    Args:
        history: a sentence for README.md on how the weights were made, in place of what ``prepared`` tells.

    Raises:
        RodimusError: ``out`` is taken, the tokenizer is damaged, or the disk is full.
    """
    from rodimus_mlx.tokenizer import is_chat_model, load_tokenizer

    src, config = checkpoint.folder, prepared.config
    config_json = _config(checkpoint, prepared, to)
    source = origin(src)
    _refuse_bad_ends(src / _GENERATION)
    tokenizer = load_tokenizer(src, source.name)  # before the long part: a damaged one ends it here
    copied = sum((src / name).stat().st_size for name in _TOKENIZER_FILES if (src / name).is_file())
    specs = prepared.specs
    weight_bytes = sum(spec.nbytes for spec in specs.values())
    parameters = count_parameters(config)
    with new_folder(out, weight_bytes + copied + _SMALL_FILES) as folder:
        files = _write_weights(folder, prepared.outputs, specs, progress, "mlx" if to == "ours" else "pt")
        if tokenizer is not None:
            _write_tokenizer(folder, src, is_chat_model(tokenizer))
        _copy_licenses(folder, src)
        write_json(folder / "config.json", config_json)
        _write_generation_config(folder, src, config, sorted(tokenizer.eos_token_ids) if tokenizer else [])
        if to == "ours":
            (folder / SHIM_NAME).write_text(_SHIM)
        facts = Facts(source, config, prepared.format, prepared.dtype, prepared.quantization, history)
        name, bits = out.absolute().name, 8 * weight_bytes / parameters
        card = model_card(facts, name, bits) if to == "ours" else export_card(facts, to)
        (folder / CARD_NAME).write_text(card, encoding="utf-8")
    has_tokenizer, table = tokenizer is not None, prepared.quantization
    return Summary(out, prepared.format, parameters, prepared.dtype, weight_bytes, files, has_tokenizer, table)


def _write_weights(
    folder: Path, outputs: Sequence[Output], specs: dict[str, Spec], progress: Progress | None, made_for: str
) -> tuple[str, ...]:
    done, total = 0, sum(spec.nbytes for spec in specs.values())
    with sharded_writer(folder, specs, made_for=made_for) as writer:
        for output in outputs:
            for name, block in output.rows():
                writer.write(name, block)
                done += block.nbytes
                if progress is not None:
                    progress(done, total)
    mx.clear_cache()
    return tuple(writer.files)


def _config(checkpoint: Checkpoint, prepared: Prepared, to: str) -> dict[str, Any]:
    kept = {key: checkpoint.config[key] for key in _KEPT_OPTIONS if checkpoint.config.get(key) is not None}
    kept["torch_dtype"] = prepared.dtype
    if to != "ours":
        return {**(prepared.config.to_dict() if to == "official" else fla_config(prepared.config)), **kept}
    if prepared.quantization is not None:  # twice, as mlx-lm writes it: the hub shows the second
        kept |= dict.fromkeys(("quantization", "quantization_config"), prepared.quantization)
    return {**prepared.config.to_dict(), **kept, "model_file": SHIM_NAME}


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


def _refuse_bad_ends(file: Path) -> None:
    """generation_config.json is copied, and whoever loads the copy puts its end tokens into the config."""
    ends = read_json(file).get("eos_token_id") if file.is_file() else None
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and not (type(end) is int and abs(end) < 2**31):
            raise RodimusError(f"{file}: eos_token_id must be a whole number or a list of them, not {shown(str(end))}")


def _copy(path: Path, folder: Path) -> None:
    if path.is_file():
        shutil.copyfile(path, folder / path.name)
