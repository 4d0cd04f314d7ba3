"""An adapter made part of its model: a checkpoint that needs no adapter any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx.utils import tree_unflatten
from mlx_lm.utils import dequantize_model

from ..convert.folder import refuse_occupied
from ..errors import RodimusError
from ..hub import find_folder
from ..loading import load_model
from ..tokenizer import load_tokenizer
from .adapters import apply
from .saving import save_checkpoint


def fuse(model: str | Path, adapter: str | Path, out: str | Path, dequantize: bool = False) -> int:
    """Write the model with the adapter's changes in its weights; returns the weights' bytes.

    Args:
        model: a folder or hub id, quantized or not; what is quantized stays so, rounded anew,
        dequantize: unless this is set: then all weights are written in 16 or 32 bits.

    Raises:
        RodimusError: the adapter does not fit, ``out`` is taken, or the disk is full.
    """
    refuse_occupied(Path(out))
    folder = find_folder(model)
    loaded: Any
    loaded, config = load_model(folder)
    method = apply(loaded, adapter, keep_dtype=True)
    if method == "state":
        raise RodimusError(
            f"{adapter} holds initial states, for which checkpoints have no place: load it as an adapter"
        )
    fused = [(name, module.fuse(dequantize)) for name, module in loaded.named_modules() if hasattr(module, "fuse")]
    if fused:
        loaded.update_modules(tree_unflatten(fused))
    quantization = config.get("quantization")
    if dequantize and quantization is not None:
        loaded, quantization = dequantize_model(loaded), None
    history = f"{Path(model).name} finetuned by {method}: the adapter {Path(adapter).name} is part of the weights."
    return save_checkpoint(loaded, load_tokenizer(folder, str(model)), out, history, quantization)
