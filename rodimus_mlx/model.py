"""The language model: tokens -> embedding -> blocks -> norm -> logits.

Symbols, here and in the layers: B batch, L or T tokens, d model width, D width of the values, n key size,
H query heads, h the residual stream (float32 through all layers where the config says residual_in_fp32).
"""

from __future__ import annotations

import contextlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .attention import AttentionMasks, SharedKeyAttention, decode_mask
from .cache import (
    arrays_of,
    attention_cache,
    make_cache,
    mixer_cache,
    place,
    put_back,
    recall,
    remember,
    steady,
)
from .compiled import PROMPT_STEP, CompiledParts
from .config import RodimusConfig
from .kernels.backend import active_backend
from .layer_ops import add_norm, norm, swiglu
from .marks import START, TOKEN
from .mixer import DDTSMixer

EAGER_LAYERS = 2  # of a long prompt's layers, after which what is built so far is given to the GPU


class FFN(nn.Module):
    """Gated linear unit: out_proj(silu(gate) * value), value first in `fc`."""

    def __init__(self, config: RodimusConfig):
        super().__init__()
        self.fc = nn.Linear(config.d_model, 2 * config.d_ffn, bias=False)  # value | gate
        self.out_proj = nn.Linear(config.d_ffn, config.d_model, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, L, d] -> [B, L, d]."""
        return self.out_proj(swiglu(self.fc(x), self.training))


class RodimusBlock(nn.Module):
    """h <- h + mixer(norm(h)).

    Blocks hand on the stream h and, apart, what is still to be added to it, so that each sum is made in one pass with
    the norm behind it. Their parts are pure functions of arrays, compiled while decoding.
    """

    def __init__(self, config: RodimusConfig):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.d_model, eps=config.norm_epsilon)
        self.mixer = DDTSMixer(config)
        self.compiled = CompiledParts()

    def __call__(
        self, h: mx.array, delta: mx.array | None, masks: Masks, cache: Any = None
    ) -> tuple[mx.array, mx.array]:
        """h and delta [B, L, d] -> the same for the next block; moves the cache on."""
        mix = self.compiled.part(self, self._mix, [self.mixer_norm, self.mixer], h.shape[1])
        h, delta, *memory = mix(h, delta, *recall(cache), masks.marks)
        remember(cache, memory, h.shape[1])
        return h, delta

    def step(
        self, h: mx.array, delta: mx.array | None, offset: mx.array, index: mx.array, *memory: mx.array
    ) -> tuple[mx.array, ...]:
        """One token on arrays alone: h, delta and the mixer's tail and state -> the same after it."""
        return self._mix(h, delta, *memory, None, None)

    def _mix(self, h: mx.array, delta: mx.array | None, *memory_and_marks: mx.array | None) -> tuple[mx.array, ...]:
        h, x = add_norm(h, delta, self.mixer_norm.weight, self.mixer_norm.eps, self.training)
        tail, state, lengths, marks = memory_and_marks
        return h, *self.mixer(x, tail, state, marks, lengths)


class RodimusPlusBlock(RodimusBlock):
    """m <- h + mixer(norm(h));  h <- m + ffn(norm(m + attn(norm(m)))): the two-hop residual (paper, section 3.5).

    The attention's output reaches the stream through the FFN alone.
    """

    def __init__(self, config: RodimusConfig):
        super().__init__(config)
        self.attn_norm = nn.RMSNorm(config.d_model, eps=config.norm_epsilon)
        self.attn = SharedKeyAttention(config)
        self.ffn_norm = nn.RMSNorm(config.d_model, eps=config.norm_epsilon)
        self.ffn = FFN(config)

    def __call__(
        self, h: mx.array, delta: mx.array | None, masks: Masks, cache: Any = None
    ) -> tuple[mx.array, mx.array]:
        """h and delta [B, L, d] -> the same for the next block; moves the cache on."""
        batch, length, _ = h.shape
        keys = attention_cache(cache)
        past = self.attn.past(keys, batch, length)
        modules = [self.mixer_norm, self.mixer, self.attn_norm, self.attn]
        before = self.compiled.part(self, self._before_attention, modules, length)
        m, q, k, v, *memory = before(h, delta, masks.offset, past, *recall(cache), masks.marks)
        remember(cache, memory, length)
        if past is None:
            heads = self.attn.attend(q, k, v, masks.attention, keys)
        else:
            heads = self.attn.attend_joined(q, k, v, length, masks.attention, keys)
        after = self.compiled.part(self, self._after_attention, [self.attn, self.ffn_norm, self.ffn], length)
        return m, after(m, heads)

    def step(
        self, h: mx.array, delta: mx.array | None, offset: mx.array, index: mx.array, *memory: mx.array
    ) -> tuple[mx.array, ...]:
        """One token on arrays alone; memory: tail, state, and a full window of keys and values, in which the token at
        `index`, the oldest, is replaced."""
        tail, state, keys, values = memory
        m, q, k, v, *mixed = self._before_attention(h, delta, offset, None, tail, state, None, None)
        keys, values = (_replaced(old, new, index) for old, new in ((keys, k), (values, v)))
        delta = self._after_attention(m, self.attn.attend(q, keys, values, full=True))
        return m, delta, *mixed, keys, values

    def _before_attention(
        self,
        h: mx.array,
        delta: mx.array | None,
        offset: mx.array,
        past: tuple[mx.array, ...] | None,
        *memory_and_marks: mx.array | None,
    ) -> tuple[mx.array, ...]:
        h, mixed, *memory = self._mix(h, delta, *memory_and_marks)
        m, x = add_norm(h, mixed, self.attn_norm.weight, self.attn_norm.eps, self.training)
        return m, *self.attn.project(x, offset, past), *memory

    def _after_attention(self, m: mx.array, heads: mx.array) -> mx.array:
        a = self.attn.out_proj(heads)
        return self.ffn(norm(m, self.ffn_norm.weight, self.ffn_norm.eps, a, self.training))


class Masks:
    """What the layers must know of padding, documents and place, worked out once for all of them.

    marks: [B, L] uint8 for the mixers, as in marks.py; None: every token is real, and one document a row.
    offset: the place of the first token, one number or [B].
    """

    def __init__(self, length: int, mask: mx.array | None, documents: mx.array | None, cache: list[Any] | None):
        self.marks = None
        self.offset = mx.array(0)
        if documents is not None:
            first = mx.pad(documents[:, 1:] != documents[:, :-1], [(0, 0), (1, 0)], constant_values=True)
            self.marks = mx.where(first, START, TOKEN).astype(mx.uint8)
            documents = mx.cumsum(first, axis=1)  # a number used again is another document
        if cache is None:
            self.attention = AttentionMasks(mask, documents)
        else:
            mask = mixer_cache(cache[0]).make_mask(length)
            keys = attention_cache(cache[0])
            self.attention = AttentionMasks(single=decode_mask(keys) if keys is not None and length == 1 else None)
            if keys is not None:
                self.offset = mx.array(keys.offset)
        if mask is not None:
            self.marks = mask.astype(mx.uint8)


class RodimusModel(nn.Module):
    """Everything but the output head."""

    def __init__(self, config: RodimusConfig):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.embedding_scale = config.mem_size**0.5 if config.use_scale_embedding else None
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        if config.use_norm_embedding:
            self.embed_norm = nn.RMSNorm(config.d_model, eps=config.norm_epsilon)
        block = RodimusPlusBlock if config.has_attention else RodimusBlock
        self.layers = [block(config) for _ in range(config.n_layer)]
        self.norm_f = nn.RMSNorm(config.d_model, eps=config.norm_epsilon)
        self.compiled = CompiledParts()

    def __call__(
        self,
        tokens: mx.array,
        cache: list[Any] | None = None,
        mask: mx.array | None = None,
        documents: mx.array | None = None,
    ) -> mx.array:
        """tokens [B, L] -> the last norm's output [B, L, d]; the arguments are `Model`'s."""
        if cache is not None and tokens.shape[1] == 1 and not self.training and steady(cache):
            return self._steady_step(tokens, cache)
        h = self._embed(tokens)
        masks = Masks(tokens.shape[1], mask, documents, cache)
        delta = None
        on_gpu = active_backend() is not None
        eager = on_gpu and cache is not None and not self.training and tokens.shape[1] >= PROMPT_STEP
        for i, (layer, layer_cache) in enumerate(zip(self.layers, cache or [None] * len(self.layers)), 1):
            h, delta = layer(h, delta, masks, layer_cache)
            if eager and i % EAGER_LAYERS == 0:
                _start_computing(h, delta)
        return norm(h, self.norm_f.weight, self.norm_f.eps, delta, self.training)

    def _embed(self, tokens: mx.array) -> mx.array:
        h = self.embeddings(tokens)
        if self.embedding_scale is not None:
            h = h * self.embedding_scale
        if "embed_norm" in self:
            h = self.embed_norm(h)
        if self.residual_in_fp32:
            h = h.astype(mx.float32)
        return h

    def _steady_step(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """One token when all caches have their final shapes: a graph compiled once serves every such token."""
        step = self.compiled.part(self, self._step_on_arrays, [self], 1)
        h, *arrays = step(tokens, *place(cache), *arrays_of(cache))
        put_back(cache, arrays)
        return h

    def _step_on_arrays(self, tokens: mx.array, offset: mx.array, index: mx.array, *arrays: mx.array) -> tuple:
        h, delta = self._embed(tokens), None
        after: list[mx.array] = []
        each = len(arrays) // len(self.layers)
        for i, layer in enumerate(self.layers):
            h, delta, *kept = layer.step(h, delta, offset, index, *arrays[i * each : (i + 1) * each])
            after += kept
        return norm(h, self.norm_f.weight, self.norm_f.eps, delta, self.training), *after


class Model(nn.Module):
    """A Rodimus or Rodimus+ language model, with the interface that mlx-lm expects of one.

    On a GPU, gradients need `model.train()`: in evaluation, kernels run that have none.
    """

    def __init__(self, config: RodimusConfig):
        super().__init__()
        self.args = config
        self.model_type = "rodimus"
        self.model = RodimusModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def __call__(
        self,
        tokens: mx.array,
        cache: list[Any] | None = None,
        mask: mx.array | None = None,
        documents: mx.array | None = None,
    ) -> mx.array:
        """Logits of the next token at every position.

        Shapes:
            tokens: [B, L] integers
            cache: from `make_cache`, moved on by L tokens; the result does not depend on how a text is cut into calls
            mask: [B, L] bool, False for padding; without a cache, which knows its own padding
            documents: [B, L] integers, where several documents are packed in a row: each run of a number's tokens gets
                the logits that it would get alone; without a cache, and without a mask (padding is one more document)

        Returns:
            logits [B, L, vocab], in the type of the weights.

        Raises:
            ValueError: where there is no token, or mask or documents have another shape or do not go with the rest.
        """
        _check(tokens, cache, mask, documents)
        return self.head(self.model(tokens, cache, mask, documents))

    def head(self, h: mx.array) -> mx.array:
        """The last norm's output [B, L, d] -> logits [B, L, vocab]."""
        return self.lm_head(h) if "lm_head" in self else self.model.embeddings.as_linear(h)

    @property
    def layers(self) -> list[RodimusBlock]:
        """The blocks, for mlx-lm's tuner and tools."""
        return self.model.layers

    def make_cache(self) -> list[Any]:
        """A cache for a text not begun, one entry a layer.

        Where mixers have learned what to start from, it is in the cache from the beginning: mlx-lm fills the rows of a
        batch that have read nothing with zeros.
        """
        cache = make_cache(self.args)
        for layer, kept in zip(self.layers, cache):
            if (start := layer.mixer.start()) is not None:
                remember(kept, start, 0)
        return cache

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Weights under an official or fla checkpoint's names, or our own, to our own names."""
        from .convert.mapping import map_weights  # only mlx-lm's own loader comes this way

        return map_weights(weights, self.args)


def _replaced(window: mx.array, token: mx.array, index: mx.array) -> mx.array:
    """A window [B, 1, S, F] with a token [B, 1, 1, F] in the place of the one at index [1, 1, 1, 1].

    In one launch: `mx.slice_update` takes another to work out where that is.
    """
    return mx.put_along_axis(window, mx.broadcast_to(index, token.shape), token, axis=2)


def _start_computing(*arrays: mx.array) -> None:
    """Let the GPU work on arrays while the host goes on building; not where a transformation traces the call."""
    with contextlib.suppress(ValueError):  # what else goes wrong comes up again where the result is used
        mx.async_eval(*arrays)


def _check(tokens: mx.array, cache: list[Any] | None, mask: mx.array | None, documents: mx.array | None) -> None:
    if tokens.ndim != 2 or tokens.size == 0:
        raise ValueError(f"tokens must be [B, L] with at least one row and one token, not {tokens.shape}")
    for name, x in (("mask", mask), ("documents", documents)):
        if x is not None and x.shape != tokens.shape:
            raise ValueError(f"{name} must have the shape of tokens, {tokens.shape}, not {x.shape}")
        if x is not None and cache is not None:
            raise ValueError(f"{name} goes without a cache: a cache knows its own padding")
    if mask is not None and documents is not None:
        raise ValueError("give mask or documents, not both: padding is one more document")


ModelArgs = RodimusConfig  # mlx-lm's name for it
