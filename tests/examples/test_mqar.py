"""Multi-query associative recall: the task is what it says, and a model learns it."""

import json
import sys

import mlx.core as mx
import mqar
import numpy as np
import pytest

PAIRS, LENGTH, VOCAB = 5, 32, 40


@pytest.fixture
def made():
    return mqar.sequences(200, LENGTH, PAIRS, VOCAB, np.random.default_rng(0))


def test_every_key_is_asked_once_and_answered_by_its_value(made):
    for tokens, learn, answers in zip(*made):
        keys, values = tokens[: 2 * PAIRS : 2], tokens[1 : 2 * PAIRS : 2]
        asked = np.flatnonzero(learn)
        assert len(set(keys)) == PAIRS
        assert keys.max() < VOCAB // 2 <= values.min()
        assert sorted(tokens[asked]) == sorted(keys)
        assert [dict(zip(keys, values))[key] for key in tokens[asked]] == answers[asked].tolist()
        assert asked.min() >= 2 * PAIRS


def test_an_answer_does_not_follow_its_question(made):
    tokens, learn, answers = made
    shown = (tokens[:, 1:] == answers)[learn].mean()
    assert shown < 3 / VOCAB, "no oftener than a random word is"


def test_early_places_are_asked_more_often(made):
    places = np.flatnonzero(made[1].sum(axis=0))
    counts = made[1].sum(axis=0)[places]
    assert counts[0] > 2 * counts[-1]


def test_all_places_are_asked_where_there_are_no_more(made):
    tokens, learn, _ = mqar.sequences(3, 4 * PAIRS, PAIRS, VOCAB, np.random.default_rng(0))
    assert tokens.shape == (3, 4 * PAIRS + 1)
    assert (learn.sum(axis=1) == PAIRS).all()


def test_too_many_pairs_are_refused():
    with pytest.raises(SystemExit, match="Error: 9 pairs"):
        mqar.sequences(1, 32, 9, VOCAB, np.random.default_rng(0))


def test_a_perfect_and_a_blind_model_are_told_apart(made):
    answers = {row[:-1].tobytes(): answer for row, answer in zip(made[0], made[2])}

    def perfect(tokens):
        return mx.array(np.eye(VOCAB)[[answers[np.array(row).tobytes()] for row in tokens]])

    def blind(tokens):
        return mx.zeros((*tokens.shape, VOCAB))

    assert mqar.accuracy(perfect, made) == 1
    assert mqar.accuracy(blind, made) == 0


SIZES = "--length 16 --pairs 2 --vocab-size 16 --d-model 32 --window 8 --mem-size 8 --rows 800"
TRAINING = "--steps 4 --batch-size 16 --seeds 2"


def run(monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", ["mqar.py", *SIZES.split(), *TRAINING.split(), *map(str, options)])
    mqar.main()
    return capsys.readouterr().out.splitlines()


def test_the_command_trains_and_prints_a_table_beside_the_papers(monkeypatch, capsys):
    lines = run(monkeypatch, capsys)
    assert [json.loads(line)["block"] for line in lines[:4]] == ["rodimus", "rodimus_plus"] * 2
    assert lines[4] == "| accuracy | n = 8 |"
    assert " to " in lines[6]
    assert [line.split(",")[0] for line in lines[-3:]] == ["| Rodimus", "| Rodimus+", "| Mamba-2"]


def test_the_papers_numbers_stand_under_their_sizes():
    lines = mqar.table({}, [], [16, 20, 64])
    assert lines.splitlines()[3].endswith("| 0.37 |  | 0.91 |")


def test_a_second_call_goes_on_after_the_runs_that_are_finished(monkeypatch, capsys, tmp_path):
    out = tmp_path / "runs.jsonl"
    first = run(monkeypatch, capsys, "--block", "rodimus", "--out", out)
    second = run(monkeypatch, capsys, "--out", out)
    assert [json.loads(line)["block"] for line in second[:2]] == ["rodimus_plus"] * 2
    assert first[-4] in second
    assert len(out.read_text().splitlines()) == 4
    run(monkeypatch, capsys, "--block", "rodimus", "--learning-rate", 0.001, "--out", out)
    assert len(out.read_text().splitlines()) == 6, "other settings are other runs"


def test_all_runs_get_as_many_steps_as_the_seconds_allow(monkeypatch, capsys):
    lines = run(monkeypatch, capsys, "--steps", 10**6, "--seconds", 4, "--seeds", 1)
    steps = {json.loads(line)["steps"] for line in lines[:2]}
    assert len(steps) == 1
    assert 1 <= steps.pop() < 10**6


def test_training_has_short_sequences_too_as_many_tokens_of_each():
    samples = mqar.mixture(40, 64, 16, 80, 0)
    lengths, counts = np.unique([sample.length for sample in samples], return_counts=True)
    assert lengths.tolist() == [4, 16, 32, 64]
    assert (lengths * counts == 640).all()
    assert all((sample.targets[sample.learn] >= 40).all() for sample in samples)
    assert {sample.length: int(sample.learn.sum()) for sample in samples} == {4: 1, 16: 4, 32: 8, 64: 16}
