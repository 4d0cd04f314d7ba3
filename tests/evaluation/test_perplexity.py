"""Perplexity against the plain sum over a whole forward pass, whatever the windows, batches and steps."""

import json
import math

import mlx.core as mx
import numpy as np
import pytest
from helpers import TINY_FOLDER, random_model, tiny_config

from rodimus_mlx.errors import RodimusError
from rodimus_mlx.evaluation import perplexity as module
from rodimus_mlx.evaluation.perplexity import perplexity
from rodimus_mlx.evaluation.text import batches, read_documents, windows
from rodimus_mlx.tokenizer import load_tokenizer

ROUNDING = 1e-5  # of float32 losses of a few nats


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config())


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_FOLDER)


@pytest.fixture
def documents():
    rng = np.random.default_rng(5)
    return [rng.integers(0, 61, length).astype(np.int32) for length in (90, 2, 41)]


def plain_losses(model, tokens):
    """-log p of each token but the first, in float64, from one pass over all of them."""
    logits = np.array(model(mx.array(tokens[None, :-1]))[0], np.float64)
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(tokens) - 1), tokens[1:]]


@pytest.mark.parametrize("step", [1024, 17])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_whole_documents(model, documents, batch, step, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_STEP", step)
    found = perplexity(model, documents, batch=batch)
    losses = np.concatenate([plain_losses(model, document) for document in documents])
    assert found["tokens"] == len(losses) == 130
    assert found["loss"] == pytest.approx(losses.mean(), rel=ROUNDING)
    assert found["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=10 * ROUNDING)
    error = found["perplexity"] * losses.std() / math.sqrt(len(losses))
    assert found["standard_error"] == pytest.approx(error, rel=1e-3)
    assert (found["window"], found["stride"]) == (89, 89)


@pytest.mark.parametrize("window, stride", [(30, 30), (30, 10), (7, 3), (1, 1)])
def test_windows(model, documents, window, stride):
    """Each target is predicted from the window that starts last among those that give it stride's least context."""
    losses = []
    for document in documents:
        scored = 0
        for start in range(0, len(document) - 1, stride):
            piece = document[start : start + window + 1]
            losses += plain_losses(model, piece)[scored - start :].tolist()
            scored = start + len(piece) - 1
            if scored == len(document) - 1:
                break
    found = perplexity(model, documents, window=window, stride=stride, batch=3)
    assert found["tokens"] == len(losses) == 130
    assert found["loss"] == pytest.approx(np.mean(losses), rel=ROUNDING)


def test_by_position(model, documents, monkeypatch):
    monkeypatch.setattr(module, "EDGES", (0, 4, 40, 80, 500))
    found = perplexity(model, documents, batch=2)
    losses = [plain_losses(model, document) for document in documents]
    for bucket, (start, stop) in zip(found["buckets"], [(0, 4), (4, 40), (40, 80), (80, 500)]):
        expected = np.concatenate([each[start:stop] for each in losses])
        assert (bucket["from"], bucket["to"], bucket["tokens"]) == (start, stop, len(expected))
        assert bucket["loss"] == pytest.approx(expected.mean(), rel=ROUNDING)
    assert len(found["buckets"]) == 4
    assert sum(bucket["tokens"] for bucket in found["buckets"]) == found["tokens"]


def test_every_target_counts_once():
    document = np.arange(100)
    for window, stride in ((99, 99), (50, 50), (50, 20), (8, 1), (200, 60)):
        seen = [t for w in windows([document], window, stride) for t in w.tokens[1 + w.scored :]]
        assert seen == list(range(1, 100))
        assert all(w.length <= window for w in windows([document], window, stride))


def test_batches_of_like_length(documents):
    rows = list(batches(windows(documents, 100, 100), 2))
    assert [each.tokens.shape for each in rows] == [(2, 89), (1, 1)]
    assert [int(each.counts.sum()) for each in rows] == [129, 1]


def test_progress(model, documents):
    calls = []
    perplexity(model, documents, batch=2, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (179, 179) and [done for done, _ in calls] == sorted(done for done, _ in calls)


@pytest.mark.parametrize(
    "options, message",
    [({"window": 10, "stride": 11}, "the stride must be from 1 to the window"), ({"batch": 0}, "the batch must be")],
)
def test_options_that_make_no_sense(model, documents, options, message):
    with pytest.raises(RodimusError, match=message):
        perplexity(model, documents, **options)


def test_a_token_beyond_the_vocabulary(model):
    with pytest.raises(RodimusError, match="token 61 is not in the model's vocabulary of 61"):
        perplexity(model, [np.array([1, 61, 2])])


def test_predictions_that_are_not_finite(documents):
    broken = random_model(tiny_config())
    broken.model.norm_f.weight = broken.model.norm_f.weight * math.nan
    with pytest.raises(RodimusError, match="predictions are not finite"):
        perplexity(broken, documents)


def test_a_text_file(tokenizer, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one text,\n\nwhatever lines it has: ü\n", encoding="utf-8")
    (document,) = read_documents(file, tokenizer)
    assert document.tolist() == tokenizer.encode(file.read_text(encoding="utf-8"))
    (short,) = read_documents(file, tokenizer, max_tokens=5)
    assert short.tolist() == document[:5].tolist()


def test_a_file_of_lines(tokenizer, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in ("abc", "defgh", "i")))
    end = tokenizer.eos_token_id
    documents = [document.tolist() for document in read_documents(file, tokenizer)]
    assert documents == [[*tokenizer.encode(text), end] for text in ("abc", "defgh", "i")]
    assert [len(document) for document in read_documents(file, tokenizer, max_tokens=6)] == [4, 2]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("absent.txt", None, "there is no file"),
        ("short.txt", b"a", "is too short"),
        ("latin.txt", b"caf\xe9", "is not UTF-8 text: .* at byte 3"),
        ("bad.jsonl", b'{"text": 1}', "'text' must be text"),
        ("bad.jsonl", b"nonsense", "line 1 is not valid JSON"),
    ],
)
def test_files_that_cannot_be_read(tokenizer, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RodimusError, match=message):
        read_documents(tmp_path / name, tokenizer)


def test_no_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(RodimusError, match="no tokenizer"):
        read_documents(tmp_path / "a.txt", None)
