"""Let a model write what is missing between two pieces of code.

    python fill_in_the_middle.py [MODEL]

MODEL must know how: the released coders do; the bundled model knows the marks but fills poorly. On the command line:
rodimus-mlx generate --fim-prefix 'def mean(numbers):' --fim-suffix '    return total / count'
"""

import sys

from rodimus_mlx import load, stream_generate
from rodimus_mlx.fim import fim_prompt
from rodimus_mlx.loading import DEMO_FOLDER

BEFORE = '''def mean(numbers):
    """The arithmetic mean of some numbers."""
'''
AFTER = """
    return total / count
"""


def main() -> None:
    model, tokenizer = load(sys.argv[1] if len(sys.argv) > 1 else DEMO_FOLDER)
    prompt = fim_prompt(tokenizer, BEFORE, AFTER)  # token ids: prompts may be those too
    print(BEFORE, end="")
    for piece in stream_generate(model, tokenizer, prompt, max_tokens=60):
        print(piece.text, end="", flush=True)
    print(AFTER)


if __name__ == "__main__":
    main()
