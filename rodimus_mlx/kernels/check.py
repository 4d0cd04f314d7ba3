"""Every kernel against plain MLX, on whatever backend runs: in tests on the CPU, on a GPU, on a user's Mac."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from .. import layer_ops
from ..pieces import split
from ..recurrence import mix, selective_recurrence
from .backend import Wish, use_backend
from .reference import sequential_recurrence

# ||kernel - reference|| / ||reference||, both rounded to the output's type: a few roundings of sums in another order.
BOUNDS = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1e-2}
DTYPES = (mx.float32, mx.float16, mx.bfloat16)


@dataclass(frozen=True)
class Sizes:
    """B rows of T tokens, n key features, D value features, K taps, d model width."""

    batch: int = 2
    tokens: int = 37
    keys: int = 24
    values: int = 72
    taps: int = 4

    def __str__(self) -> str:
        return f"B={self.batch} T={self.tokens} n={self.keys} D={self.values}"


ODD_SIZES = (
    Sizes(1, 20, 24, 328),  # rows of more values than their threads take at once
    Sizes(),
    Sizes(1, 130, 64, 96, 3),
    Sizes(1, 5, 16, 40, 2),
    Sizes(2, 2, 16, 40),
    Sizes(2, 70, 128, 40),
    Sizes(1, 40, 256, 32),
    Sizes(2, 66, 32, 64),
)


@dataclass(frozen=True)
class Comparison:
    """One output of one function: its relative error, and the bound that it must keep."""

    name: str
    dtype: mx.Dtype
    sizes: Sizes
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error keeps the bound; NaN does not."""
        return self.error <= self.bound


def compare_all(
    backend: Wish = "auto", sizes: Sequence[Sizes] = ODD_SIZES, dtypes: Sequence[mx.Dtype] = DTYPES
) -> Iterator[Comparison]:
    """Run every kernel, forward and backward, with and without padding and document borders."""
    for size in sizes:
        for dtype in dtypes:
            for name, function, inputs in _cases(size, dtype):
                with use_backend(backend):
                    found = _flat(function(*inputs))
                    mx.eval(found)
                with use_backend("plain"):
                    expected = _flat(function(*inputs))
                    mx.eval(expected)
                for index, (a, b) in enumerate(zip(found, expected)):
                    yield Comparison(f"{name}[{index}]", dtype, size, relative_error(a, b), BOUNDS[b.dtype])


def recurrence_errors(
    backend: Wish, sizes: Sizes, dtype: mx.Dtype, strength: float, with_gradients: bool = True
) -> dict[str, float]:
    """Relative errors of the recurrence and its gradients against the token-by-token reference in float64.

    strength: decays lie between almost none, exp(-softplus(-8)), and about exp(-strength) a token.
    """
    qkgt, bias, v, state = _recurrence_inputs(sizes, dtype, strength)
    cotangent_o, cotangent_s = _normal(*v.shape).astype(dtype), _normal(*state.shape)

    def loss(run: Callable[..., tuple[mx.array, mx.array]], *inputs: mx.array) -> mx.array:
        o, s = run(*inputs)
        return (o * cotangent_o.astype(o.dtype)).sum() + (s * cotangent_s.astype(s.dtype)).sum()

    def reference(qkgt: mx.array, bias: mx.array, v: mx.array, state: mx.array) -> tuple[mx.array, mx.array]:
        return sequential_recurrence(*_gates64(qkgt, bias, v), state)

    def ours(qkgt: mx.array, bias: mx.array, v: mx.array, state: mx.array) -> tuple[mx.array, mx.array]:
        return selective_recurrence(qkgt, bias, v, 1e-5, state)

    inputs = (qkgt, bias, v, state)
    arguments = tuple(range(len(inputs)))
    with use_backend(backend):
        o, after = ours(*inputs)
        found = {"o": o.astype(dtype), "state": after}
        if with_gradients:
            grads = mx.grad(partial(loss, ours), argnums=arguments)(*inputs)
            found |= dict(zip(("d_qkgt", "d_bias", "d_v", "d_state"), grads))
        mx.eval(found)
    with use_backend("plain"), mx.stream(mx.cpu):  # float64 exists on the CPU alone
        doubles = tuple(x.astype(mx.float64) for x in inputs)
        cotangent_o, cotangent_s = cotangent_o.astype(mx.float64), cotangent_s.astype(mx.float64)
        o, after = reference(*doubles)
        expected = {"o": o, "state": after}
        if with_gradients:
            grads = mx.grad(partial(loss, reference), argnums=arguments)(*doubles)
            expected |= dict(zip(("d_qkgt", "d_bias", "d_v", "d_state"), grads))
        return {name: relative_error(found[name], value) for name, value in expected.items()}


def relative_error(found: mx.array, expected: mx.array) -> float:
    """||found - expected|| / ||expected||, in float64."""
    with mx.stream(mx.cpu):
        a, b = found.astype(mx.float64), expected.astype(mx.float64)
        scale = float(mx.sqrt((b * b).sum()))
        error = float(mx.sqrt(((a - b) * (a - b)).sum()))
    return error / scale if scale else error


def _cases(s: Sizes, dtype: mx.Dtype) -> Iterator[tuple[str, Callable[..., Any], tuple[mx.array, ...]]]:
    batch, tokens, values = s.batch, s.tokens, s.values
    wide, double = (batch, tokens, values), (batch, tokens, 2 * values)

    def x(*shape: int) -> mx.array:
        return _normal(*shape).astype(dtype)

    layers: list[tuple[str, Callable[..., Any], tuple[mx.array, ...]]] = [
        ("add_norm", partial(layer_ops.add_norm, eps=1e-5), (_normal(*wide), x(*wide), x(values))),
        ("norm", partial(layer_ops.norm, eps=1e-5), (x(*wide), x(values))),
        ("norm of a sum", _norm_of_a_sum, (_normal(*wide), x(values), x(*wide))),
        ("gate_norm", _gate_norm, (_normal(*wide), x(*wide), x(*double), x(values), x(values))),
        ("swiglu", layer_ops.swiglu, (x(*double),)),
    ]
    for name, function, inputs in layers:
        yield name, function, inputs
        yield name + " gradient", _vjp(function, inputs), inputs
    down, up = (x(*shape) * values**-0.5 for shape in ((16, values), (values, 16)))
    yield "low_rank", layer_ops.low_rank, (x(*double), down, up)
    for heads, rope_dims in (((3, 1, 2), 16), ((2, 2, 2), 8)):
        split_heads = partial(
            layer_ops.split_heads, counts=heads, rope_dims=rope_dims, base=10000.0, differentiable=False
        )
        qkv = x(batch, tokens, sum(heads) * 16)
        yield f"split_heads, {rope_dims} turned", split_heads, (qkv, mx.array(70))
        yield "split_heads, rows apart", split_heads, (qkv, mx.arange(batch) * 1000)
        old = x(batch, 1, 7, heads[1] * 16), x(batch, 1, 7, heads[2] * 16)
        for past, window in (((), 5), (old, 5), (old, 9)):
            join_heads = partial(_join_heads, counts=heads, rope_dims=rope_dims, window=window, rows=tokens + 3)
            yield f"join_heads, {len(past)} before, window of {window}", join_heads, (qkv, mx.array(70), *past)
    marks = mx.random.randint(0, 3, (batch, tokens)).astype(mx.uint8)
    for kind, mark in (("", None), (" with marks", marks)):
        conv = partial(layer_ops.conv_gate, marks=mark)
        inputs = (x(*double), x(*wide), x(values), x(batch, s.taps - 1, values), x(values, s.taps), x(values))
        yield "conv_gate" + kind, conv, inputs
        yield "conv_gate gradient" + kind, _vjp(partial(_conv_gate_in_training, marks=mark), inputs), inputs
        yield "conv_gate, few tokens" + kind, *_few_through_a_low_rank(inputs, mark)
        few = min(tokens, 6)
        short = None if mark is None else mark[:, :few]
        step = partial(_mix, marks=short)
        qkgt, bias, _, state = _recurrence_inputs(s, dtype, 2.0)
        yield (
            "step" + kind,
            step,
            (
                qkgt[:, :few],
                bias,
                _normal(batch, few, values),
                x(batch, few, values),
                x(batch, few, 2 * values),
                x(values),
                x(values),
                state,
            ),
        )
        recurrence = partial(_recurrence, marks=mark)
        projections = _recurrence_inputs(s, dtype, 2.0)
        yield "recurrence" + kind, recurrence, projections
        yield "recurrence gradient" + kind, _vjp(recurrence, projections), projections


def _join_heads(qkv: mx.array, offset: mx.array, *past: mx.array, **options: Any) -> tuple[mx.array, ...]:
    return layer_ops.join_heads(qkv, offset, base=10000.0, past=past, **options)


def _norm_of_a_sum(h: mx.array, weight: mx.array, delta: mx.array) -> mx.array:
    return layer_ops.norm(h, weight, 1e-5, delta)


def _gate_norm(o: mx.array, c: mx.array, xz: mx.array, residual_weight: mx.array, weight: mx.array) -> mx.array:
    """gate_norm as training calls it."""
    _, z = split(xz, c.shape[-1])
    return layer_ops.gate_norm(o, c, xz, residual_weight, weight, 1e-5, z)


def _vjp(function: Callable[..., Any], inputs: tuple[mx.array, ...]) -> Callable[..., list[mx.array]]:
    """The gradients of a function in all of its inputs, for random gradients of its outputs."""
    with use_backend("plain"):
        cotangents = [_normal(*output.shape).astype(output.dtype) for output in _flat(function(*inputs))]
    return lambda *inputs: mx.vjp(function, list(inputs), cotangents)[1]


def _conv_gate_in_training(xz: mx.array, *rest: mx.array, marks: mx.array | None) -> tuple[mx.array, mx.array]:
    """c and v as training takes them; v in c's type, which kernels keep it in."""
    x, _ = split(xz, xz.shape[-1] // 2)
    function: Any = partial(layer_ops.conv_gate, marks=marks, x=x)
    c, v, _ = function(xz, *rest)
    return c, v.astype(c.dtype)


def _few_through_a_low_rank(
    inputs: tuple[mx.array, ...], marks: mx.array | None
) -> tuple[Callable[..., Any], tuple[mx.array, ...]]:
    """conv_gate's inputs cut to so few tokens that u's last product is made in the kernel."""
    xz, u, *others = inputs
    few, rank = min(u.shape[1], layer_ops.FEW_ROWS // u.shape[0]), 8
    expand = (_normal(u.shape[2], rank) * rank**-0.5).astype(u.dtype)

    def run(xz: mx.array, low: mx.array, expand: mx.array, *others: mx.array) -> tuple[mx.array, ...]:
        cut = None if marks is None else marks[:, :few]
        function: Any = partial(layer_ops.conv_gate, marks=cut, expand=expand)
        c, v, tail = function(xz, low, *others)
        return c, v.astype(c.dtype), tail  # plain MLX rounds u, which the kernel does not

    return run, (xz[:, :few], u[:, :few, :rank], expand, *others)


def _mix(*inputs: mx.array, marks: mx.array | None) -> tuple[mx.array, mx.array]:
    return mix(*inputs[:-1], state=inputs[-1], marks=marks, norm_floor=1e-5, norm_epsilon=1e-5, z=None)


def _recurrence(
    qkgt: mx.array, bias: mx.array, v: mx.array, state: mx.array, marks: mx.array | None
) -> tuple[mx.array, mx.array]:
    return selective_recurrence(qkgt, bias, v, 1e-5, state, marks)


def _recurrence_inputs(s: Sizes, dtype: mx.Dtype, strength: float) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Projections whose decays run from none to about exp(-strength), and v and state to go with them."""
    q, k, t = (_normal(s.batch, s.tokens, s.keys) for _ in range(3))
    g = mx.random.uniform(-8.0, strength, (s.batch, s.tokens, s.keys))
    qkgt = mx.concatenate([q, k, g, t + 1], axis=-1).astype(dtype)
    bias = _normal(2 * s.keys).astype(dtype)
    return qkgt, bias, _normal(s.batch, s.tokens, s.values).astype(dtype), _normal(s.batch, s.keys, s.values)


def _gates64(qkgt: mx.array, bias: mx.array, v: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    q, k, g, t = mx.split(qkgt, 4, axis=-1)
    bias_g, bias_t = mx.split(bias, 2)
    g, t = mx.logaddexp(g + bias_g, mx.zeros_like(g)), mx.sigmoid(t + bias_t)
    norm = mx.maximum(mx.sqrt((k * k).sum(axis=-1, keepdims=True)), mx.array(1e-5, dtype=k.dtype))
    return q, k / norm * mx.exp(t * mx.log(g)), v, -g * t


def _normal(*shape: int) -> mx.array:
    return mx.random.normal(shape)


def _flat(outputs: Any) -> list[mx.array]:
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
