"""Samples to batches: which samples share a row, in which order rows come, and the arrays of a batch.

All of it follows from the samples, the settings and the step's number, so a run can be taken up at any step.
"""

from __future__ import annotations

import functools
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .data import Sample

GROUP = 32  # batches whose rows are sorted by length together, so that a batch pads little


class Batch(NamedTuple):
    """A batch of R rows, padded on the right to L positions."""

    tokens: np.ndarray  # [R, L] int32
    targets: np.ndarray  # [R, L] int32
    weights: np.ndarray  # [R, L] float32: 1 where the target counts
    documents: np.ndarray | None  # [R, L] int32, the samples that share a row numbered; None: one sample a row


def pack(samples: Sequence[Sample], seq_len: int) -> list[tuple[int, ...]]:
    """Rows of samples, by number, that fill ``seq_len`` positions as well as best fit in falling length does."""
    rows: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (free positions, row), sorted
    for i in sorted(range(len(samples)), key=lambda i: -samples[i].length):
        length = samples[i].length
        place = bisect_left(space, (length, -1))
        if place < len(space):
            free, row = space.pop(place)
            rows[row].append(i)
        else:
            free, row = seq_len, len(rows)
            rows.append([i])
        if free - length > 0:
            insort(space, (free - length, row))
    return [tuple(row) for row in rows]


class Plan:
    """The batches of a training run, by number.

    Each epoch takes every row once, in an order of its own; its last batch is filled up from the epoch's start.
    """

    def __init__(self, samples: Sequence[Sample], *, rows_in_batch: int, seq_len: int, packing: bool, seed: int):
        self.samples, self.rows_in_batch, self.seed = samples, rows_in_batch, seed
        self.seq_len = seq_len if packing else None
        self.rows = pack(samples, seq_len) if packing else [(i,) for i in range(len(samples))]
        self.lengths = np.array([sum(samples[i].length for i in row) for row in self.rows])
        self.learned = np.array([sum(int(samples[i].learn.sum()) for i in row) for row in self.rows])

    @property
    def batches_in_epoch(self) -> int:
        """How many batches an epoch takes."""
        return -(-len(self.rows) // self.rows_in_batch)

    @property
    def longest_row(self) -> int:
        """Positions of the longest row, padding included."""
        return self.seq_len or rounded(int(self.lengths.max()))

    def rows_of(self, number: int) -> list[int]:
        """The rows of a batch."""
        epoch, place = divmod(number, self.batches_in_epoch)
        return self._epoch(epoch)[place]

    def batch(self, rows: Sequence[int]) -> Batch:
        """The arrays of some rows."""
        return assemble(self.samples, [self.rows[row] for row in rows], self.seq_len)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a plan lives as long as the run
    def _epoch(self, epoch: int) -> list[list[int]]:
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.rows))
        size = self.rows_in_batch
        if self.seq_len is None:
            groups = [order[i : i + GROUP * size] for i in range(0, len(order), GROUP * size)]
            order = np.concatenate([group[np.argsort(self.lengths[group], kind="stable")] for group in groups])
        batches = [order[i : i + size].tolist() for i in range(0, len(order), size)]
        batches[-1] += np.resize(order, size - len(batches[-1])).tolist()
        return [batches[i] for i in random.permutation(len(batches))]


def in_order(samples: Sequence[Sample], *, rows_in_batch: int, seq_len: int, packing: bool) -> Iterator[Batch]:
    """All samples once, for evaluation; the last batch may be smaller."""
    rows = pack(samples, seq_len) if packing else [(i,) for i in range(len(samples))]
    for i in range(0, len(rows), rows_in_batch):
        yield assemble(samples, rows[i : i + rows_in_batch], seq_len if packing else None)


def assemble(samples: Sequence[Sample], rows: Sequence[Sequence[int]], seq_len: int | None) -> Batch:
    """The arrays of rows, each of the given samples; ``seq_len`` is their length where samples are packed."""
    longest = max(sum(samples[i].length for i in row) for row in rows)
    shape = (len(rows), seq_len or rounded(longest))
    tokens, targets, documents = (np.zeros(shape, np.int32) for _ in range(3))
    weights = np.zeros(shape, np.float32)
    for r, row in enumerate(rows):
        begin = 0
        for number, i in enumerate(row):
            each = samples[i]
            end = begin + each.length
            tokens[r, begin:end], targets[r, begin:end] = each.tokens[:-1], each.targets
            weights[r, begin:end] = each.learn
            documents[r, begin:end] = number
            begin = end
        documents[r, begin:] = len(row)  # padding: a document of its own
    return Batch(tokens, targets, weights, documents if seq_len else None)


def cut(batch: Batch, rows: slice = slice(None), columns: slice = slice(None)) -> Batch:
    """Some of a batch's rows and positions."""
    tokens, targets, weights, documents = (None if x is None else x[rows, columns] for x in batch)
    assert tokens is not None and targets is not None and weights is not None
    return Batch(tokens, targets, weights, documents)


def rounded(length: int) -> int:
    """Up to a multiple of 64, from 512 on of 256: few lengths, since each one is compiled for."""
    step = 64 if length <= 512 else 256
    return -(-length // step) * step
