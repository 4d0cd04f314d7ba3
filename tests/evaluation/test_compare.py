"""Two models on one text: against the formulas in float64."""

import math
import sys

import mlx.core as mx
import numpy as np
import pytest
from helpers import random_model, tiny_config
from mlx.utils import tree_map

from rodimus_mlx.cache import mixer_cache
from rodimus_mlx.errors import RodimusError
from rodimus_mlx.evaluation import compare as module
from rodimus_mlx.evaluation import perplexity as perplexity_module
from rodimus_mlx.evaluation.compare import compare
from rodimus_mlx.evaluation.perplexity import perplexity
from rodimus_mlx.evaluation.plot import check_plot, label, plot

ROUNDING = 2e-5  # of float32 sums over a vocabulary
POSITIONS = (8, 16, 32, 64, 128)


@pytest.fixture(params=["rodimus_plus", "rodimus"])
def pair(request):
    """A model, and one whose weights are a little different."""
    a, b = (random_model(tiny_config(request.param)) for _ in range(2))
    b.update(tree_map(lambda x: x * (1 + 0.05 * mx.random.normal(x.shape, key=mx.random.key(x.size))), b.parameters()))
    return a, b


@pytest.fixture(autouse=True)
def small_numbers(monkeypatch):
    monkeypatch.setattr(module, "DRIFT_POSITIONS", POSITIONS)
    monkeypatch.setattr(perplexity_module, "EDGES", (0, 10, 30, 1000))


@pytest.fixture
def documents():
    rng = np.random.default_rng(5)
    return [rng.integers(0, 61, length).astype(np.int32) for length in (70, 33, 14)]


def log_p(model, document):
    logits = np.array(model(mx.array(document[None, :-1]))[0], np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def states(model, document, position):
    cache = model.make_cache()
    model(mx.array(document[None, :position]), cache=cache)
    return [np.array(mixer_cache(layer)[1], np.float64) for layer in cache]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_figures(pair, documents, batch):
    found = compare(*pair, documents, batch=batch)
    a, b = ([log_p(model, document) for document in documents] for model in pair)
    kl = [(np.exp(x) * (x - y)).sum(-1) for x, y in zip(a, b)]
    same = [x.argmax(-1) == y.argmax(-1) for x, y in zip(a, b)]
    assert found["tokens"] == 114
    assert found["kl"] == pytest.approx(np.concatenate(kl).mean(), rel=1e-3)
    assert found["top1"] == np.concatenate(same).mean() < 1
    for key, log in (("a", a), ("b", b)):
        loss = -np.concatenate([x[np.arange(len(x)), d[1:]] for x, d in zip(log, documents)]).mean()
        assert found[key]["loss"] == pytest.approx(loss, rel=ROUNDING)
        assert found[key]["perplexity"] == pytest.approx(math.exp(loss), rel=10 * ROUNDING)
    assert [(bucket["from"], bucket["to"]) for bucket in found["buckets"]] == [(0, 10), (10, 30), (30, 1000)]
    middle = found["buckets"][1]
    assert middle["kl"] == pytest.approx(np.concatenate([x[10:30] for x in kl]).mean(), rel=1e-3)
    assert middle["tokens"] == 20 + 20 + 3


@pytest.mark.parametrize("batch", [1, 3])
def test_drift(pair, documents, batch):
    drift = compare(*pair, documents, batch=batch)["drift"]
    assert drift["positions"] == [8, 16, 32, 64]  # no document reaches 128
    for i, position in enumerate(drift["positions"]):
        errors = []
        for document in documents:
            if len(document) > position:
                a, b = (states(model, document, position) for model in pair)
                errors.append([np.linalg.norm(y - x) / np.linalg.norm(x) for x, y in zip(a, b)])
        found = [layer[i] for layer in drift["layers"]]
        assert found == pytest.approx(np.mean(errors, axis=0).tolist(), rel=1e-4)
        assert min(found) > 0.01


def test_a_model_against_itself(pair, documents):
    found = compare(pair[0], pair[0], documents, batch=2)
    assert (found["kl"], found["top1"]) == (0, 1)
    assert np.all(np.array(found["drift"]["layers"]) == 0)
    assert found["a"] == found["b"]


def test_the_same_perplexity_as_alone(pair, documents):
    found = compare(*pair, documents, window=20, stride=5, batch=2)
    for key, model in zip("ab", pair):
        alone = perplexity(model, documents, window=20, stride=5)
        assert found[key]["loss"] == pytest.approx(alone["loss"], rel=ROUNDING)
        assert (found["tokens"], found["window"], found["stride"]) == (alone["tokens"], 20, 5)


def test_other_vocabularies(documents):
    a, b = random_model(tiny_config()), random_model(tiny_config(vocab_size=62))
    with pytest.raises(RodimusError, match="vocabularies of 61 and 62"):
        compare(a, b, documents)


def test_other_states_have_no_drift(documents):
    a, b = random_model(tiny_config()), random_model(tiny_config(n_layer=1))
    found = compare(a, b, documents)
    assert found["drift"] is None and found["kl"] > 0


def test_plot(pair, documents, tmp_path):
    pytest.importorskip("matplotlib")
    result = compare(*pair, documents)
    for name in ("a.png", "a.svg"):
        check_plot(tmp_path / name)
        plot(result, tmp_path / name, ("one", "other"))
        assert (tmp_path / name).stat().st_size > 5000
    plot({**result, "drift": None}, tmp_path / "no-drift.png", ("one", "other"))
    with pytest.raises(RodimusError, match=r"a plot's name must end in one of .*\.png"):
        check_plot(tmp_path / "a.doc")
    with pytest.raises(RodimusError, match="there is no folder"):
        check_plot(tmp_path / "absent" / "a.png")


def test_no_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(RodimusError, match=r"pip install 'rodimus-mlx\[plot\]'"):
        check_plot(tmp_path / "a.png")


@pytest.mark.parametrize(
    "start, end, text", [(0, 256, "0-256"), (256, 1024, "256-1k"), (4096, 16384, "4k-16k"), (262144, None, "from 256k")]
)
def test_labels(start, end, text):
    assert label({"from": start, "to": end}) == text
