"""Speculative decoding on a recurrent model: several tokens are guessed, and read by the model in one call.

A recurrent cache cannot forget its last tokens. So the guesses are read on a snapshot of the cache: where all were
right it takes the cache's place, else the cache stays where it was, and the tokens that are right wait to be read
again together with the next guesses. There is no extra call for going back.

The sampler draws from the model at every position as if there were no guesses, and a guess counts only if it is what
was drawn: what comes out has the model's own distribution, whatever was guessed; with the greedy sampler it is the
greedy text. Guesser and model draw each position with the same random numbers, so that two models that nearly agree
draw the same token nearly always (Gumbel coupling), at any temperature.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
from mlx_lm.sample_utils import greedy_sampler

from .errors import RodimusError
from .states.reading import read_tokens
from .states.snapshot import Cache, snapshot

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]

DRAFT_TOKENS = 4
_MOST_PENDING = 16  # tokens read again with the next guesses; a GPU reads as many at the price of one


class Guesser(Protocol):
    """Says what may come next."""

    def guess(self, tokens: Sequence[int], count: int, choose: Choose) -> list[int]:
        """At most ``count`` tokens that may follow ``tokens``, which begin with those of the call before."""
        ...


class Choose:
    """Next tokens from logits: processors, then the sampler, with random numbers of each position's own."""

    def __init__(self, sampler: Sampler | None, processors: Sequence[LogitsProcessor]) -> None:
        self._sampler = sampler or greedy_sampler
        self._processors = processors
        self._seed = mx.random.randint(0, 2**31 - 1).item() << 32  # type: ignore[operator]  # follows mx.random.seed

    def __call__(self, logits: mx.array, before: Sequence[int], guesses: Sequence[int]) -> tuple[mx.array, mx.array]:
        """Draw a token for each row of logits [n, vocab]: the last follows ``before`` and all guesses, and so back.

        Returns: tokens [n] and log probabilities [n, vocab], both yet to be computed.
        """
        rows = logits.shape[0]
        first = len(before) + len(guesses) + 1 - rows  # tokens before the first row's
        if self._processors:
            tokens = mx.array([*before, *guesses])
            logits = mx.concatenate([self._process(tokens[: first + i], logits[i : i + 1]) for i in range(rows)])
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        if self._sampler is greedy_sampler:
            return greedy_sampler(logprobs), logprobs
        return mx.concatenate([self._draw(logprobs[i : i + 1], first + i) for i in range(rows)]), logprobs

    def _process(self, tokens: mx.array, logits: mx.array) -> mx.array:
        for processor in self._processors:
            logits = processor(tokens, logits)
        return logits

    def _draw(self, logprobs: mx.array, position: int) -> mx.array:
        mx.random.seed(self._seed + position)
        return self._sampler(logprobs)


class DraftModel:
    """Guesses by a smaller model of the same vocabulary."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Cache = model.make_cache()
        self._read = 0  # tokens that the cache has read

    def guess(self, tokens: Sequence[int], count: int, choose: Choose) -> list[int]:
        """As `Guesser`; the cache only ever reads tokens that stay, guesses go to a snapshot."""
        if len(tokens) - self._read > _MOST_PENDING:
            read_tokens(self._model, self._cache, tokens[self._read : -1])
            self._read = len(tokens) - 1
        logits = self._model(mx.array(list(tokens[self._read :]))[None], cache=self._cache)
        self._read = len(tokens)
        branch = snapshot(self._cache)
        guesses: list[int] = []
        while True:
            drawn, _ = choose(logits[0, -1:], tokens, guesses)
            guesses.append(drawn.item())  # type: ignore[arg-type]
            if len(guesses) == count:
                return guesses
            logits = self._model(drawn[None], cache=branch)


class PromptLookup:
    """Guesses that what followed the last few tokens when they came before will follow again; costs nothing."""

    def __init__(self, longest: int = 3) -> None:
        self._sizes = range(longest, 1, -1)  # a single token says too little
        self._ends: dict[tuple[int, ...], int] = {}  # of the last time each few tokens came, but for the very last
        self._seen = 0

    def guess(self, tokens: Sequence[int], count: int, choose: Choose) -> list[int]:
        """As `Guesser`; none where the last two are new."""
        for end in range(max(1, self._seen), len(tokens)):
            for size in self._sizes:
                if size <= end:
                    self._ends[tuple(tokens[end - size : end])] = end
        self._seen = len(tokens)
        for size in self._sizes:
            if found := self._ends.get(tuple(tokens[-size:])) if size <= len(tokens) else None:
                return list(tokens[found : found + count])
        return []


@dataclass
class SpeculativeStats:
    """How it went: calls of the model after the prompt, tokens guessed, guesses that were right."""

    steps: int = 0
    guessed: int = 0
    accepted: int = 0

    @property
    def tokens_per_step(self) -> float:
        """Tokens made by one call of the model; 1 without any right guess."""
        return 1 + self.accepted / self.steps if self.steps else 0.0


def speculative_steps(
    prompt: Sequence[int],
    model: Any,
    guesser: Guesser,
    *,
    max_tokens: int = 256,
    num_draft_tokens: int = DRAFT_TOKENS,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    prompt_cache: Cache | None = None,
    stats: SpeculativeStats | None = None,
) -> Iterator[tuple[int, mx.array, bool]]:
    """Generate tokens with guesses.

    Args:
        prompt: token ids, at least one.
        guesser: a fresh `DraftModel` or `PromptLookup`.
        max_tokens: at most this many; -1 for no limit.
        sampler, logits_processors: as for ``mlx_lm.generate.generate_step``; the default is greedy.
        prompt_cache: to go on from; it stays as it is.
        stats: filled in on the way.

    Yields: token, log probabilities [vocab], and whether the token was guessed.
    """
    choose = Choose(sampler, logits_processors or ())
    stats = stats if stats is not None else SpeculativeStats()
    cache = model.make_cache() if prompt_cache is None else snapshot(prompt_cache)
    tokens = list(prompt)
    read_tokens(model, cache, tokens[:-1])
    pending = tokens[-1:]  # right, but not in the cache yet
    left = max_tokens
    while left != 0:
        wanted = num_draft_tokens if left < 0 else min(num_draft_tokens, left - 1)
        guesses = guesser.guess(tokens, wanted, choose) if wanted else []
        branch = snapshot(cache) if guesses else cache
        logits = model(mx.array(pending + guesses)[None], cache=branch)[0, len(pending) - 1 :]
        drawn, logprobs = choose(logits, tokens, guesses)
        mx.eval(drawn, logprobs)
        new = _right(drawn.tolist(), guesses)  # type: ignore[arg-type]
        stats.steps += 1
        stats.guessed += len(guesses)
        stats.accepted += len(new) - 1
        tokens += new
        if len(new) > len(guesses):
            cache, pending = branch, new[-1:]
        else:
            pending += new
        if len(pending) > _MOST_PENDING:
            read_tokens(model, cache, pending[:-1])
            pending = pending[-1:]
        left -= len(new)
        for i, token in enumerate(new):
            yield token, logprobs[i], i + 1 < len(new)


def _right(drawn: list[int], guesses: list[int]) -> list[int]:
    """The tokens drawn, up to the first that was not guessed."""
    right = 0
    while right < len(guesses) and drawn[right] == guesses[right]:
        right += 1
    return drawn[: right + 1]


def speculative_responses(
    model: Any, tokenizer: Any, prompt: Sequence[int], guesser: Guesser, *, max_tokens: int, **options: Any
) -> Iterator[GenerationResponse]:
    """`speculative_steps` as text, in the form of ``mlx_lm.stream_generate``; the options are its own.

    Raises:
        RodimusError: a draft model of another vocabulary.
    """
    from mlx_lm.generate import GenerationResponse, wired_limit

    detokenizer = tokenizer.detokenizer
    begin = time.perf_counter()
    prompt_tps = 0.0
    with wired_limit(model):
        steps = speculative_steps(prompt, model, guesser, max_tokens=max_tokens, **options)
        for count, (token, logprobs, guessed) in enumerate(steps, 1):
            if count == 1:
                prompt_tps, begin = len(prompt) / (time.perf_counter() - begin), time.perf_counter()
            finish = "stop" if token in tokenizer.eos_token_ids else "length" if count == max_tokens else None
            if finish != "stop":
                detokenizer.add_token(token)
            if finish:
                detokenizer.finalize()
            yield GenerationResponse(
                text=detokenizer.last_segment,
                token=token,
                logprobs=logprobs,
                from_draft=guessed,
                prompt_tokens=len(prompt),
                prompt_tps=prompt_tps,
                generation_tokens=count,
                generation_tps=count / (time.perf_counter() - begin),
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=finish,
            )
            if finish:
                return


def load_draft_model(name: str, model: Any) -> DraftModel:
    """A draft model from a folder or hub id.

    Raises:
        RodimusError: its vocabulary is not the model's.
    """
    from .loading import load_model

    draft, _ = load_model(name)
    ours, theirs = model.args.vocab_size, draft.args.vocab_size
    if ours != theirs:
        raise RodimusError(f"{name} cannot guess for this model: its vocab_size is {theirs}, not {ours}")
    return DraftModel(draft)
