"""Documents packed in a row get the logits and the gradients that they get alone."""

import itertools

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers import golden_model, largest_difference, random_model, random_tokens, relative_error, tiny_config
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from rodimus_mlx.attention import QUERY_BLOCK

LOGITS = 1e-4  # float32 logits of size 1 to 5, summed in another order
GRADIENT = 2e-5  # float32 gradients through 2 or 3 layers, summed in another order
LENGTH = 150

MODELS = {
    "plus_bin": lambda: golden_model("plus_bin"),
    "rodimus": lambda: golden_model("rodimus"),
    "full": lambda: random_model(tiny_config(attn_cfg={"window_size": None, "num_heads_k": 3})),
    "conv7": lambda: random_model(tiny_config(mixer_cfg={"d_conv": 7})),
    "conv1": lambda: random_model(tiny_config(mixer_cfg={"d_conv": 1})),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


def number(edges, names):
    """[L] document numbers for documents between the edges."""
    return np.concatenate([np.full(b - a, name) for (a, b), name in zip(itertools.pairwise(edges), names)])


def edges_of(cuts, length=LENGTH):
    return [0, *sorted({cut for cut in cuts if cut < length}), length]


@settings(max_examples=8)
@given(cuts=st.lists(st.lists(st.integers(1, LENGTH - 1), max_size=8), min_size=1, max_size=2))
@example(cuts=[[1, 2, 3, 4, 6, 63, 64, 65, 128], [148, 149]])
def test_logits(model, cuts):
    """Rows cut at different places, among them documents of one token and borders of the recurrence's chunks."""
    tokens = random_tokens(model, len(cuts), LENGTH)
    rows = [edges_of(row) for row in cuts]
    names = [40, 2, 17, 5, 0, 33, 1, 8, 29, 3]  # numbers are names: any order, any gaps
    documents = np.stack([number(edges, names) for edges in rows])
    packed = model(tokens, documents=mx.array(documents))
    for row, edges in enumerate(rows):
        for a, b in itertools.pairwise(edges):
            assert largest_difference(packed[row, a:b], model(tokens[row : row + 1, a:b])[0]) <= LOGITS


def test_gradients(model):
    tokens = random_tokens(model, 2, 70)
    rows = [[0, 1, 5, 40, 70], [0, 33, 69, 70]]
    documents = mx.array(np.stack([number(edges, range(4)) for edges in rows]))
    weights = mx.array(np.random.default_rng(0).standard_normal((2, 70, model.args.vocab_size)).astype(np.float32))

    def packed(model):
        return (model(tokens, documents=documents) * weights).sum()

    def separate(model):
        spans = [(row, a, b) for row, edges in enumerate(rows) for a, b in itertools.pairwise(edges)]
        return sum((model(tokens[r : r + 1, a:b]) * weights[r : r + 1, a:b]).sum() for r, a, b in spans)

    actual = dict(tree_flatten(nn.value_and_grad(model, packed)(model)[1]))
    expected = dict(tree_flatten(nn.value_and_grad(model, separate)(model)[1]))
    errors = {name: relative_error(actual[name], expected[name]) for name in expected if mx.any(expected[name]).item()}
    assert len(errors) > 20
    assert {name: error for name, error in errors.items() if not error <= GRADIENT} == {}


def test_beyond_a_block_of_queries():
    model = random_model(tiny_config(n_layer=1, attn_cfg={"window_size": None}))
    edges = [0, 20, QUERY_BLOCK - 3, QUERY_BLOCK + 60]
    tokens = random_tokens(model, 1, edges[-1])
    packed = model(tokens, documents=mx.array(number(edges, range(3)))[None])
    for a, b in itertools.pairwise(edges):
        assert largest_difference(packed[:, a:b], model(tokens[:, a:b])) <= LOGITS


def test_padding_is_one_more_document(model):
    """Padding needs no mask beside documents: it takes a number of its own."""
    tokens = random_tokens(model, 1, 60)
    documents = np.repeat([0, 7, 1], [20, 6, 34])
    packed = model(tokens, documents=mx.array(documents)[None])
    for a, b in [(0, 20), (26, 60)]:
        assert largest_difference(packed[:, a:b], model(tokens[:, a:b])) <= LOGITS
    with pytest.raises(ValueError, match="not both"):
        model(tokens, mask=mx.ones((1, 60), dtype=mx.bool_), documents=mx.array(documents)[None])


def test_a_number_used_again_is_another_document(model):
    """Documents are runs of a number."""
    tokens = random_tokens(model, 1, 60)
    packed = model(tokens, documents=mx.array(np.repeat([0, 1, 0], 20))[None])
    for a in (0, 20, 40):
        assert largest_difference(packed[:, a : a + 20], model(tokens[:, a : a + 20])) <= LOGITS
