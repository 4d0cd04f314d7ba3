"""The README.md of a converted checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.version import __version__

from .mapping import count_parameters

_HUB_FOLDER = re.compile(r"^models--(.+?)--(.+)$")


@dataclass(frozen=True)
class Origin:
    """Where weights come from: what to call them, their hub id and license as far as the source says so."""

    name: str
    base_model: str | None
    license: str | None


def origin(source: Path) -> Origin:
    """What a checkpoint's place (the hub's cache keeps the id) and its own README.md say of it."""
    source = source.resolve()
    for folder in (source, *source.parents[:2]):
        if match := _HUB_FOLDER.match(folder.name):
            hub_id = "/".join(match.groups())
            return Origin(match[2], hub_id, _front_matter(source).get("license"))
    fields = _front_matter(source)
    return Origin(source.name, fields.get("base_model"), fields.get("license"))


def model_card(config: RodimusConfig, source: Origin, folder_name: str, dtype: str, format: str) -> str:
    """The text of README.md for weights converted from ``source``, to be run as ``folder_name``."""
    fields = ["library_name: mlx", "pipeline_tag: text-generation"]
    fields += [f"license: {source.license}"] if source.license else []
    fields += [f"base_model: {source.base_model}"] if source.base_model else []
    kind = "Rodimus+" if config.has_attention else "Rodimus"
    return f"""\
---
{chr(10).join(fields)}
tags:
- mlx
- rodimus
---

# {source.name} for MLX

A {kind} language model ({count_parameters(config):,} parameters, {config.n_layer} layers), converted to MLX from
{source.base_model or source.name} by rodimus-mlx {__version__}. The weights are the original ones, renamed from the
{format} format and stored as {dtype}; nothing was trained or quantized.

## Run it

```sh
pip install rodimus-mlx
rodimus-mlx generate --model {folder_name} "def fibonacci(n):"
```

Or with mlx-lm alone at the command line (it runs the two lines of `rodimus.py`, which import rodimus-mlx):

```sh
mlx_lm.generate --model {folder_name} --trust-remote-code --prompt "def fibonacci(n):"
```

In Python:

```python
import rodimus_mlx

model, tokenizer = rodimus_mlx.load("{folder_name}")
```
"""


def _front_matter(folder: Path) -> dict[str, str]:
    """The one-line fields of a README.md's YAML head."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")[:10_000]
    except (OSError, ValueError):
        return {}
    match = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    lines = match[1].splitlines() if match else []
    pairs = [line.split(":", 1) for line in lines if re.match(r"[a-z_]+:\s*[\w./@+-]+\s*$", line)]
    return {key: value.strip() for key, value in pairs}
