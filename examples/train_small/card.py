"""The model card of the small model: README.md for the folder that is bundled, from what was measured.

    python card.py plus --sources out/sources.json --bits bits.json --parse parse.json --positions positions.json

MODEL is the folder that train.py wrote, its metrics.jsonl in it. The results are the JSON that bits_per_byte.py,
parse_rate.py and loss_by_position.py print, each optional: what was not measured is not in the card. --into FOLDER
writes the card there, for a quantized copy of the model; --quantized 8 says so in it.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

from models import load, parameters

HEADER = """\
---
license: apache-2.0
library_name: mlx
pipeline_tag: text-generation
language:
- code
tags:
- mlx
- rodimus
---
"""
LIMITS = (
    "It is small: it knows Python's shape, its standard library's and common packages' names and habits, and little "
    "else. What it writes often does something other than its name says, and calls what does not exist. It knows the "
    "marks for filling in the middle but fills poorly. It has seen little English outside of docstrings and comments, "
    "no other programming language, and no conversation; it follows no instructions. It may repeat passages of its "
    "training text, whose licences ask for their notices. It is for trying commands and for measuring, not for work."
)
LICENCE = (
    "Apache-2.0, as the code that made it. The training text is others', under the licences above; it is not part of "
    "the model."
)


def main() -> None:
    """Read everything, write README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder that train.py wrote")
    parser.add_argument("--sources", type=Path, required=True, help="sources.json of build_data.py")
    parser.add_argument("--bits", type=Path, help="JSON of bits_per_byte.py")
    parser.add_argument("--parse", type=Path, help="JSON of parse_rate.py")
    parser.add_argument("--positions", type=Path, help="JSON of loss_by_position.py")
    parser.add_argument("--training", default="", help="a sentence on the machine, and settings other than train.py's")
    parser.add_argument("--quantized", type=int, help="bits a weight of the copy that --into holds")
    parser.add_argument("--into", type=Path, help="write there, in place of MODEL")
    args = parser.parse_args()

    events = [json.loads(line) for line in (args.model / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((args.model / "config.json").read_text())
    name = args.model.name
    parts = [
        HEADER + title(config, parameters(load(args.model))) + quantized(args.quantized),
        data(json.loads(args.sources.read_text())),
        training(events, args.training),
        measured(name, *(read(file) for file in (args.bits, args.parse, args.positions))),
        section("Limits", paragraph(LIMITS)),
        section("Licence", paragraph(LICENCE)),
    ]
    out = (args.into or args.model) / "README.md"
    out.write_text("\n".join(part for part in parts if part))
    print(out)


def title(config: dict[str, Any], count: int) -> str:
    """What it is, and its shape."""
    attention = config.get("attn_cfg") or {}
    shape = f"{config['n_layer']} layers, d {config['d_model']}, n {config['mixer_cfg']['mem_size']}"
    if attention:
        shape += f", attention over the last {attention['window_size'] // 2 + 1} tokens"
    kind = "Rodimus+" if attention else "Rodimus"
    text = paragraph(
        f"A {kind} language model of {count:,} parameters ({shape}) that completes Python code. It was trained from",
        "scratch by rodimus-mlx; `examples/train_small` there makes it again: data, tokenizer, training, measures.",
    )
    command = '```sh\nrodimus-mlx generate --temp 0.3 "class Person:"\n```'
    return f"\n# {kind} {count / 1e6:.1f}M for Python\n\n{text}\n\n{command}\n"


def quantized(bits: int | None) -> str:
    """How the weights are kept."""
    return (
        ""
        if bits is None
        else f"\nThe weights here are quantized to {bits} bits; they were trained, and measured, before that.\n"
    )


def data(sources: list[dict[str, Any]]) -> str:
    """What it has read, by licence, and what was held out."""
    chosen = [source for source in sources if source["share"] == "train"]
    held = sorted(source["package"] for source in sources if source["share"] == "heldout")
    licences: Counter[str] = Counter()
    for source in chosen:
        licences[source["licence"]] += source["megabytes"]
    rows = [
        f"| {licence} | {', '.join(label(s) for s in chosen if s['licence'] == licence)} | {megabytes:.1f} |"
        for licence, megabytes in licences.most_common()
    ]
    modules, packages = sum(source["modules"] for source in chosen), len(chosen) - 1
    first = paragraph(
        f"{sum(licences.values()):.0f} MB of Python in {modules:,} modules: the standard library and {packages}",
        "packages, without tests, generated files and near-copies. Held out are some modules of these, and all of",
        f"{', '.join(held)}.",
    )
    last = paragraph(
        "Tokenizer: byte-level BPE, trained on the same text; its special tokens are those of the released Base",
        "coders, `<|fim_begin|>`, `<|fim_hole|>` and `<|fim_end|>` among them.",
    )
    table = "\n".join(["| licence | packages | MB |", "|---|---|---|", *rows])
    return section("Data", f"{first}\n\n{table}\n\n{last}")


def label(source: dict[str, Any]) -> str:
    """A package with its version, or the standard library with the versions that it was taken from."""
    if source["package"] == "python":
        versions = source["version"].split()
        return f"Python's standard library {versions[0]} to {versions[-1]}"
    return f"{source['package']} {source['version']}"


def training(events: list[dict[str, Any]], remark: str) -> str:
    """Settings and losses of the run."""
    start = next(event for event in events if event["event"] == "start")
    reports = [event for event in events if event["event"] == "report"]
    valid = [event for event in events if event["event"] == "valid"]
    tokens = start["tokens_in_epoch"] * start["iters"] / start["steps_in_epoch"]
    rate = max(event["learning_rate"] for event in reports)
    text = paragraph(
        f"{start['iters']:,} steps of {start['rows_in_step']} packed rows of {start['longest']:,} tokens,",
        f"{tokens / 1e6:,.0f} million tokens in all, computed in {start['dtype']} with float32 weights. AdamW (0.9,",
        f"0.95; weight decay 0.1 on matrices), learning rate up to {rate:.1e} and down in a line; 30% of the samples",
        f"turned to fill in the middle. {remark}",
        f"Loss at the end, nats a token: {reports[-1]['loss']:.3f} in training,",
        f"{valid[-1]['loss']:.3f} on {start['valid_samples']} validation samples.",
    )
    return section("Training", text)


def measured(
    name: str, bits: dict[str, Any] | None, parse: dict[str, Any] | None, positions: dict[str, Any] | None
) -> str:
    """What the measuring scripts found."""
    lines = []
    if bits is not None:
        own, xz, size = bits[name]["all"], bits["xz -9e"]["all"], bits["bytes"]["all"]
        lines.append(f"- {own:.3f} bits a byte on {size:,} bytes of held-out modules; `xz -9e` needs {xz:.3f}.")
    if parse is not None:
        lines.append(
            f"- Of {parse['functions']} completions of held-out function headers at temperature "
            f"{parse['temperature']}, {parse['parses']:.0%} parse, and {parse['does_something']:.0%} do something."
        )
    if positions is not None:
        pairs = zip(positions["from"], positions["to"], positions[name])
        steps = ", ".join(f"{loss:.2f} ({a:,} to {b:,})" for a, b, loss in pairs)
        lines.append(f"- Loss by tokens read before, nats a token: {steps}.")
    return section("Measured", "\n".join(lines)) if lines else ""


def section(heading: str, text: str) -> str:
    """A part of the card under its heading."""
    return f"## {heading}\n\n{text}\n"


def paragraph(*parts: str) -> str:
    """Text, folded."""
    return textwrap.fill(" ".join(part for part in parts if part), 120, break_on_hyphens=False, break_long_words=False)


def read(file: Path | None) -> dict[str, Any] | None:
    """A JSON file, where one is given."""
    return None if file is None else json.loads(file.read_text())


if __name__ == "__main__":
    main()
