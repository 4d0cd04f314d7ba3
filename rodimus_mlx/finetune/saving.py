"""A model in memory -> a checkpoint folder that rodimus-mlx and mlx-lm load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_lm.utils import save_model

from ..convert.convert import _SHIM, SHIM_NAME
from ..convert.folder import new_folder
from ..convert.writer import write_json
from ..version import __version__
from .parameters import named

_SMALL_FILES = 1 << 24  # bytes allowed for what is not weights when asking for disk space


def save_checkpoint(
    model: Any, tokenizer: Any | None, out: str | Path, history: str, quantization: dict[str, Any] | None = None
) -> int:
    """Write the folder, complete or, whatever happens, not at all; returns the weights' bytes.

    Args:
        history: a sentence for README.md: where the weights come from.
        quantization: config.json's entry of that name, for a quantized model.

    Raises:
        RodimusError: ``out`` is taken, or the disk is full.
    """
    size = sum(p.nbytes for p in named(model.parameters()).values())
    out = Path(out)
    with new_folder(out, size + _SMALL_FILES) as folder:
        save_model(folder, model)
        extra: dict[str, Any] = {"torch_dtype": str(model.model.norm_f.weight.dtype).removeprefix("mlx.core.")}
        if quantization is not None:
            extra |= {"quantization": quantization, "quantization_config": quantization}
        write_json(folder / "config.json", {**model.args.to_dict(), **extra, "model_file": SHIM_NAME})
        (folder / SHIM_NAME).write_text(_SHIM)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
            write_json(folder / "generation_config.json", {"eos_token_id": sorted(tokenizer.eos_token_ids)})
        card = _CARD.format(name=out.absolute().name, history=history, version=__version__)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return size


_CARD = """\
---
library_name: mlx
pipeline_tag: text-generation
tags:
- mlx
- rodimus
---

# {name}

{history} Written by rodimus-mlx {version}.

```sh
rodimus-mlx generate --model {name} "def fibonacci(n):"
```
"""
