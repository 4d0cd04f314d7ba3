"""Write text with a model, token by token.

    python generate_text.py [MODEL] [PROMPT]

MODEL is a folder or a Hugging Face id; without one the bundled model writes.
"""

import sys

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

from rodimus_mlx import load, stream_generate
from rodimus_mlx.loading import DEMO_FOLDER


def main() -> None:
    model_name = sys.argv[1] if len(sys.argv) > 1 else DEMO_FOLDER
    prompt = sys.argv[2] if len(sys.argv) > 2 else "def fibonacci(n):\n"
    model, tokenizer = load(model_name)

    # Greedy: always the likeliest token. `piece.text` may be empty where a character takes several tokens.
    print(prompt, end="")
    for piece in stream_generate(model, tokenizer, prompt, max_tokens=60):
        print(piece.text, end="", flush=True)
    print(f"\n[{piece.finish_reason} after {piece.generation_tokens} tokens, {piece.generation_tps:.0f} a second]\n")

    # Sampled, repeatable by the seed, up to the end of the first paragraph.
    mx.random.seed(1)
    print(prompt, end="")
    for piece in stream_generate(
        model, tokenizer, prompt, max_tokens=60, stop=["\n\n"], sampler=make_sampler(temp=0.8, top_p=0.95)
    ):
        print(piece.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
