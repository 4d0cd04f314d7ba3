"""A checkpoint's folder or hub id to a model that runs, and the registration that makes mlx-lm know Rodimus."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import model as model_module
from .config import RodimusConfig
from .convert.checkpoint import open_checkpoint
from .convert.weights import WeightPlan, plan_weights
from .errors import RodimusError
from .hub import find_folder
from .model import Model, ModelArgs
from .tokenizer import load_tokenizer

DEMO_FOLDER = Path(__file__).parent / "demo"


def load(
    path_or_hub_id: str | Path,
    adapter_path: str | Path | None = None,
    *,
    dtype: mx.Dtype | None = None,
    revision: str | None = None,
) -> tuple[Model, TokenizerWrapper | None]:
    """Load a model and its tokenizer.

    Args:
        path_or_hub_id: a folder, or ``owner/name`` on the Hugging Face hub: an official checkpoint (``.bin`` or
            ``.safetensors``, in one file or shards), one in flash-linear-attention's format, or a converted one.
        adapter_path: folder of an mlx-lm adapter to put on the model.
        dtype: what the weights are cast to; None keeps the file's. Not for quantized checkpoints.
        revision: branch, tag or commit on the hub.

    Returns:
        The model and mlx-lm's tokenizer wrapper; None for the tokenizer, with a warning, where there is none.

    Raises:
        RodimusError: one line naming the file, key or tensor that is wrong.
    """
    folder = find_folder(path_or_hub_id, revision)
    model, _ = _load_folder(folder, dtype)
    if adapter_path is not None:
        from .finetune.adapters import apply  # the tuner is not needed without an adapter

        apply(model, adapter_path)
    return model, load_tokenizer(folder, name=Path(path_or_hub_id).name)


def load_model(
    path_or_hub_id: str | Path, *, dtype: mx.Dtype | None = None, revision: str | None = None
) -> tuple[Model, dict[str, Any]]:
    """Load a model without its tokenizer; arguments as in ``load``.

    Returns:
        The model (its ``RodimusConfig`` is ``model.args``) and the checkpoint's config.json as it stands.

    Raises:
        RodimusError: one line naming the file, key or tensor that is wrong.
    """
    return _load_folder(find_folder(path_or_hub_id, revision), dtype)


def register() -> None:
    """Make every mlx-lm function know ``model_type`` "rodimus".

    After it ``mlx_lm.load``, ``generate``, ``convert``, ``lora``, ``server`` ... open converted folders with no flag:
    the class comes from here, and the ``model_file`` that such a folder carries for a plain mlx-lm is not run.
    May be called more than once.
    """
    sys.modules["mlx_lm.models.rodimus"] = model_module
    if not hasattr(mlx_lm_utils.load_model, "before_rodimus"):
        mlx_lm_utils.load_model = _without_model_file(mlx_lm_utils.load_model)


def _without_model_file(load_model: Any) -> Any:
    """mlx-lm's ``load_model``, with the ``model_file`` of Rodimus folders hidden from it but kept in the config."""

    @functools.wraps(load_model)
    def load_registered(
        model_path: Path,
        lazy: bool = False,
        strict: bool = True,
        model_config: dict | None = None,
        *rest: Any,
        **more: Any,
    ) -> Any:
        on_disk = mlx_lm_utils.load_config(Path(model_path))
        if on_disk.get("model_type") != "rodimus" or "model_file" not in on_disk:
            return load_model(model_path, lazy, strict, model_config, *rest, **more)
        hidden = {**(model_config or {}), "model_file": None}
        model, config = load_model(model_path, lazy, strict, hidden, *rest, **more)
        config["model_file"] = on_disk["model_file"]
        return model, config

    load_registered.before_rodimus = load_model  # type: ignore[attr-defined]
    return load_registered


def _load_folder(folder: Path, dtype: mx.Dtype | None) -> tuple[Model, dict[str, Any]]:
    checkpoint = open_checkpoint(folder)
    plan = plan_weights(checkpoint, RodimusConfig.from_dict(checkpoint.config), dtype)
    if "quantization" in checkpoint.config:
        if dtype is not None:
            raise RodimusError(f"{folder} is quantized: its dtype cannot be changed")
        model = _load_quantized(folder)
    else:
        model = _load_plain(plan)
    model.eval()
    return model, checkpoint.config


def _load_plain(plan: WeightPlan) -> Model:
    model = Model(plan.config)
    model.load_weights([(weight.name, weight.read()) for weight in plan.weights])
    return model


def _load_quantized(folder: Path) -> Model:
    """mlx-lm knows how its quantized layers are packed; the folder was checked by the caller."""
    try:
        model: Any = mlx_lm_utils.load_model(
            folder, model_config={"model_file": None}, get_model_classes=lambda config: (Model, ModelArgs)
        )[0]
    except (ValueError, KeyError, TypeError) as error:
        raise RodimusError(f"{folder}: config.json's quantization does not fit the weights: {error}") from error
    return model
