"""Cross entropy from the last hidden states, without a tokens x vocabulary matrix.

The head is applied to some tokens at a time. Where gradients are wanted, each part's are taken at once, while its
logits exist, and scaled later by the cotangent: no part's logits are kept or computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

LOGIT_BYTES = 1 << 28  # of one part's logits
MIN_TOKENS = 64  # in a part, however large the vocabulary

Head = Callable[[Any, mx.array], mx.array]


def tokens_in_part(vocab_size: int, dtype: mx.Dtype) -> int:
    """Tokens whose logits fill about LOGIT_BYTES: a power of two."""
    tokens = LOGIT_BYTES // (vocab_size * dtype.size)
    return max(MIN_TOKENS, 1 << max(tokens, 1).bit_length() - 1)


def cross_entropy(
    head: Head, parameters: Any, h: mx.array, targets: mx.array, weights: mx.array, part: int
) -> mx.array:
    """sum_i weights_i * -log softmax(head(parameters, h_i))[targets_i], differentiable in parameters and h.

    Shapes:
        head: (parameters, [N, d]) -> logits [N, V]
        parameters: the head's trainable arrays, any tree, maybe empty
        h: [N, d]; targets, weights: [N]
        part: tokens to take at a time

    Returns:
        a float32 scalar.
    """
    pieces = [(targets[i : i + part], weights[i : i + part]) for i in range(0, h.shape[0], part)]

    @mx.custom_function
    def total(parameters: Any, h: mx.array) -> tuple[mx.array, Any, list[mx.array]]:
        gradient: Any = mx.value_and_grad(partial(_piece, head), argnums=(0, 1))
        loss, of_parameters = mx.array(0.0), None
        of_h: list[mx.array] = []
        for i, (t, w) in enumerate(pieces):
            x = h[i * part : (i + 1) * part]
            if of_h:  # not before the last part is done with its logits
                x = mx.depends([x], [loss, of_h[-1]])[0]
            value, (gp, gx) = gradient(parameters, x, t, w)
            loss = loss + value
            of_parameters = gp if of_parameters is None else tree_map(mx.add, of_parameters, gp)
            of_h.append(gx)
        return loss, of_parameters, of_h

    @total.vjp
    def total_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
        scale = cotangents[0]
        of_h = mx.concatenate(outputs[2])
        return tree_map(lambda g: (scale * g).astype(g.dtype), (outputs[1], of_h))

    result: Any = total(parameters, h)
    return result[0]


def cross_entropy_value(
    head: Head, parameters: Any, h: mx.array, targets: mx.array, weights: mx.array, part: int
) -> mx.array:
    """`cross_entropy` for evaluation: no gradients are prepared."""
    loss = mx.array(0.0)
    for i in range(0, h.shape[0], part):
        x = mx.depends([h[i : i + part]], [loss])[0]
        loss = loss + _piece(head, parameters, x, targets[i : i + part], weights[i : i + part])
    return loss


def _piece(head: Head, parameters: Any, h: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    logits = head(parameters, h)
    if mx.default_device() == mx.gpu and hasattr(mx.fast, "cross_entropy"):
        losses = mx.fast.cross_entropy(logits, targets)  # sums in float32 whatever the type of the logits
    else:
        losses = nn.losses.cross_entropy(logits.astype(mx.float32), targets)
    return (losses * weights).sum()
