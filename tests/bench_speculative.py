"""Speculative against plain greedy decoding: is it the same, and how fast?

    python tests/bench_speculative.py [--model FOLDER] [--draft-model FOLDER]
    python tests/bench_speculative.py --shape 1.6b [--layers 24] [--draft-layers 4]

With --model, prompts are pieces of this package's own code. With --shape, weights are random float32 of a released
checkpoint's widths, and prompts are random phrases that come again; the draft model is its first blocks with the same
embeddings, or with --draft-shape another shape with random weights.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from helpers import TINY_FOLDER
from mlx.utils import tree_map
from mlx_lm.generate import generate_step

import rodimus_mlx
from rodimus_mlx.bench.models import SHAPES
from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.loading import load_model
from rodimus_mlx.model import Model
from rodimus_mlx.speculative import DraftModel, PromptLookup, SpeculativeStats, speculative_steps


def random_shape(shape: str, layers: int | None) -> Model:
    """A released checkpoint's sizes with random weights."""
    config = SHAPES[shape]
    model = Model(RodimusConfig.from_dict({**config, "n_layer": layers or config["n_layer"]}))
    model.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.02 + (p.ndim == 1), model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def first_blocks(model: Model, count: int) -> Model:
    """A model of the first blocks, sharing the weights."""
    draft = Model(RodimusConfig.from_dict({**model.args.to_dict(), "n_layer": count}))
    draft.model.layers = model.model.layers[:count]
    draft.model.embeddings, draft.model.norm_f = model.model.embeddings, model.model.norm_f
    if "lm_head" in model:
        draft.lm_head = model.lm_head
    draft.eval()
    return draft


def prompts(vocab_size: int, count: int) -> list[list[int]]:
    """Tokens in which phrases come again."""
    rng = np.random.default_rng(0)
    phrases = [rng.integers(0, vocab_size, 6).tolist() for _ in range(4)]
    return [
        [token for pick in rng.integers(0, 4, 5) for token in phrases[pick]] + [i % vocab_size] for i in range(count)
    ]


def code_prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Pieces of 96 tokens of this package's code."""
    files = sorted(Path(rodimus_mlx.__file__).parent.rglob("*.py"))
    tokens = tokenizer.encode("".join(file.read_text() for file in files), add_special_tokens=False)
    return [tokens[begin : begin + 96] for begin in np.linspace(0, len(tokens) - 96, count).astype(int).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_FOLDER))
    parser.add_argument("--draft-model")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--draft-shape", choices=SHAPES)
    parser.add_argument("--draft-layers", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--draft-tokens", type=int, default=4)
    given = parser.parse_args()

    model: Any
    if given.shape:
        model = random_shape(given.shape, given.layers)
        draft = random_shape(given.draft_shape, given.draft_layers) if given.draft_shape else None
        draft = draft or first_blocks(model, min(given.draft_layers, len(model.layers) - 1))
    else:
        model, tokenizer = rodimus_mlx.load(given.model)
        draft = load_model(given.draft_model)[0] if given.draft_model else first_blocks(model, 1)
    name = f"{given.shape}, {len(model.layers)} blocks" if given.shape else Path(given.model).name
    print(f"{name}; draft model of {len(draft.layers)} blocks; {given.prompts} prompts, {given.tokens} tokens each")
    asked = prompts(model.args.vocab_size, given.prompts) if given.shape else code_prompts(tokenizer, given.prompts)
    report(model, asked, {"lookup": PromptLookup, "draft model": lambda: DraftModel(draft)}, given)


def report(model: Any, asked: list[list[int]], guessers: dict[str, Any], given: argparse.Namespace) -> None:
    """Measure and print; plain and speculative decoding by turns, prompt by prompt."""
    seconds = dict.fromkeys(["plain", *guessers], 0.0)
    stats = {name: SpeculativeStats() for name in guessers}
    same = dict.fromkeys(guessers, 0)
    for prompt in asked:
        begin = time.perf_counter()
        plain = [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=given.tokens)]
        seconds["plain"] += time.perf_counter() - begin
        for name, make in guessers.items():
            begin = time.perf_counter()
            options = {"max_tokens": given.tokens, "num_draft_tokens": given.draft_tokens, "stats": stats[name]}
            found = [token for token, *_ in speculative_steps(prompt, model, make(), **options)]
            seconds[name] += time.perf_counter() - begin
            same[name] += found == plain
    made = given.prompts * given.tokens
    print(f"  {'plain':12} {made / seconds['plain']:8.2f} tokens/s")
    for name, each in stats.items():
        accepted = each.accepted / max(each.guessed, 1)
        print(
            f"  {name:12} {made / seconds[name]:8.2f} tokens/s, {each.tokens_per_step:.2f} a step, "
            f"{accepted:.0%} of the guesses right, {same[name]} of {given.prompts} the same as plain"
        )


if __name__ == "__main__":
    main()
