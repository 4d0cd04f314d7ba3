"""Rounds of prefill and decode, by turns for each model, because machines are noisy: medians and spreads."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import wired_limit
from mlx_lm.models.cache import ArraysCache, CacheList, make_prompt_cache

from .launches import arrays, step_launches
from .models import Subject, parameter_bytes

PREFILL_STEP = 2048  # tokens at a time, as mlx-lm reads prompts
WARM_UP = 4  # decode steps before the clock starts
COPY_BYTES = 256 << 20  # far more than any cache between a processor and its memory
COPIES = 8

Progress = Callable[[int, int], None]


@dataclass
class Measured:
    """What the rounds of one model at one prompt length gave.

    prefill, decode: tokens/s of each round; peak: the most bytes MLX held in each, other models' weights apart.
    launches and bytes_touched: of one decode step at that length; a CPU launches nothing: None.
    """

    name: str
    prompt_tokens: int
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    launches: int | None = None
    bytes_touched: int = 0

    def bandwidth_share(self, bandwidth: float) -> float:
        """Of the memory's bandwidth, in bytes/s, what the median decode step uses."""
        return self.bytes_touched * statistics.median(self.decode) / bandwidth


def measure(
    subjects: Sequence[Subject],
    prompt_lengths: Sequence[int],
    *,
    tokens: int = 64,
    rounds: int = 5,
    prefill_step: int = PREFILL_STEP,
    progress: Progress | None = None,
) -> list[Measured]:
    """Measure every model at every length, the models by turns in each round.

    The first pass over models and lengths, in which kernels are compiled, is not counted.

    Args:
        subjects: evaluated models, all in memory at once.
        prompt_lengths: tokens read before decoding.
        tokens: decoded in each round, greedily.
        prefill_step: prompt tokens read at a time.
        progress: called with the passes done and their number.
    """
    found = [(subject, Measured(subject.name, length)) for length in prompt_lengths for subject in subjects]
    passes = (rounds + 1) * len(found)
    models: Any = [subject.model for subject in subjects]
    with contextlib.redirect_stdout(sys.stderr), wired_limit(models):  # it may print
        for done in range(passes):
            subject, result = found[done % len(found)]
            _pass(subject, result, tokens, prefill_step, counted=done >= len(found))
            if progress:
                progress(done + 1, passes)
    return [result for _, result in found]


def _pass(subject: Subject, result: Measured, tokens: int, prefill_step: int, counted: bool) -> None:
    model = subject.model
    vocabulary = model(mx.zeros((1, 1), mx.int32)).shape[-1]
    prompt = mx.random.randint(0, vocabulary, (1, result.prompt_tokens))
    mx.eval(prompt)
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    others = mx.get_active_memory() - subject.weight_bytes
    cache = make_prompt_cache(model)
    token, prefill = _prefill(model, prompt, cache, prefill_step)
    token, _ = _decode(model, token, cache, WARM_UP)
    token, decode = _decode(model, token, cache, tokens)
    if counted:
        result.prefill.append(prefill)
        result.decode.append(decode)
        result.peak.append(mx.get_peak_memory() - others)
    else:
        mx.eval([layer.state for layer in cache])
        result.bytes_touched = bytes_touched(model, cache)
        if mx.default_device() == mx.gpu:
            result.launches = step_launches(model, token, cache).total()


def _prefill(model: Any, prompt: mx.array, cache: list[Any], step: int) -> tuple[mx.array, float]:
    """The prompt [1, T] to its next token [1, 1], and tokens/s; logits of the last token alone, as in mlx-lm."""
    begin = time.perf_counter()
    last = prompt.shape[1] - 1
    for start in range(0, last, step):
        model(prompt[:, start : min(start + step, last)], cache=cache)
        mx.eval([layer.state for layer in cache])
    token = _next(model, prompt[:, last:], cache)
    mx.eval(token)
    return token, prompt.shape[1] / (time.perf_counter() - begin)


def _decode(model: Any, token: mx.array, cache: list[Any], count: int) -> tuple[mx.array, float]:
    """The token [1, 1] after `count` more, and tokens/s; each step is built while the last one runs, as in mlx-lm."""
    begin = time.perf_counter()
    for _ in range(count):
        following = _next(model, token, cache)
        mx.async_eval(following)
        mx.eval(token)
        token = following
    mx.eval(token)
    return token, count / (time.perf_counter() - begin)


def _next(model: Any, token: mx.array, cache: list[Any]) -> mx.array:
    return mx.argmax(model(token, cache=cache), axis=-1)


def bytes_touched(model: Any, cache: Iterable[Any]) -> int:
    """Bytes that a decode step must read or write: weights, keys and values, and states, which go both ways.

    Of an embedding that is not the output head too, one row is nothing. For mixtures of experts it is too much: not
    all experts are read.
    """
    weights = parameter_bytes(model)
    if "lm_head" in model:
        embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.QuantizedEmbedding)]
        weights -= sum(map(parameter_bytes, embeddings))
    return weights + sum(map(_memory_bytes, cache))


def _memory_bytes(cache: Any) -> int:
    if isinstance(cache, CacheList):
        return sum(map(_memory_bytes, cache.caches))
    held = sum(x.nbytes for x in arrays([cache.state]))
    return 2 * held if isinstance(cache, ArraysCache) else held


def memory_bandwidth() -> float:
    """Bytes/s, read and written, of the default device's memory: the best of some large copies."""
    x = mx.zeros((COPY_BYTES // 4,), mx.float32)
    mx.eval(x)
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        y = x
        for _ in range(COPIES):
            y = -y
        mx.eval(y)
        best = max(best, 2 * COPY_BYTES * COPIES / (time.perf_counter() - begin))
    return best
