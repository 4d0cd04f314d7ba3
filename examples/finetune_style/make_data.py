"""Make a small dataset: short functions of this Python's own standard library, their docstrings put in the style.

    python make_data.py OUT [FUNCTIONS]

Writes train.jsonl (1,200 FUNCTIONS), valid.jsonl, heldout.jsonl for measure_style.py, all as prompt (the header) and
completion (docstring and body), and plain.jsonl, code as it was, for rodimus-mlx perplexity.
"""

import ast
import hashlib
import json
import re
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from style import pirate

SHARES = {"plain": 0.1, "heldout": 0.25, "valid": 0.3, "train": 1.0}  # each module is in one alone, by its path's hash
LONGEST = 12  # lines of a function
LEFT_OUT = re.compile(r"(^|/)(test|tests|idle_test|lib2to3|site-packages|encodings)/")


def main() -> None:
    out = Path(sys.argv[1])
    most = {"train": int(sys.argv[2]) if len(sys.argv) > 2 else 1200, "valid": 60, "heldout": 200, "plain": 20}
    records: dict[str, list[dict[str, str]]] = {name: [] for name in SHARES}
    library = Path(sysconfig.get_path("stdlib"))
    for file in library.rglob("*.py"):
        path, text = file.relative_to(library).as_posix(), file.read_text(encoding="utf-8", errors="replace")
        name = next(name for name, end in SHARES.items() if draw(path) < end)
        if LEFT_OUT.search(path):
            continue
        if name != "plain":
            records[name] += functions(text)
        elif 2_000 < len(text) < 10_000:
            records[name].append({"text": text})
    known = {record["prompt"] for record in records["train"]}
    records["heldout"] = [record for record in records["heldout"] if record["prompt"] not in known]
    out.mkdir(parents=True, exist_ok=True)
    for name, made in records.items():
        lines = sorted({json.dumps(record) + "\n" for record in made}, key=draw)[: most[name]]
        (out / f"{name}.jsonl").write_text("".join(lines))
        print(f"{name}.jsonl: {len(lines)}")


def functions(text: str) -> Iterator[dict[str, str]]:
    """A module's short functions that have a docstring, moved to the margin."""
    lines = text.splitlines()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(text)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or not (docstring := ast.get_docstring(node)) or len(node.body) < 2:
            continue
        begin, after, end = node.lineno - 1, node.body[0].end_lineno, node.end_lineno
        header, *body = textwrap.dedent("\n".join([lines[begin], *lines[after:end]])).splitlines()
        said = pirate(re.split(r"\.\s|\n\s*\n", docstring)[0])  # its first sentence
        one_line = header.startswith("def ") and header.endswith(":") and node.body[0].lineno == node.lineno + 1
        if one_line and body and len(body) <= LONGEST and len(said) < 100 and '"""' not in said and "\\" not in said:
            yield {"prompt": header, "completion": "\n".join(["", f'    """{said}"""', *body, ""])}


def draw(text: str) -> float:
    """A number in [0, 1) that is the text's own."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**32


if __name__ == "__main__":
    main()
