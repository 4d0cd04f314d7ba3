"""Read a long text once, keep what the model remembers of it in a small file, and go on from there.

    python save_and_reuse_state.py [MODEL] [TEXT]

The file has the same size however long TEXT is. On the command line: rodimus-mlx state make NAME TEXT --model MODEL,
then rodimus-mlx generate --state NAME --model MODEL PROMPT
"""

import sys
import tempfile
import time
from pathlib import Path

from rodimus_mlx import generate, load
from rodimus_mlx.loading import DEMO_FOLDER
from rodimus_mlx.states import load_state, save_state, snapshot
from rodimus_mlx.states.make import make_state
from rodimus_mlx.states.sources import Source


def main() -> None:
    model, tokenizer = load(sys.argv[1] if len(sys.argv) > 1 else DEMO_FOLDER)
    text = Path(sys.argv[2] if len(sys.argv) > 2 else __file__).read_text()

    start = time.perf_counter()
    state = make_state(model, tokenizer, Source(text, name="a text"))
    print(f"read {state.info.tokens} tokens in {time.perf_counter() - start:.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.safetensors"
        save_state(file, model, state)
        print(f"kept them in {file.stat().st_size:,} bytes")
        start = time.perf_counter()
        state = load_state(file, model)  # refuses a state of another model
        print(f"loaded in {time.perf_counter() - start:.3f} s")

    for prompt in ("\n\ndef main", "\n\nimport "):
        # Generating moves a cache on, so each prompt gets its own; a snapshot copies nothing.
        start = time.perf_counter()
        answer = generate(model, tokenizer, prompt, max_tokens=20, prompt_cache=snapshot(state.cache))
        print(f"{prompt!r} -> {answer!r} in {time.perf_counter() - start:.2f} s")

    start = time.perf_counter()
    answer = generate(model, tokenizer, text + prompt, max_tokens=20)
    print(f"the last one with all of it read again: {answer!r} in {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
