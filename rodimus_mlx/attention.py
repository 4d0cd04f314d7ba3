"""Sliding-window shared-key attention, SW-SKA (paper, section 3.4): H query heads, one key head, H value heads."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import RotatingKVCache

from .cache import keep_last, ordered, update
from .config import RodimusConfig
from .kernels.backend import active_backend
from .layer_ops import join_heads, split_heads
from .pieces import windows

QUERY_BLOCK = 1024  # queries that share one block of scores, at most; a narrow window gets narrower blocks
BAND_BLOCK = 256  # queries in a block of a band, whose blocks all see as many keys
BAND_BLOCKS = 8  # blocks computed at once


class AttentionMasks:
    """What attention must know of padding, documents and the window; made once a call, shared by all layers.

    padding: [B, L] bool, False for padding, and documents: [B, L], tokens see only tokens of the same number; both
    without a cache only. single: with a cache, the mask over its keys that one more token needs, or None.
    """

    def __init__(
        self, padding: mx.array | None = None, documents: mx.array | None = None, single: mx.array | None = None
    ):
        self.padding = padding
        self.documents = documents
        self.single = single
        self._made: dict[tuple, mx.array] = {}

    def block(
        self,
        queries: tuple[int, int],
        keys: tuple[int, int],
        window: int,
        past: int,
        starts: mx.array | None,
        dtype: mx.Dtype,
    ) -> mx.array | str:
        """The mask of a block of queries over a block of keys, to be added to the scores; or "causal", if that is all.

        queries: begin and end among the call's L tokens, of which token 0 is key `past`; keys: begin and end.
        starts: [B], the first real key of each row, in a batch.

        Returns: [rows, columns] or [B, 1, rows, columns], 0 or the lowest number of `dtype`.
        """
        begin, end = queries
        first, last = keys
        plain = starts is None and self.padding is None and self.documents is None
        if plain and past + end - window <= first:
            return "causal"
        # without padding or documents, only where the blocks lie to each other matters
        place = (end - begin, last - first) if plain else (begin, end, first, last)
        key = (*place, past + begin - first, dtype)
        if key not in self._made:
            allowed = self._allowed(begin, end, first, last, window, past, starts)
            self._made[key] = mx.where(allowed, mx.array(0, dtype), mx.array(mx.finfo(dtype).min, dtype))
        return self._made[key]

    def _allowed(
        self, begin: int, end: int, first: int, last: int, window: int, past: int, starts: mx.array | None
    ) -> mx.array:
        rows = mx.arange(past + begin, past + end)[:, None]
        columns = mx.arange(first, last)
        allowed = (columns <= rows) & (columns > rows - window)
        if starts is not None:
            allowed = allowed & (columns >= starts[:, None, None, None])
        if self.padding is not None:
            allowed = allowed & self.padding[:, None, None, first:last]
        if self.documents is not None:
            allowed = allowed & (self.documents[:, None, begin:end, None] == self.documents[:, None, None, first:last])
        return allowed | (columns == rows)  # padding sees itself: a softmax over nothing would be NaN


class SharedKeyAttention(nn.Module):
    """Attention whose heads share their keys, over a window of W // 2 + 1 tokens.

    The cache holds keys and values as one head each, [B, 1, T, Hk * head] and [B, 1, T, Hv * head], because the stock
    caches size values by the keys' head count; heads are views of it, and the shared key is never repeated in memory.
    """

    def __init__(self, config: RodimusConfig):
        super().__init__()
        self.heads = (config.num_heads, config.num_heads_k, config.num_heads_v)
        self.head_dim = config.head_dim
        self.window = config.window_keys
        self.rope_dims = config.rope_dims
        self.rope_base = config.rotary_emb_base
        self.qkv_proj = nn.Linear(config.d_model, sum(self.heads) * config.head_dim, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def __call__(self, x: mx.array, masks: AttentionMasks | None = None, cache: Any = None) -> mx.array:
        """Attend over x [B, T, d] and what the cache holds, and move the cache on by T tokens."""
        offset = mx.array(0 if cache is None else cache.offset)
        return self.out_proj(self.attend(*self.project(x, offset), masks, cache))

    def past(self, cache: Any, batch: int, length: int) -> tuple[mx.array, ...] | None:
        """The keys and values, or none at a text's start, that `project` best puts before those of `length` tokens.

        None: it is best left to `attend`. On a GPU, a piece of a long prompt is joined to what the cache holds in one
        launch, and padded to whole blocks, which attention takes at once.
        """
        long = length >= BAND_BLOCK and batch == 1
        if self.training or not long or type(cache) is not RotatingKVCache or active_backend() is None:
            return None
        return ordered(cache)

    def project(
        self, x: mx.array, offset: mx.array, past: tuple[mx.array, ...] | None = None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """x [B, T, d], whose first token stands at `offset` (one number, or [B]), to rotated queries, keys and values.

        Returns: q [B, H, T, head], k [B, 1, T, Hk * head] and v [B, 1, T, Hv * head]; where `past` is given, for
        `attend_joined`, behind those of its tokens that the first of x sees, and with zeros behind up to a whole block.
        """
        qkv, form = self.qkv_proj(x), (self.heads, self.rope_dims, self.rope_base)
        if past is None or self.window is None:
            return split_heads(qkv, offset, *form, self.training)
        rows = -(-x.shape[1] // BAND_BLOCK) * BAND_BLOCK
        return join_heads(qkv, offset, *form, past, self.window - 1, rows)

    def attend(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        masks: AttentionMasks | None = None,
        cache: Any = None,
        full: bool = False,
    ) -> mx.array:
        """The heads' outputs side by side, [B, T, d], from `project`'s and what the cache holds.

        full: k and v hold just what every query sees, so nothing is masked.
        """
        starts = None
        length = q.shape[2]
        if length > 1 and getattr(cache, "keys", None) is None:
            k, v = mx.contiguous(k), mx.contiguous(v)  # a cache that keeps a view keeps all that it is a view of
        if cache is not None:
            k, v = update(cache, k, v)
            starts = getattr(cache, "left_padding", None)  # the first real key of each row, in a batch
        if full or (length == 1 and cache is not None):
            return self._attention(q, *self._heads(k, v), None if masks is None else masks.single)
        return self._banded_attention(q, k, v, masks or AttentionMasks(), starts)

    def attend_joined(
        self, q: mx.array, k: mx.array, v: mx.array, length: int, masks: AttentionMasks, cache: Any
    ) -> mx.array:
        """`attend` for `length` tokens, from what `project` joined to the cache's keys and values."""
        keep_last(cache, k, v, k.shape[2] - (q.shape[2] - length), length)
        return self._banded_attention(q, k, v, masks, None)[:, :length]

    def _heads(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values [B, 1, S, heads * head], each with its own number of heads -> [B, H, S, head]."""
        return self._unfold(k, self.heads[1]), self._unfold(v, self.heads[2])

    def _unfold(self, x: mx.array, heads: int) -> mx.array:
        """[B, 1, S, heads * head] -> [B, H, S, head]: query head i uses head i mod `heads`."""
        batch, _, length, _ = x.shape
        if heads == 1:
            x = mx.broadcast_to(x, (batch, self.heads[0], length, self.head_dim))
            # cuDNN's gradient of the keys takes their layout, in which heads must not share one place
            return mx.contiguous(x) if self.training and active_backend() == "cuda" else x
        x = x.reshape(batch, length, heads, self.head_dim).swapaxes(1, 2)
        return x if heads == self.heads[0] else mx.tile(x, (1, self.heads[0] // heads, 1, 1))

    def _attention(self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str | None) -> mx.array:
        heads = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5, mask=mask)
        return heads.swapaxes(1, 2).reshape(q.shape[0], q.shape[2], -1)

    def _banded_attention(
        self, q: mx.array, k: mx.array, v: mx.array, masks: AttentionMasks, starts: mx.array | None
    ) -> mx.array:
        """Causal attention of the last T of S tokens, block by block, so that no score lies far outside the window.

        q [B, H, T, head]; k and v [B, 1, S, heads * head].
        """
        length, total = q.shape[2], k.shape[2]
        past = total - length
        window = total if self.window is None else self.window
        band = self._band(q, past, window, masks, starts)
        queries = self._query_blocks(band.start, past, window)
        keys = [(max(0, past + begin - window + 1), past + end) for begin, end in queries]  # that these queries see
        outputs = []
        heads_k, heads_v = self._heads(k, v)
        cut = partial(windows, axis=2, differentiable=self.training)
        for i, each in enumerate(zip(cut(q, queries), cut(heads_k, keys), cut(heads_v, keys))):
            mask = masks.block(queries[i], keys[i], window, past, starts, q.dtype)
            outputs.append(self._attention(*each, mask))
        for begin in range(band.start, band.stop, BAND_BLOCK * BAND_BLOCKS):
            end = min(begin + BAND_BLOCK * BAND_BLOCKS, band.stop)
            outputs.append(self._attention_in_band(q[:, :, begin:end], k, v, past + begin, window, masks))
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1)

    def _query_blocks(self, count: int, past: int, window: int) -> list[tuple[int, int]]:
        """The first `count` queries in blocks: narrow ones where a block's scores, or the keys it sees in vain, cost.

        Within a window, where GPUs keep no scores, the queries that see back to the first key are one block, causal;
        of whole pieces of 256, which the fused kernels like.
        """
        backend = active_backend()
        keeps_scores = backend is None or (backend == "metal" and self.training) or self.window is None
        size = min(QUERY_BLOCK, max(256, (window + 127) // 128 * 128))
        reach = window - past  # queries that see back to the first key
        first = size if keeps_scores else max(size, count if count <= reach else reach // 256 * 256)
        edges = [0, *range(first, count, size), count]
        return [(begin, end) for begin, end in pairwise(edges) if begin < end]

    def _band(self, q: mx.array, past: int, window: int, masks: AttentionMasks, starts: mx.array | None) -> range:
        """The queries, at the end and in whole blocks, for which `_attention_in_band` serves; not for gradients."""
        length = q.shape[2]
        plain = q.shape[0] == 1 and starts is None and masks.padding is None and masks.documents is None
        if self.training or not plain or self.heads[1] != 1 or self.heads[2] != self.heads[0]:
            return range(length, length)
        filled = max(0, window - 1 - past)  # queries before whose windows are full
        return range(length - max(0, length - filled) // BAND_BLOCK * BAND_BLOCK, length)

    def _attention_in_band(
        self, q: mx.array, k: mx.array, v: mx.array, position: int, window: int, masks: AttentionMasks
    ) -> mx.array:
        """Attention of blocks of queries, the first of which is key `position`, whose windows are full: [1, T, d].

        The blocks become a batch; each block's keys are a view, moved on by a block from the last one's, of the same
        memory. So all blocks share one mask, and one call does them all.
        """
        _, heads, length, head = q.shape
        blocks, keys = length // BAND_BLOCK, window - 1 + BAND_BLOCK
        first = position - window + 1
        shape = (blocks, heads, keys, head)
        q = q.swapaxes(1, 2).reshape(blocks, BAND_BLOCK, heads, head).swapaxes(1, 2)
        k = mx.as_strided(k, shape, (BAND_BLOCK * head, 0, head, 1), first * head)
        v = mx.as_strided(v, shape, (BAND_BLOCK * heads * head, head, heads * head, 1), first * heads * head)
        mask = masks.block((0, BAND_BLOCK), (0, keys), window, window - 1, None, q.dtype)
        return self._attention(q, k, v, mask).reshape(1, length, -1)


def decode_mask(cache: Any) -> mx.array | None:
    """The mask that one more token needs over what the cache will hold; None where every key is seen."""
    return cache.make_mask(1, window_size=None, return_array=False)
