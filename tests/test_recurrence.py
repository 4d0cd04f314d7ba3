"""The chunked recurrence against the sequential one in float64: outputs, final state and every gradient, by name."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from helpers import as_float64, relative_error
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rodimus_mlx import recurrence
from rodimus_mlx.kernels.reference import sequential_recurrence

FLOAT32 = 1e-5  # sums of up to 700 tokens, in float32 and another order
FLOAT64 = 5e-6  # MLX's exp of float64 has float32's digits; everything else about the reference is exact
STEADY = 2e-6  # over 700 equal decays; rounding each to float32 and multiplying gives 5e-6 to 8e-6
HALF = {"bfloat16": 4e-3, "float16": 5e-4}  # one rounding of the output to 8 or 11 bits

NAMES = ("q", "k", "v", "log_decay", "state")
DECAYS = {
    "none": lambda rng, shape: np.zeros(shape),
    "gentle": lambda rng, shape: -rng.uniform(0, 0.02, shape),
    "usual": lambda rng, shape: -np.exp(rng.uniform(-6, 1, shape)),
    "-50": lambda rng, shape: np.full(shape, -50.0),
    "some -50": lambda rng, shape: np.where(rng.random(shape) < 0.05, -50.0, -rng.uniform(0, 0.1, shape)),
    "all kinds": lambda rng, shape: -rng.choice([0, 1e-4, 1e-2, 0.3, 2, 10, 50], shape),
    "some -1e4": lambda rng, shape: np.where(rng.random(shape) < 0.05, -1e4, -rng.uniform(0, 0.1, shape)),
    "steps of -50": lambda rng, shape: np.where(rng.random(shape[:2]) < 0.1, -50.0, 0.0)[..., None] * np.ones(shape),
}


def make_inputs(batch, length, n, d, decay="usual", seed=0):
    """q, k, v, log_decay, state as float32 values; keys of the size that a model's have."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, length, n))
    k = rng.standard_normal((batch, length, n)) * n**-0.5
    v = rng.standard_normal((batch, length, d))
    log_decay = DECAYS[decay](rng, (batch, length, n))
    state = rng.standard_normal((batch, n, d))
    return [x.astype(np.float32) for x in (q, k, v, log_decay, state)]


def make_cotangents(batch, length, n, d, seed=0):
    """What the loss's gradient is at the outputs and at the final state."""
    rng = np.random.default_rng([seed, 1])
    return [rng.standard_normal((batch, length, d)), rng.standard_normal((batch, n, d))]


def numpy_recurrence(inputs, cotangents):
    """Outputs, final state and the gradients of all inputs in float64, token by token, forwards and backwards.

    Writing dS_t for the loss's gradient at the state after token t, with what later tokens make of it:
    dS_t = q_t do_t / sqrt(n) + exp(a_{t+1}) dS_{t+1};  dk = dS v;  dv = dS^T k;  da = exp(a_t) sum_D dS_t S_{t-1}.
    """
    q, k, v, log_decay, state = (x.astype(np.float64) for x in inputs)
    d_o, d_state = cotangents
    length, scale, decay = q.shape[1], q.shape[2] ** -0.5, np.exp(log_decay)
    o = np.empty_like(v)
    d_q, d_k, d_v, d_decay = (np.empty_like(x) for x in (q, k, v, log_decay))
    every = 32  # states are kept at every 32nd token and worked out again between
    kept = []

    def step(state, t):
        return decay[:, t, :, None] * state + k[:, t, :, None] * v[:, t, None, :]

    for t in range(length):
        if t % every == 0:
            kept.append(state)
        state = step(state, t)
        o[:, t] = (q[:, t, None] * scale @ state)[:, 0]
        d_q[:, t] = (state @ d_o[:, t, :, None])[..., 0] * scale
    final = state
    for begin in reversed(range(0, length, every)):
        end = min(begin + every, length)
        before = [kept.pop()]
        for t in range(begin, end - 1):
            before.append(step(before[-1], t))
        for t in reversed(range(begin, end)):
            d_state = d_state + q[:, t, :, None] * scale * d_o[:, t, None, :]
            d_k[:, t] = (d_state @ v[:, t, :, None])[..., 0]
            d_v[:, t] = (k[:, t, None] @ d_state)[:, 0]
            d_state = decay[:, t, :, None] * d_state
            d_decay[:, t] = np.einsum("bnd,bnd->bn", d_state, before[t - begin])
    gradients = dict(zip(NAMES, (d_q, d_k, d_v, d_decay, d_state)))
    return {"o": o, "final": final} | {f"d {name}": gradient for name, gradient in gradients.items()}


def run(function, inputs, cotangents, dtype=mx.float32):
    """The same results of a function of MLX arrays (q, k, v, log_decay, state)."""
    arrays = [mx.array(x, dtype) for x in inputs]
    d_o, d_state = (mx.array(x, dtype) for x in cotangents)
    (o, final), gradients = mx.vjp(lambda *xs: list(function(*xs)), arrays, [d_o, d_state])
    return {"o": o, "final": final} | {f"d {name}": gradient for name, gradient in zip(NAMES, gradients)}


def wrong(actual, expected, tolerance):
    """The results whose relative error is above the tolerance, with it."""
    errors = {name: relative_error(actual[name], expected[name]) for name in expected if np.any(expected[name])}
    zeros = {
        name: float(np.abs(as_float64(actual[name])).max(initial=0)) for name in expected if not np.any(expected[name])
    }
    return {name: error for name, error in (errors | zeros).items() if not error <= tolerance}


@st.composite
def sizes(draw):
    """B 1-3, T 1-700, n 16-128, D 32-512, as long as the float64 loop takes less than a second."""
    batch = draw(st.integers(1, 3))
    length = draw(st.one_of(st.integers(1, 700), st.integers(1, 70)))
    n = draw(st.integers(16, 128))
    room = 12_000_000 // (batch * length * n)
    return batch, length, n, draw(st.integers(32, max(32, min(512, room))))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [1, 2, 33, 70])
def test_numpy_recurrence_is_the_reference(decay, length):
    """The float64 gradients by hand, with which the rest compares, are those of the reference by autodiff."""
    inputs, cotangents = make_inputs(2, length, 5, 7, decay), make_cotangents(2, length, 5, 7)
    expected = run(sequential_recurrence, inputs, cotangents, mx.float64)
    assert wrong(numpy_recurrence(inputs, cotangents), {k: as_float64(x) for k, x in expected.items()}, FLOAT64) == {}


@settings(max_examples=60)
@given(sizes=sizes(), decay=st.sampled_from(sorted(DECAYS)), seed=st.integers(0, 1000))
@example(sizes=(3, 700, 128, 512), decay="usual", seed=0)
@example(sizes=(1, 1, 16, 32), decay="usual", seed=0)
@example(sizes=(2, 64, 16, 32), decay="some -50", seed=0)
@example(sizes=(2, 65, 16, 32), decay="none", seed=0)
def test_chunked_is_sequential(sizes, decay, seed):
    inputs, cotangents = make_inputs(*sizes, decay, seed), make_cotangents(*sizes, seed)
    expected = numpy_recurrence(inputs, cotangents)
    assert wrong(run(recurrence, inputs, cotangents), expected, FLOAT32) == {}


@pytest.mark.parametrize("length", [1, 63, 700])
@pytest.mark.parametrize("decay", DECAYS)
def test_every_decay(decay, length):
    sizes = (1, length, 24, 40)
    inputs, cotangents = make_inputs(*sizes, decay), make_cotangents(*sizes)
    assert wrong(run(recurrence, inputs, cotangents), numpy_recurrence(inputs, cotangents), FLOAT32) == {}


@pytest.mark.parametrize("decay", [2e-8, 1e-4, 3e-3], ids=str)
def test_equal_decays_do_not_drift(decay):
    sizes = (1, 700, 24, 40)
    inputs, cotangents = make_inputs(*sizes), make_cotangents(*sizes)
    inputs[3][:] = -decay
    assert wrong(run(recurrence, inputs, cotangents), numpy_recurrence(inputs, cotangents), STEADY) == {}


@settings(max_examples=30)
@given(
    length=st.integers(2, 200),
    cuts=st.lists(st.integers(1, 199), max_size=6),
    decay=st.sampled_from(sorted(DECAYS)),
    seed=st.integers(0, 1000),
)
def test_cuts_change_nothing(length, cuts, decay, seed):
    """Pieces that pass the state on: outputs, final state and gradients through all of them."""
    edges = [0, *sorted({cut for cut in cuts if cut < length}), length]

    def in_pieces(q, k, v, log_decay, state):
        outputs = []
        for begin, end in itertools.pairwise(edges):
            o, state = recurrence(*(x[:, begin:end] for x in (q, k, v, log_decay)), state)
            outputs.append(o)
        return mx.concatenate(outputs, axis=1), state

    sizes = (2, length, 17, 33)
    inputs, cotangents = make_inputs(*sizes, decay, seed), make_cotangents(*sizes, seed)
    assert wrong(run(in_pieces, inputs, cotangents), numpy_recurrence(inputs, cotangents), FLOAT32) == {}


@settings(max_examples=30)
@given(
    length=st.integers(1, 150),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    decay=st.sampled_from(sorted(DECAYS)),
    seed=st.integers(0, 1000),
)
def test_mask_freezes_the_state(length, share, decay, seed):
    """Rows with padding anywhere, whatever it holds, are the rows without their padding."""
    batch, n, d = 2, 17, 33
    inputs, cotangents = make_inputs(batch, length, n, d, decay, seed), make_cotangents(batch, length, n, d, seed)
    mask = np.random.default_rng(seed).random((batch, length)) >= share
    for x in inputs[:3]:
        x[~mask] = 1e3
    cotangents[0][~mask] = 0  # no loss looks at the outputs of padding
    actual = run(lambda *xs: recurrence(*xs, mask=mx.array(mask)), inputs, cotangents)
    for row in range(batch):
        real = mask[row]
        alone = [x[row : row + 1] if i == 4 else x[row : row + 1, real] for i, x in enumerate(inputs)]
        expected = numpy_recurrence(alone, [cotangents[0][row : row + 1, real], cotangents[1][row : row + 1]])
        found = {
            name: x[row : row + 1] if name in ("final", "d state") else as_float64(x)[row : row + 1, real]
            for name, x in actual.items()
        }
        assert wrong(found, expected, FLOAT32) == {}
        for name in ("d k", "d v", "d log_decay"):
            assert not np.any(as_float64(actual[name])[row, ~real])
        if not real.any():
            assert np.array_equal(as_float64(actual["final"])[row], inputs[4][row])


@pytest.mark.parametrize("dtype", HALF)
def test_values_of_16_bits(dtype):
    """o comes in the type of v; the state is float32 and no less exact."""
    q, k, v, log_decay, state = (mx.array(x) for x in make_inputs(2, 130, 24, 40))
    v = v.astype(getattr(mx, dtype))
    o, final = recurrence(q, k, v, log_decay, state)
    assert (o.dtype, final.dtype) == (v.dtype, mx.float32)
    inputs = [as_float64(x) for x in (q, k, v, log_decay, state)]
    expected = numpy_recurrence(inputs, make_cotangents(2, 130, 24, 40))
    assert relative_error(o, expected["o"]) <= HALF[dtype]
    assert relative_error(final, expected["final"]) <= FLOAT32


def test_no_state_is_a_zero_state():
    q, k, v, log_decay, state = (mx.array(x) for x in make_inputs(2, 9, 16, 32))
    o, final = recurrence(q, k, v, log_decay)
    expected_o, expected_final = recurrence(q, k, v, log_decay, mx.zeros_like(state))
    assert mx.array_equal(o, expected_o)
    assert mx.array_equal(final, expected_final)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("k", (2, 5, 8)),
        ("k", (2, 4, 16)),
        ("v", (2, 4, 32)),
        ("v", (1, 5, 32)),
        ("log_decay", (2, 5, 1)),
        ("state", (2, 32, 16)),
        ("state", (1, 16, 32)),
        ("mask", (2, 4)),
        ("mask", (5,)),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_named(name, shape):
    arrays = dict(zip(NAMES, (mx.array(x) for x in make_inputs(2, 5, 16, 32))))
    arrays["mask"] = mx.ones((2, 5), mx.bool_)
    arrays[name] = mx.zeros(shape, mx.bool_ if name == "mask" else mx.float32)
    with pytest.raises(ValueError, match=f"^{name} must have shape"):
        recurrence(**arrays)


@pytest.mark.parametrize(("q", "v"), [((2, 0, 16), (2, 0, 32)), ((5, 16), (2, 5, 32)), ((2, 5, 16), (5, 32))], ids=str)
def test_q_and_v_have_three_axes_and_a_token(q, v):
    with pytest.raises(ValueError, match="q and v must be"):
        recurrence(mx.zeros(q), mx.zeros(q), mx.zeros(v), mx.zeros(q))
