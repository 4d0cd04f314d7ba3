"""Peak memory of generating after prompts of two lengths: it must not grow with either.

    python tests/bench_memory.py [--tokens 2000 20000] [--prefill-step-size 512] [--model DIR]

Prompt and answer have --tokens tokens each. Prints the peaks and their ratio. MLX starts operations before others have
ended, so the peak of a step varies by some percent with the machine's mood: the shorter text is read as often as makes
as many steps as the longer has.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import mlx.core as mx
from helpers import GOLDENS, random_tokens
from mlx_lm.generate import generate_step

from rodimus_mlx.loading import load_model


def peak_memory(model: Any, prompt: int, answer: int, prefill_step_size: int) -> int:
    """Bytes in MLX's arrays at the highest moment of generating `answer` tokens after `prompt` tokens."""
    tokens = random_tokens(model, 1, prompt)[0].astype(mx.int32)
    mx.eval(tokens)
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    steps = generate_step(tokens, model, max_tokens=answer, prefill_step_size=prefill_step_size)
    generated = sum(1 for _ in steps)
    assert generated == answer
    return mx.get_peak_memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs=2, default=[2000, 20000])
    parser.add_argument("--prefill-step-size", type=int, default=512)
    parser.add_argument("--model", type=Path, default=GOLDENS / "plus_bin")
    arguments = parser.parse_args()
    model, _ = load_model(arguments.model)
    peaks = []
    for length in arguments.tokens:
        times = max(arguments.tokens) // length
        peaks.append(max(peak_memory(model, length, length, arguments.prefill_step_size) for _ in range(times)))
        print(f"{length} tokens after {length}: peak {peaks[-1] / 1e6:.2f} MB")
    print(f"ratio {peaks[1] / peaks[0]:.4f}")


if __name__ == "__main__":
    main()
