"""Two models on one text: what quantizing cost, and whether the cost grows with the length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..cache import mixer_cache
from ..errors import RodimusError
from .perplexity import Progress, Tally, bounds, checked, exp, planned
from .text import Rows

DRIFT_POSITIONS = tuple(64 * 2**i for i in range(15))  # tokens after which states are compared: 64, 128, ... 1M


def compare(
    a: Any,
    b: Any,
    documents: Sequence[np.ndarray],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Read a text with both models and set their predictions and states side by side.

    Args:
        a: the reference, usually the model that is not quantized.
        b: the other one.
        documents, window, stride, batch: as for `perplexity`.

    Returns:
        ``tokens``; ``a`` and ``b`` with ``loss`` and ``perplexity``; ``kl``, the mean of KL(a || b) over the next
        token's distributions, in nats; ``top1``, how often both find the same token likeliest; ``buckets``, the same
        by position; ``drift``, None where the models' states differ in shape, else ``positions`` (tokens read)
        and ``layers``: for each layer |S_b - S_a| / |S_a| of its recurrent state there, in Frobenius norms.

    Raises:
        RodimusError: the vocabularies differ, or as for `perplexity`.
    """
    if a.args.vocab_size != b.args.vocab_size:
        sizes = f"{a.args.vocab_size} and {b.args.vocab_size}"
        raise RodimusError(f"the models have vocabularies of {sizes}: their predictions cannot be compared")
    cut, window, stride = checked(a, documents, window, stride, batch)
    tally = Tally(("loss", "other", "kl", "top1"))
    drift = _Drift(a, b)
    for rows, steps in planned(cut, batch, 2 * a.args.vocab_size, progress, drift.positions):
        caches = [a.make_cache(), b.make_cache()]
        for start, stop in steps:
            tokens = mx.array(rows.tokens[:, start:stop])
            logits = [model(tokens, cache=cache) for model, cache in zip((a, b), caches)]
            values = _values(logits[0], logits[1], mx.array(rows.targets[:, start:stop]))
            tally.add(start, rows.counts[:, start:stop], **values)
            drift.add(stop, rows, caches)
    return {
        **_figures(tally, None),
        "window": window,
        "stride": stride,
        "buckets": [{**bounds(bucket), **_figures(tally, bucket)} for bucket in tally.buckets()],
        "drift": drift.result(),
    }


class _Drift:
    """How far the states of b are from those of a, by layer and position."""

    def __init__(self, a: Any, b: Any):
        shapes = [(model.args.n_layer, model.args.mem_size, model.args.d_inner) for model in (a, b)]
        self.positions = DRIFT_POSITIONS if shapes[0] == shapes[1] else ()
        self.sums = {position: np.zeros(a.args.n_layer) for position in self.positions}
        self.counts = dict.fromkeys(self.positions, 0)

    def add(self, position: int, rows: Rows, caches: list[list[Any]]) -> None:
        real = rows.lengths >= position  # the others have read padding by now
        if position not in self.counts or not real.any():
            return
        errors = [_relative(mixer_cache(x)[1], mixer_cache(y)[1]) for x, y in zip(*caches)]
        self.sums[position] += np.array(mx.stack(errors))[:, real].sum(1)
        self.counts[position] += int(real.sum())

    def result(self) -> dict[str, Any] | None:
        reached = [position for position in self.positions if self.counts[position]]
        if not reached:
            return None
        means = np.stack([self.sums[position] / self.counts[position] for position in reached], axis=1)
        return {"positions": reached, "layers": means.tolist()}


def _relative(a: mx.array, b: mx.array) -> mx.array:
    """|b - a| / |a| of states [R, n, D], a row: [R]."""
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    size = mx.sqrt((a * a).sum((1, 2)))
    return mx.sqrt(((b - a) ** 2).sum((1, 2))) / mx.maximum(size, 1e-30)


def _values(logits_a: mx.array, logits_b: mx.array, targets: mx.array) -> dict[str, np.ndarray]:
    """For each token: both losses, KL(a || b), and whether the likeliest token is the same."""
    a, b = (x.astype(mx.float32) - mx.logsumexp(x.astype(mx.float32), -1, keepdims=True) for x in (logits_a, logits_b))
    losses = [-mx.take_along_axis(x, targets[..., None], axis=-1).squeeze(-1) for x in (a, b)]
    kl = (mx.exp(a) * (a - b)).sum(-1)
    same = mx.argmax(a, -1) == mx.argmax(b, -1)
    mx.eval(losses, kl, same)
    return {"loss": np.array(losses[0]), "other": np.array(losses[1]), "kl": np.array(kl), "top1": np.array(same)}


def _figures(tally: Tally, bucket: int | None) -> dict[str, Any]:
    losses = {name: tally.mean(key, bucket) for name, key in (("a", "loss"), ("b", "other"))}
    return {
        "tokens": tally.tokens if bucket is None else int(tally.sums[-1][bucket]),
        **{name: {"loss": loss, "perplexity": exp(loss)} for name, loss in losses.items()},
        "kl": tally.mean("kl", bucket),
        "top1": tally.mean("top1", bucket),
    }
