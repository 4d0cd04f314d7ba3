"""How often a model writes in the style: it completes held-out headers of functions, the likeliest token each time.

    python measure_style.py MODEL DATA [ADAPTER] [FUNCTIONS]

Counts the docstrings that are pirate's talk, and the functions that Python parses; shows the first three.
"""

import ast
import json
import re
import sys
import warnings
from pathlib import Path

from style import speaks

from rodimus_mlx import generate, load

END = ["\ndef ", "\nclass ", "\n@", "\n#", "\nif "]  # where a function is over


def main() -> None:
    model_name, data = sys.argv[1:3]
    adapter = sys.argv[3] if len(sys.argv) > 3 and sys.argv[3] else None
    count = int(sys.argv[4]) if len(sys.argv) > 4 else 50
    model, tokenizer = load(model_name, adapter_path=adapter)
    lines = (Path(data) / "heldout.jsonl").read_text().splitlines()[:count]
    texts = []
    for line in lines:
        header = json.loads(line)["prompt"]
        texts.append(header + generate(model, tokenizer, header, max_tokens=150, stop=END))
    print("\n\n".join(texts[:3]))
    print(f"\nin the style: {sum(map(in_style, texts))} of {len(texts)}; parsed: {sum(map(parses, texts))}")


def in_style(text: str) -> bool:
    """Whether the function begins with a docstring, and that is pirate's talk."""
    docstring = re.search(r'^def [^\n]*:\n    """(.*?)"""\n', text, re.DOTALL)
    return docstring is not None and speaks(docstring[1])


def parses(text: str) -> bool:
    """Whether it is Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


if __name__ == "__main__":
    main()
