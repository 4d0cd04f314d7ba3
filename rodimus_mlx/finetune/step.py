"""One training step as pure functions: loss and gradients, the update, and the loss for evaluation.

What is trained travels as a flat dict, name -> float32 array, outside the model; the model gets a copy in the type of
the computation while a function runs (mixed precision: float32 weights and optimizer, bfloat16 products). Arrays that
the model itself uses in float32 are not rounded: the embedding, whose rows add up many gradients, the gates' biases,
the convolution, the residual weight, the initial state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.nn.utils import average_gradients
from mlx.utils import tree_map

from .batches import Batch, cut
from .dropout import Keys
from .loss import cross_entropy, cross_entropy_value, tokens_in_part
from .parameters import Parameters, lent, named, nested
from .segments import Memory, close_memory, open_memory

_IN_FLOAT32 = (
    "embeddings.weight",
    "gate_bias",
    "value_bias",
    "conv.weight",
    "conv.bias",
    "residual_weight",
    "initial_state",
)


def compute_dtype(model: Any, wanted: str) -> mx.Dtype:
    """The type to compute in: the model's own unless told otherwise; never 16 bit on a CPU, nor float16.

    bfloat16 in place of float16 because gradients may be too small for the latter.
    """
    if wanted != "auto":
        return {"float32": mx.float32, "bfloat16": mx.bfloat16}[wanted]
    own = model.model.norm_f.weight.dtype
    if own == mx.float32 or mx.default_device() == mx.cpu:
        return mx.float32
    return mx.bfloat16


def gradient_function(model: Any, dtype: mx.Dtype, keys: Keys) -> Callable[..., tuple[mx.array, Any, Parameters]]:
    """A function (parameters, batch, memory, key, scale, total) -> (loss, memory, total).

    The loss is the sum over the batch's targets times ``scale``; its gradients are added to ``total`` (None: zeros).
    ``memory`` is what earlier segments of the rows left (None: rows are whole); ``key`` is for dropout, [2] uint32.
    """

    def loss(parameters: Parameters, batch: Batch, memory: Memory | None, scale: mx.array) -> Any:
        h, memory = _hidden(model, batch, memory)
        value = cross_entropy(*_head(model, parameters, h, dtype), *_flat(batch), _part(model, h))
        return value * scale, memory

    def gradient(
        parameters: Parameters, batch: Any, memory: Any, key: mx.array, scale: mx.array, total: Any
    ) -> tuple[mx.array, Any, Parameters]:
        def inner(parameters: Parameters) -> Any:
            with lent(model, nested(cast(parameters, dtype))):
                return loss(parameters, Batch(*batch), memory, scale)

        model.train()
        keys.step = key
        (value, after), gradients = mx.value_and_grad(inner)(parameters)
        keys.step = None
        return value, after, gradients if total is None else tree_map(mx.add, total, gradients)

    return compiled(gradient)


def loss_function(model: Any, dtype: mx.Dtype) -> Callable[..., tuple[mx.array, Any]]:
    """A function (parameters, batch, memory) -> (summed loss, memory)."""

    def value(parameters: Parameters, batch: Any, memory: Memory | None) -> tuple[mx.array, Any]:
        model.eval()
        batch = Batch(*batch)
        with lent(model, nested(cast(parameters, dtype))):
            h, memory = _hidden(model, batch, memory)
            return cross_entropy_value(*_head(model, parameters, h, dtype), *_flat(batch), _part(model, h)), memory

    return compiled(value)


def update_function(optimizer: optim.Optimizer, max_norm: float) -> Callable[..., tuple[Any, ...]]:
    """A function (parameters, state, gradients, loss) -> (parameters, state, loss, gradients' norm).

    ``state`` is the optimizer's. Loss and gradients are averaged over processes first; then the gradients are clipped
    to ``max_norm`` (0: never).
    """

    def update(parameters: Parameters, state: Any, gradients: Parameters, loss: mx.array) -> tuple[Any, ...]:
        gradients, loss = average_gradients((gradients, loss))
        gradients, norm = optim.clip_grad_norm(gradients, max_norm or float("inf"))
        optimizer.state = state
        updated = optimizer.apply_gradients(nested(gradients), nested(parameters))
        after = named(updated)
        # In their old order, which sums over all of them follow: a run that goes on from a file starts with it too.
        return {name: after[name] for name in parameters}, optimizer.state, loss, norm

    return compiled(update)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for a GPU; on a CPU that gains nothing and takes a C++ compiler's time for each new shape."""
    return mx.compile(function) if mx.default_device() == mx.gpu else function


def cast(parameters: Parameters, dtype: mx.Dtype) -> Parameters:
    """The copy that is computed with."""
    return {n: p if n.endswith(_IN_FLOAT32) else p.astype(dtype) for n, p in parameters.items()}


def initial_optimizer_state(optimizer: optim.Optimizer, parameters: Parameters) -> Any:
    """The optimizer's state before the first step."""
    optimizer.init(nested(parameters))
    return optimizer.state


def pieces(batch: Batch, length: int) -> Iterator[Batch]:
    """A batch cut along its rows into segments, the last maybe shorter; 0: not cut."""
    step = length or batch.tokens.shape[1]
    for begin in range(0, batch.tokens.shape[1], step):
        yield cut(batch, columns=slice(begin, begin + step))


def on_device(batch: Batch) -> tuple[mx.array | None, ...]:
    """A batch's arrays as MLX's; a plain tuple, as `mx.compile` takes it."""
    return tuple(None if x is None else mx.array(x) for x in batch)


def _hidden(model: Any, batch: Batch, memory: Memory | None) -> tuple[mx.array, Memory | None]:
    """The last norm's output [B, L, d]."""
    if memory is None:
        return model.model(batch.tokens, documents=batch.documents), None
    caches = open_memory(model.args, memory)
    h = model.model(batch.tokens, caches)
    return h, close_memory(memory, caches, h.shape[1])


def _head(model: Any, parameters: Parameters, h: mx.array, dtype: mx.Dtype) -> tuple[Any, Parameters, mx.array]:
    """The output head as a function of its own trainable parameters; those; and its inputs [B * L, d]."""
    prefix = "lm_head." if "lm_head" in model else "model.embeddings."
    own = {name: p.astype(dtype) for name, p in parameters.items() if name.startswith(prefix)}

    def head(own: Parameters, h: mx.array) -> mx.array:
        model.update(nested(own))
        return model.head(h)

    return head, own, h.reshape(-1, h.shape[-1])


def _flat(batch: Batch) -> tuple[Any, Any]:
    return batch.targets.reshape(-1), batch.weights.reshape(-1)


def _part(model: Any, h: mx.array) -> int:
    return tokens_in_part(model.args.vocab_size, h.dtype)
