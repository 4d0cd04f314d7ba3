"""Perplexity over a text, in all and by how far into it a token stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import RodimusError
from .text import Rows, Window, batches, windows

EDGES = (0, 256, 1024, 4096, 16384, 65536, 262144)  # buckets of positions: the tokens that a model has seen before
LOGIT_BYTES = 1 << 28  # of the logits of one step, in float32
LARGEST_STEP = 1024  # tokens

Progress = Callable[[int, int], None]  # called with (positions done, positions in all) after every step


@dataclass
class Tally:
    """Sums over tokens, for each bucket of positions."""

    names: tuple[str, ...] = ("loss", "squares")
    sums: np.ndarray = field(init=False)  # [names + 1, buckets]; the last: tokens

    def __post_init__(self) -> None:
        self.sums = np.zeros((len(self.names) + 1, len(EDGES)))

    def add(self, start: int, counts: np.ndarray, **values: np.ndarray) -> None:
        """Add values [R, L] of the positions from ``start`` on, where ``counts`` [R, L] says so."""
        bucket = np.searchsorted(EDGES, np.arange(start, start + counts.shape[1]), side="right") - 1
        for row, name in enumerate(self.names):
            self.sums[row] += np.bincount(
                bucket, np.where(counts, values[name], 0).sum(0, dtype=np.float64), len(EDGES)
            )
        self.sums[-1] += np.bincount(bucket, counts.sum(0), len(EDGES))

    def mean(self, name: str, bucket: int | None = None) -> float:
        """A sum's mean, over all tokens or over a bucket's."""
        rows = self.sums[self.names.index(name)], self.sums[-1]
        total, count = (row.sum() if bucket is None else row[bucket] for row in rows)
        return float(total / count)

    @property
    def tokens(self) -> int:
        """Tokens counted."""
        return int(self.sums[-1].sum())

    def buckets(self) -> list[int]:
        """The buckets that have tokens."""
        return [int(i) for i in np.flatnonzero(self.sums[-1])]


def perplexity(
    model: Any,
    documents: Sequence[np.ndarray],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """exp of the mean cross entropy of every token but a document's first.

    A model reads each window from an empty state, step by step, so that neither the window's length nor the batch
    decides how much memory logits take.

    Args:
        documents: arrays of tokens, each read for itself.
        window: tokens read at most from an empty state; None for whole documents.
        stride: tokens between two windows' starts; None for the window itself. A smaller one gives every token at
            least ``window - stride`` tokens before it.
        batch: windows read side by side.

    Returns:
        ``tokens``, ``loss`` (nats a token), ``perplexity``, ``standard_error`` (of the perplexity, as if tokens
        were independent), ``window``, ``stride``, and ``buckets``: the same by position, ``from`` and ``to`` in
        tokens seen before.

    Raises:
        RodimusError: a token is not in the vocabulary, window, stride or batch make no sense, or the model's
            predictions are not finite.
    """
    cut, window, stride = checked(model, documents, window, stride, batch)
    tally = Tally()
    for rows, steps in planned(cut, batch, model.args.vocab_size, progress):
        cache = model.make_cache()
        for start, stop in steps:
            losses = _losses(model(mx.array(rows.tokens[:, start:stop]), cache=cache), rows.targets[:, start:stop])
            tally.add(start, rows.counts[:, start:stop], loss=losses, squares=losses.astype(np.float64) ** 2)
    return {**summary(tally), "window": window, "stride": stride, "buckets": by_position(tally)}


def checked(
    model: Any, documents: Sequence[np.ndarray], window: int | None, stride: int | None, batch: int
) -> tuple[list[Window], int, int]:
    """The windows to read, with the window's length and the stride that were meant."""
    largest = max(int(document.max()) for document in documents)
    if largest >= model.args.vocab_size:
        raise RodimusError(f"token {largest} is not in the model's vocabulary of {model.args.vocab_size}")
    longest = max(len(document) - 1 for document in documents)
    window = min(longest, window or longest)
    stride = stride or window
    if not 1 <= stride <= window:
        raise RodimusError(f"the stride must be from 1 to the window, {window} tokens, not {stride}")
    if batch < 1:
        raise RodimusError(f"the batch must be at least 1, not {batch}")
    return windows(documents, window, stride), window, stride


def planned(
    cut: Sequence[Window], batch: int, vocab_size: int, progress: Progress | None, stops: Sequence[int] = ()
) -> Iterator[tuple[Rows, Iterator[tuple[int, int]]]]:
    """Batches, each with the steps (start, stop) to read it in; a step ends at each of ``stops``."""
    done, total = 0, sum(rows.tokens.size for rows in batches(cut, batch))

    def steps(rows: Rows) -> Iterator[tuple[int, int]]:
        nonlocal done
        count, length = rows.tokens.shape
        most = max(1, min(LARGEST_STEP, LOGIT_BYTES // (4 * vocab_size * count)))
        ends = sorted({*range(most, length, most), *(stop for stop in stops if stop < length), length})
        for start, stop in zip([0, *ends], ends):
            yield start, stop
            done += (stop - start) * count
            if progress is not None:
                progress(done, total)

    for rows in batches(cut, batch):
        yield rows, steps(rows)


def summary(tally: Tally) -> dict[str, Any]:
    """The whole text's figures."""
    loss = tally.mean("loss")
    if not math.isfinite(loss):
        raise RodimusError("the model's predictions are not finite: its weights are damaged, or its dtype is too small")
    variance = max(tally.mean("squares") - loss**2, 0.0)
    error = exp(loss) * math.sqrt(variance / tally.tokens)
    return {"tokens": tally.tokens, "loss": loss, "perplexity": exp(loss), "standard_error": error}


def by_position(tally: Tally) -> list[dict[str, Any]]:
    """The figures of each bucket of positions."""
    return [
        {
            **bounds(bucket),
            "tokens": int(tally.sums[-1][bucket]),
            "loss": tally.mean("loss", bucket),
            "perplexity": exp(tally.mean("loss", bucket)),
        }
        for bucket in tally.buckets()
    ]


def bounds(bucket: int) -> dict[str, int | None]:
    """Where a bucket begins and ends, in tokens seen before; None for no end."""
    return {"from": EDGES[bucket], "to": EDGES[bucket + 1] if bucket + 1 < len(EDGES) else None}


def exp(loss: float) -> float:
    """The perplexity of a loss; infinite where it is beyond numbers."""
    return math.exp(loss) if loss < 700 else math.inf


def _losses(logits: mx.array, targets: np.ndarray) -> np.ndarray:
    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, mx.array(targets)[..., None], axis=-1).squeeze(-1)
    return np.array(mx.logsumexp(logits, axis=-1) - chosen)
