"""Models of this example by their config: Rodimus, Rodimus+, or mlx-lm's Transformer; made new, saved, loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import transformer
from mlx.utils import tree_flatten

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.finetune.initialize import initialize
from rodimus_mlx.loading import load_model

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def new(config_file: Path, seed: int = 0) -> Any:
    """A model to train from scratch."""
    config = json.loads(config_file.read_text())
    if config["model_type"] == "llama":
        return transformer.initialize(config, seed)
    return initialize(RodimusConfig.from_dict(config), seed)


def save(model: Any, config_file: Path, tokenizer: Path, out: Path) -> None:
    """A folder that `load` and, for Rodimus, every command of rodimus-mlx takes."""
    out.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(out / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    shutil.copy(config_file, out / "config.json")
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, out / name)


def load(folder: Path) -> Any:
    """A trained model, in evaluation mode."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "llama":
        return load_model(folder)[0]
    model = transformer.initialize(config)
    model.load_weights(str(folder / "model.safetensors"))
    model.eval()
    return model


def parameters(model: Any) -> int:
    """How many numbers a model has."""
    return sum(value.size for _, value in tree_flatten(model.parameters()))
