"""A Transformer of mlx-lm's (llama's blocks) in the shape that this project's trainer takes, for comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache
from mlx_lm.models.llama import ModelArgs, TransformerBlock

from rodimus_mlx.finetune import trainer
from rodimus_mlx.finetune.data import Sample
from rodimus_mlx.finetune.settings import Settings

DEVIATION = 0.02


class _Body(nn.Module):
    """Embedding, blocks and the last norm, under the names that the trainer knows."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [TransformerBlock(args) for _ in range(args.num_hidden_layers)]
        self.norm_f = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(
        self,
        tokens: mx.array,
        cache: list[Any] | None = None,
        mask: mx.array | None = None,
        documents: mx.array | None = None,
    ) -> mx.array:
        """tokens [B, L] -> [B, L, d]; documents as in this project's models: tokens see their own alone."""
        h, dtype = self.embeddings(tokens).astype(mx.float32), self.norm_f.weight.dtype  # residuals in float32, as ours
        seen: mx.array | str | None = "causal" if tokens.shape[1] > 1 else None
        if documents is not None:
            order = mx.arange(tokens.shape[1])
            seen = (documents[:, None, :, None] == documents[:, None, None, :]) & (order[:, None] >= order)
        for layer, layer_cache in zip(self.layers, cache or [None] * len(self.layers)):
            h = h + layer.self_attn(layer.input_layernorm(h).astype(dtype), seen, layer_cache)
            h = h + layer.mlp(layer.post_attention_layernorm(h).astype(dtype))
        return self.norm_f(h).astype(dtype)


class Transformer(nn.Module):
    """Tokens [B, L] to logits [B, L, vocab], the embedding being the head too."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model = _Body(args)

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None, **options: Any) -> mx.array:
        return self.head(self.model(tokens, cache, **options))

    def head(self, h: mx.array) -> mx.array:
        """The last norm's output -> logits."""
        return self.model.embeddings.as_linear(h)

    @property
    def layers(self) -> list[TransformerBlock]:
        """The blocks."""
        return self.model.layers

    def make_cache(self) -> list[Any]:
        """An empty cache, one entry a layer."""
        return [KVCache() for _ in self.layers]


def initialize(config: Mapping[str, Any], seed: int = 0) -> Transformer:
    """Random float32 weights as GPT-2 and llama start: normal, what enters the residual stream divided by sqrt(2 N)."""
    mx.random.seed(seed)
    model = Transformer(ModelArgs.from_dict(dict(config)))
    rescale = (2 * len(model.layers)) ** -0.5
    for layer in model.layers:
        for part, names in ((layer.self_attn, ("q_proj", "k_proj", "v_proj")), (layer.mlp, ("gate_proj", "up_proj"))):
            for name in names:
                part[name].weight = _normal(part[name].weight)
        for out in (layer.self_attn.o_proj, layer.mlp.down_proj):
            out.weight = _normal(out.weight) * rescale
    model.model.embeddings.weight = _normal(model.model.embeddings.weight)
    mx.eval(model.parameters())
    return model


def train(
    model: Transformer,
    samples: Sequence[Sample],
    settings: Settings,
    valid: Sequence[Sample] = (),
    out: Path | None = None,
    observers: Iterable[trainer.Observer] = (),
) -> trainer.Result:
    """The trainer's `train` for this model."""
    run = _Run(model, samples, settings, valid, out, list(observers), {})
    with run.changes:
        run.set_up()
        return run.go()


class _Run(trainer._Run):
    """The trainer's run without its forecast of memory, which knows Rodimus alone."""

    def begin(self) -> None:
        self.tell("start", step=self.step, iters=self.iters, trainable=sum(p.size for p in self.parameters.values()))


def _normal(like: mx.array) -> mx.array:
    return mx.random.normal(like.shape) * DEVIATION
