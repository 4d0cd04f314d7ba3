"""What a token costs after a long text: time and memory of Rodimus+, Rodimus and a Transformer of equal size.

    python context.py OUT.json [--contexts 1024 4096 16384 65536] [--tokens 20] [--rounds 5]

The models have random weights, which change neither speed nor memory. Rodimus and Rodimus+ read as many random tokens
as the context has; the Transformer, whose reading takes a time quadratic in them, gets random keys and values instead.
Each then decodes --tokens more, one by one, by turns in --rounds. Given is the time that the fastest tenth of them
took at most: what else the machine does adds to the others. The file is written anew after every context; where it
already has the same contexts, the smaller times stay, so that a busy machine is measured by running again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import models
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import KVCache

HERE = Path(__file__).parent
NAMES = {"plus": "Rodimus+", "rodimus": "Rodimus", "transformer": "Transformer"}
STEP = 512  # tokens read at a time
WARM_UP = 3  # decoded tokens that are not counted


def main() -> None:
    """Measure, write JSON, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="file to write, JSON")
    usual = [1024 << i for i in range(7)]
    parser.add_argument("--contexts", type=int, nargs="+", default=usual, help="tokens read before decoding")
    parser.add_argument("--tokens", type=int, default=20, help="decoded and timed in a round")
    parser.add_argument("--rounds", type=int, default=5, help="at each context")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of weights and caches")
    parser.add_argument("--configs", type=Path, default=HERE, help="folder of config_*.json")
    args = parser.parse_args()

    contexts = sorted(args.contexts)
    before = earlier(args.out, contexts, args.dtype)
    rng = np.random.default_rng(0)
    result: dict[str, Any] = {"dtype": args.dtype, "contexts": [], "models": {}}
    running = {}
    for name, title in NAMES.items():
        model = models.new(args.configs / f"config_{name}.json")
        model.update(tree_map(lambda p: p.astype(getattr(mx, args.dtype)), model.parameters()))
        model.eval()
        result["models"][title] = {"parameters": models.parameters(model), "ms": [], "bytes": []}
        running[title] = (model, model.make_cache())
    read = 0
    for number, context in enumerate(contexts):
        for title, (model, cache) in running.items():
            consume(model, cache, rng, context - read)
            result["models"][title]["bytes"].append(cache_bytes(cache))
        times: dict[str, list[float]] = {title: [] for title in running}
        for _ in range(args.rounds):
            for title, (model, cache) in running.items():
                times[title] += decode(model, cache, rng, args.tokens)
        read = context + args.rounds * (WARM_UP + args.tokens)
        for title, found in result["models"].items():
            fastest = 1e3 * float(np.quantile(times[title], 0.1))
            note = f"{title} after {context:,}: {fastest:.1f} ms a token (median {1e3 * np.median(times[title]):.1f})"
            found["ms"].append(round(min(fastest, *(run[title]["ms"][number] for run in before), math.inf), 2))
            print(note, file=sys.stderr, flush=True)
        result["contexts"].append(context)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def earlier(file: Path, contexts: list[int], dtype: str) -> list[dict[str, Any]]:
    """What the file has of an earlier run, if that was alike."""
    if not file.exists():
        return []
    result = json.loads(file.read_text())
    return [result["models"]] if (result["contexts"], result["dtype"]) == (contexts, dtype) else []


def consume(model: Any, cache: list[Any], rng: np.random.Generator, count: int) -> None:
    """Read so many random tokens, without a head, as prompts are read; or fill a Transformer's cache."""
    if isinstance(cache[0], KVCache):
        attention = model.layers[0].self_attn
        width = model.args.hidden_size // model.args.num_attention_heads
        for layer in cache:
            keys, values = mx.random.normal((2, 1, attention.n_kv_heads, count, width), model.model.norm_f.weight.dtype)
            layer.update_and_fetch(keys, values)
        mx.eval([layer.state for layer in cache])
        return
    for start in range(0, count, STEP):
        model.model(tokens(rng, model, min(STEP, count - start)), cache)
        mx.eval([layer.state for layer in cache])


def decode(model: Any, cache: list[Any], rng: np.random.Generator, count: int) -> list[float]:
    """Seconds of each of so many tokens."""
    seconds = []
    for _ in range(WARM_UP + count):
        token = tokens(rng, model, 1)
        start = time.perf_counter()
        mx.eval(model(token, cache).argmax(axis=-1), [layer.state for layer in cache])
        seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP:]


def tokens(rng: np.random.Generator, model: Any, count: int) -> mx.array:
    """[1, count] random tokens."""
    return mx.array(rng.integers(0, model.args.vocab_size, (1, count)))


def cache_bytes(cache: list[Any]) -> int:
    """What the caches hold of the text, without the room that a growing one has ahead."""
    held = [layer.keys_and_values() if isinstance(layer, KVCache) else layer.state for layer in cache]
    return sum(x.nbytes for _, x in tree_flatten(held) if isinstance(x, mx.array))


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    contexts = [f"{n:,}" for n in result["contexts"]]
    lines = ["| after tokens | " + " | ".join(contexts) + " |", "|---" * (len(contexts) + 1) + "|"]
    for title, found in result["models"].items():
        lines.append(f"| {title}, ms a token | " + " | ".join(f"{ms:.1f}" for ms in found["ms"]) + " |")
    for title, found in result["models"].items():
        lines.append(f"| {title}, MB remembered | " + " | ".join(f"{n / 1e6:.1f}" for n in found["bytes"]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
