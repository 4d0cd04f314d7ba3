"""Endless input and states: rate and memory while reading, size of the state, time to the first token.

python tests/bench_states.py [--model FOLDER] [--tokens 1000000] [--svg plot.svg]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from helpers import TINY_FOLDER

import rodimus_mlx
from rodimus_mlx.states import State, StateInfo, load_state, save_state, snapshot
from rodimus_mlx.states.reading import read_stream, read_tokens

SMALL, PROMPT = 1000, 8192
CPU_TIME = " of processor time" if mx.default_device() == mx.cpu else ""


class Point(NamedTuple):
    """After so many tokens: tokens/s since the last point, and bytes that MLX holds and that the process has."""

    tokens: int
    rate: float
    held: int
    resident: int


def read(model: Any, cache: Any, count: int, every: int) -> Iterator[Point]:
    """Random tokens through a cache, with a look every so many of them."""
    rng = np.random.default_rng(0)
    done = 0
    while done < count:
        begin = clock()
        pieces = (rng.integers(0, model.args.vocab_size, 1000).tolist() for _ in range(every // 1000))
        read, last = read_stream(model, cache, pieces)
        read_tokens(model, cache, last)
        seconds = clock() - begin
        done += read
        yield Point(done, read / seconds, mx.get_active_memory(), resident())


def clock() -> float:
    """Seconds; on the CPU of processor time, because other programs may share the machine."""
    return time.process_time() if mx.default_device() == mx.cpu else time.perf_counter()


def resident() -> int:
    """Bytes of memory that this process has."""
    text = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True).stdout
    return int(text) * 1024


def first_token_seconds(model: Any, tokens: list[int], cache: Any) -> float:
    """The least of three times from a prompt to its first token."""
    times = []
    for _ in range(3):
        own = snapshot(cache)
        begin = time.perf_counter()
        read_tokens(model, own, tokens[:-1])
        mx.eval(mx.argmax(model(mx.array([tokens[-1:]]), cache=own)[0, -1]))
        times.append(time.perf_counter() - begin)
    return min(times)


def plot(points: list[Point], path: str) -> None:
    """Rate and memory against tokens, as SVG."""
    width, height, left = 640, 180, 70
    right, last = width - 20, points[-1].tokens
    panels = [
        (f"tokens per second{CPU_TIME}", [p.rate for p in points], "#0a5cc2", 0),
        ("MB held by the process", [p.resident / 1e6 for p in points], "#b04a00", height),
    ]
    size = f'viewBox="0 0 {width} {2 * height + 20}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">']
    parts.append(f'<rect width="{width}" height="{2 * height + 20}" fill="white"/>')
    for title, values, color, offset in panels:
        top, base = 1.25 * max(values), offset + height - 30
        parts.append(f'<text x="{left}" y="{offset + 20}">{title}</text>')
        parts.append(f'<path d="M{left} {offset + 30}V{base}H{right}" fill="none" stroke="#888"/>')
        for value in (0, top / 2, top):
            y = base - (height - 60) * value / top
            parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:,.0f}</text>')
        xs = [left + (right - left) * p.tokens / last for p in points]
        line = " ".join(f"{x:.1f},{base - (height - 60) * value / top:.1f}" for x, value in zip(xs, values))
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{line}"/>')
    for share in (0, 0.5, 1):
        anchor = {0: "start", 0.5: "middle", 1: "end"}[share]
        place = f'x="{left + (right - left) * share:.1f}" y="{2 * height - 10}" text-anchor="{anchor}"'
        parts.append(f"<text {place}>{last * share:,.0f} tokens</text>")
    Path(path).write_text("\n".join([*parts, "</svg>\n"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_FOLDER))
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--svg")
    given = parser.parse_args()
    model, _ = rodimus_mlx.load_model(given.model)

    with tempfile.TemporaryDirectory() as folder:
        small = model.make_cache()
        tokens = np.random.default_rng(1).integers(0, model.args.vocab_size, PROMPT).tolist()
        read_tokens(model, small, tokens[:SMALL])
        save_state(f"{folder}/small.safetensors", model, State(small, StateInfo(SMALL)))
        points, large = [], model.make_cache()
        for point in read(model, large, given.tokens, max(1000, given.tokens // 50 // 1000 * 1000)):
            points.append(point)
            if len(points) % 5 == 0:
                held = f"MLX {point.held / 1e6:.1f} MB, process {point.resident / 1e6:.1f} MB"
                print(f"{point.tokens:>10,} tokens  {point.rate:10.1f} tokens/s{CPU_TIME}  {held}", flush=True)
        save_state(f"{folder}/large.safetensors", model, State(large, StateInfo(points[-1].tokens)))
        for name, count in (("small", SMALL), ("large", points[-1].tokens)):
            print(f"state after {count:,} tokens: {Path(folder, name + '.safetensors').stat().st_size:,} bytes")

        read_tokens(model, prompt_cache := model.make_cache(), tokens)
        save_state(f"{folder}/prompt.safetensors", model, State(prompt_cache, StateInfo(PROMPT)))
        begin = time.perf_counter()
        state = load_state(f"{folder}/prompt.safetensors", model)
        loading = time.perf_counter() - begin
        whole = first_token_seconds(model, tokens, model.make_cache())
        after = first_token_seconds(model, tokens[:8], state.cache)
        print(f"first token after {PROMPT} tokens: {whole * 1e3:.1f} ms read anew")
        print(f"8 more tokens after a state of them: {after * 1e3:.2f} ms, 1/{whole / after:.0f} of it")
        print(f"with reading the file: {(after + loading) * 1e3:.2f} ms, 1/{whole / (after + loading):.0f} of it")
    if given.svg:
        plot(points, given.svg)


if __name__ == "__main__":
    main()
