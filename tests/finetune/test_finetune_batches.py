"""Rows and batches: nothing lost, nothing twice, and the same at every start."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training import random_samples

from rodimus_mlx.finetune.batches import Plan, assemble, in_order, pack, rounded
from rodimus_mlx.finetune.data import sample

lengths_of_samples = st.lists(st.integers(1, 50), min_size=1, max_size=60)


def of_lengths(lengths):
    return [sample(np.arange(length + 1)) for length in lengths]


@given(lengths=lengths_of_samples)
def test_packing_takes_every_sample_once_and_overfills_no_row(lengths):
    rows = pack(of_lengths(lengths), 50)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 50 for row in rows)


def test_packing_wastes_little():
    lengths = np.random.default_rng(0).integers(1, 200, 500).tolist()
    rows = pack(of_lengths(lengths), 256)
    assert sum(lengths) / (len(rows) * 256) > 0.97


@given(lengths=lengths_of_samples, size=st.integers(1, 5), packing=st.booleans())
def test_an_epoch_takes_every_row(lengths, size, packing):
    plan = Plan(of_lengths(lengths), rows_in_batch=size, seq_len=50, packing=packing, seed=3)
    for epoch in (0, 1):
        first = epoch * plan.batches_in_epoch
        batches = [plan.rows_of(first + i) for i in range(plan.batches_in_epoch)]
        assert all(len(rows) == size for rows in batches)
        taken = [row for rows in batches for row in rows]
        assert set(taken) == set(range(len(plan.rows)))
        assert len(taken) - len(plan.rows) < size  # the last batch is filled up


def test_batches_follow_from_their_number_alone():
    samples = random_samples(30)
    choices = {"rows_in_batch": 4, "seq_len": 40, "packing": False}
    plan, again = (Plan(samples, **choices, seed=1) for _ in range(2))
    numbers = [5, 0, 17, 23]
    assert [plan.rows_of(i) for i in numbers] == [again.rows_of(i) for i in reversed(numbers)][::-1]
    other = Plan(samples, **choices, seed=2)
    assert [plan.rows_of(i) for i in range(8)] != [other.rows_of(i) for i in range(8)]
    assert plan.rows_of(0) != plan.rows_of(plan.batches_in_epoch)  # epochs differ


def test_rows_of_similar_length_come_together():
    samples = random_samples(256, longest=40)
    plan = Plan(samples, rows_in_batch=4, seq_len=40, packing=False, seed=0)
    spread = [np.ptp(plan.lengths[plan.rows_of(i)]) for i in range(plan.batches_in_epoch)]
    assert np.mean(spread) < 3  # of lengths from 3 to 40


def test_the_arrays_of_a_packed_row():
    samples = [sample([5, 6, 7, 8], learn_from=3), sample([9, 10, 11])]
    batch = assemble(samples, [(0, 1)], seq_len=8)
    assert batch.tokens.tolist() == [[5, 6, 7, 9, 10, 0, 0, 0]]
    assert batch.targets.tolist() == [[6, 7, 8, 10, 11, 0, 0, 0]]
    assert batch.weights.tolist() == [[0, 0, 1, 1, 1, 0, 0, 0]]
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]


def test_rows_that_are_not_packed_are_padded_to_few_lengths():
    batch = assemble(of_lengths([3, 70]), [(0,), (1,)], seq_len=None)
    assert batch.tokens.shape == (2, 128) and batch.documents is None
    assert batch.weights.sum() == 73
    assert [rounded(n) for n in (1, 64, 65, 512, 513, 2048)] == [64, 64, 128, 512, 768, 2048]


@pytest.mark.parametrize("packing", [False, True], ids=["alone", "packed"])
def test_evaluation_takes_every_target_once(packing):
    samples = random_samples(11)
    batches = list(in_order(samples, rows_in_batch=4, seq_len=64, packing=packing))
    assert sum(batch.weights.sum() for batch in batches) == sum(s.length for s in samples)
