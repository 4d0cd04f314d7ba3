"""What is compared with what, and how near it must be, by the tests in the emulator and by gpu_check.py on a GPU.

Kernels with plain MLX (rodimus_mlx.kernels.check), the recurrence with float64, and whole small models with plain MLX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from helpers import random_model, random_tokens, relative_error, run_in_steps, tiny_config
from mlx.utils import tree_flatten

from rodimus_mlx.kernels.backend import Wish, use_backend
from rodimus_mlx.kernels.check import ODD_SIZES, Sizes
from rodimus_mlx.model import Model

SIZES = ODD_SIZES

DECAYS = {"almost none": -7.0, "to -1": 0.0, "to -5": 5.0, "to -50": 50.0}  # a step, in logs
DECAY_SIZES = Sizes(1, 150, 64, 40)
# Relative errors of the recurrence against float64. 16 bits: half a unit in the last place of what is rounded to them.
# float32: sums over the tokens, of terms that cancel in d_bias.
FLOAT64 = {mx.float32: 2e-5, mx.float16: 5e-4, mx.bfloat16: 2e-3}
STATE = 4e-6  # the state is float32 whatever the values are; where nothing decays, a sum of 150 terms

# Relative errors of whole models against plain MLX. float32: sums in another order, through two layers and back.
# 16 bits: where such a sum falls to the other side of a rounding border, the layers behind go on from there.
MODELS = {mx.float32: 2e-5, mx.float16: 5e-3, mx.bfloat16: 2e-2}
# Values kept in 16 bits, which plain MLX keeps in float32; either is 4e-2 from float32's logits in bfloat16.
LONG = {**MODELS, mx.bfloat16: 3e-2}
# Gradients in 16 bits: kernels keep v and o in them, plain MLX in float32; both are as far from float32's gradients.
GRADIENTS = {mx.float32: 2e-5, mx.float16: 1e-2, mx.bfloat16: 8e-2}

Outputs = dict[str, mx.array]


def model_bound(case: str, dtype: mx.Dtype) -> float:
    """What the errors of a case must keep."""
    if case == "long prompt":
        return LONG[dtype]
    return (GRADIENTS if case.startswith("gradients") else MODELS)[dtype]


def model_errors(case: str, block_type: str, dtype: mx.Dtype, backend: Wish) -> dict[str, float]:
    """Relative errors of everything that a case computes, by name."""
    model = random_model(tiny_config(block_type, **CHANGES.get(case, {})))
    model.set_dtype(dtype)
    with use_backend(backend):
        found = CASES[case](model)
        mx.eval(found)
    with use_backend("plain"):
        expected = CASES[case](model)
        mx.eval(expected)
    return {name: relative_error(found[name], value) for name, value in expected.items()}


def _cuts(model: Model) -> Outputs:
    """A prompt in pieces: one token, a few, less and more than a chunk."""
    cache = model.make_cache()
    logits = run_in_steps(model, random_tokens(model, 1, 210), [1, 70, 2, 137], cache)
    return {"logits": logits} | _states(cache)


def _long_prompt(model: Model) -> Outputs:
    """Pieces from which heads are joined to the window before, and sizes that the matrix units take."""
    cache = model.make_cache()
    logits = run_in_steps(model, random_tokens(model, 1, 599), [300, 3, 256, 40], cache)
    return {"logits": logits} | _states(cache)


def _decode(model: Model) -> Outputs:
    """A prompt, then token by token, inside the window and beyond it."""
    return {"logits": run_in_steps(model, random_tokens(model, 2, 21), [3, *[1] * 18])}


def _padded(model: Model) -> Outputs:
    mask = mx.array(np.arange(75) >= np.array([[0], [19]]))
    logits = model(random_tokens(model, 2, 75), mask=mask)
    return {"logits": mx.where(mask[..., None], logits, 0)}


def _packed(model: Model) -> Outputs:
    documents = mx.array(np.searchsorted([1, 5, 40, 64, 65], np.arange(75), side="right")[None])
    return {"logits": model(random_tokens(model, 1, 75), documents=documents)}


def _batched(model: Model) -> Outputs:
    """Rows of different lengths join, read texts padded on the right, and go on token by token."""
    apart = [model.make_cache() for _ in range(2)]
    for cache, length in zip(apart, (3, 20)):
        run_in_steps(model, random_tokens(model, 1, length), [length], cache)
    cache = [type(first).merge([first, second]) for first, second in zip(*apart)]
    lengths = [30, 12]
    for layer in cache:
        layer.prepare(lengths=lengths, right_padding=[max(lengths) - length for length in lengths])
    read = run_in_steps(model, random_tokens(model, 2, max(lengths)), [max(lengths)], cache)
    for layer in cache:
        layer.finalize()
    after = run_in_steps(model, random_tokens(model, 2, 3, seed=1), [1, 1, 1], cache)
    real = mx.array(np.arange(max(lengths)) < np.array(lengths)[:, None])
    return {"read": mx.where(real[..., None], read, 0), "after": after}


def _gradients(model: Model) -> Outputs:
    """In training, with padding: the loss and its gradient in every parameter."""
    mask = mx.array(np.arange(74) >= np.array([[0], [19]]))
    return _loss_and_gradients(model, mask, mask=mask)


def _packed_gradients(model: Model) -> Outputs:
    """The same of packed documents."""
    documents = np.searchsorted([1, 5, 40, 64, 65], np.arange(74), side="right")
    return _loss_and_gradients(model, mx.ones((2, 74)), documents=mx.array(np.stack([documents, documents[::-1]])))


def _loss_and_gradients(model: Model, weights: mx.array, **options: mx.array) -> Outputs:
    tokens = random_tokens(model, 2, 75)

    def loss(model: Model) -> mx.array:
        logits = model(tokens[:, :-1], **options).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, tokens[:, 1:])
        return (losses * weights).sum() / weights.sum()

    model.train()
    value, gradients = nn.value_and_grad(model, loss)(model)
    model.eval()
    return {"loss": value} | dict(tree_flatten(gradients))


def _states(cache: list[Any]) -> Outputs:
    mixers = [getattr(layer, "caches", [layer])[0] for layer in cache]
    return {f"state {i}": mixer[1] for i, mixer in enumerate(mixers)}


# Sizes other than helpers.tiny_config's, which no matrix unit takes.
CHANGES: dict[str, dict[str, Any]] = {
    "long prompt": {"d_model": 64, "mixer_cfg": {"expand_ratio": 1.0, "mem_size": 16}, "attn_cfg": {"num_heads": 4}},
    "more keys than kernels take": {"mixer_cfg": {"mem_size": 260}},
    "one tap": {"mixer_cfg": {"d_conv": 1}},
}
CASES: dict[str, Callable[[Model], Outputs]] = {
    "prompt in cuts": _cuts,
    "long prompt": _long_prompt,
    "decode": _decode,
    "padded batch": _padded,
    "packed documents": _packed,
    "joined batch": _batched,
    "gradients": _gradients,
    "gradients, packed": _packed_gradients,
    "more keys than kernels take": _cuts,
    "one tap": _cuts,
}
