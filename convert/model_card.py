"""The README.md of a converted checkpoint."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.version import __version__

from .mapping import count_parameters

CARD_NAME = "README.md"
_HUB_FOLDER = re.compile(r"^models--(.+?)--(.+)$")


@dataclass(frozen=True)
class Origin:
    """Where weights come from: what to call them, their hub id and license as far as the source says so."""

    name: str
    base_model: str | None
    license: str | None


@dataclass(frozen=True)
class Facts:
    """What a card tells."""

    source: Origin
    config: RodimusConfig
    format: str  # of the source
    dtype: str
    quantization: dict[str, Any] | None
    history: str | None = None  # how the weights were made, where it was more than converting


def origin(source: Path) -> Origin:
    """What a checkpoint's place (the hub's cache keeps the id) and its own README.md say of it."""
    source = source.resolve()
    for folder in (source, *source.parents[:2]):
        if match := _HUB_FOLDER.match(folder.name):
            hub_id = "/".join(match.groups())
            return Origin(match[2], hub_id, _front_matter(source).get("license"))
    fields = _front_matter(source)
    return Origin(source.name, fields.get("base_model"), fields.get("license"))


def model_card(facts: Facts, folder_name: str, bits_per_weight: float) -> str:
    """The text of README.md for weights converted for MLX, to be run as ``folder_name``."""
    return f"""\
---
{_fields(facts, "library_name: mlx", "pipeline_tag: text-generation")}
tags:
- mlx
- rodimus
---

# {facts.source.name} for MLX

{_kind(facts)}, converted to MLX from {facts.source.base_model or facts.source.name} by rodimus-mlx {__version__}.
{_weights(facts, bits_per_weight)}

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


def export_card(facts: Facts, to: str) -> str:
    """The text of README.md for weights in another library's format."""
    code = "the official PyTorch code" if to == "official" else "flash-linear-attention"
    return f"""\
---
{_fields(facts, "pipeline_tag: text-generation")}
tags:
- rodimus
---

# {facts.source.name}

{_kind(facts)}, in the format that {code} reads, stored as {facts.dtype}; written by rodimus-mlx {__version__}.
"""


def add_section(folder: Path, title: str, text: str) -> None:
    """Put a section at the end of a folder's README.md, in place of one of the same title."""
    file = folder / CARD_NAME
    before = file.read_text(encoding="utf-8").split(f"\n## {title}\n")[0].rstrip()
    partial = file.with_name(f".{CARD_NAME}.partial")
    partial.write_text(f"{before}\n\n## {title}\n\n{text.strip()}\n", encoding="utf-8")
    os.replace(partial, file)


def _fields(facts: Facts, *fields: str) -> str:
    lines = [*fields]
    lines += [f"license: {facts.source.license}"] if facts.source.license else []
    lines += [f"base_model: {facts.source.base_model}"] if facts.source.base_model else []
    if facts.source.base_model and facts.quantization is not None:
        lines.append("base_model_relation: quantized")
    return "\n".join(lines)


def _kind(facts: Facts) -> str:
    kind = "Rodimus+" if facts.config.has_attention else "Rodimus"
    return f"A {kind} language model ({count_parameters(facts.config):,} parameters, {facts.config.n_layer} layers)"


def _weights(facts: Facts, bits_per_weight: float) -> str:
    if facts.history is not None:
        return facts.history
    if facts.quantization is None:
        return (
            f"The weights are the original ones, renamed from the {facts.format} format and stored as {facts.dtype}; "
            "nothing was trained or quantized."
        )
    table = facts.quantization
    base = f"{table['bits']} bit {table.get('mode', 'affine')} in groups of {table['group_size']}"
    own = sorted({entry["bits"] for entry in table.values() if isinstance(entry, dict)})
    more = f", some at {', '.join(map(str, own))} bit" if own and own != [table["bits"]] else ""
    return (
        f"The large matrices are quantized ({base}{more}); the rest is {facts.dtype}: "
        f"{bits_per_weight:.2f} bits per weight in all. Nothing was trained."
    )


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
