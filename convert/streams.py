"""Tensors on their way from one folder to another: rows in blocks, cut, padded, quantized; never a whole one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import mlx.core as mx

from rodimus_mlx.config import RodimusConfig

from .mapping import Part
from .schemes import Scheme
from .writer import Spec

FFN_IN, FFN_OUT = ".ffn.fc.weight", ".ffn.out_proj.weight"

Blocks = Callable[[], Iterator[mx.array]]


class Stream(NamedTuple):
    """One of our parameters: its rows in order."""

    name: str
    spec: Spec
    blocks: Blocks


class Output(NamedTuple):
    """What becomes of a stream: the tensors to write, and their rows in order, each with the tensor's name."""

    specs: dict[str, Spec]
    rows: Callable[[], Iterator[tuple[str, mx.array]]]


def pieces(blocks: Iterator[mx.array], counts: Sequence[int]) -> Iterator[tuple[int, mx.array]]:
    """Blocks cut where pieces of so many rows end; each with its piece's number."""
    piece, left = 0, counts[0] if counts else 0
    for block in blocks:
        start = 0
        while start < block.shape[0]:
            while left == 0:
                piece += 1
                left = counts[piece]
            take = min(left, block.shape[0] - start)
            yield piece, block[start : start + take]
            start += take
            left -= take


def pad_ffn(stream: Stream, config: RodimusConfig, zeros: int) -> Stream:
    """The FFN widened by features that are always zero, which changes no result.

    Rows of zeros end the value's and the gate's half of `fc`, columns of zeros `out_proj`.
    """
    width, (dtype, shape) = config.d_ffn, stream.spec
    if stream.name.endswith(FFN_OUT):
        spec = Spec(dtype, (shape[0], width + zeros))
        return Stream(stream.name, spec, lambda: (mx.pad(block, [(0, 0), (0, zeros)]) for block in stream.blocks()))
    if not stream.name.endswith(FFN_IN):
        return stream

    def blocks() -> Iterator[mx.array]:
        for _, half in groupby(pieces(stream.blocks(), (width, width)), key=lambda found: found[0]):
            yield from (block for _, block in half)
            yield mx.zeros((zeros, shape[1]), dtype)

    return Stream(stream.name, Spec(dtype, (2 * (width + zeros), shape[1])), blocks)


def strip_ffn(stream: Stream, config: RodimusConfig) -> Stream:
    """The inverse of `pad_ffn`: without the features that the config's `ffn_padding` counts."""
    zeros, (dtype, shape) = config.ffn_padding, stream.spec
    width = config.d_ffn - zeros
    if stream.name.endswith(FFN_OUT):
        return Stream(stream.name, Spec(dtype, (shape[0], width)), lambda: (b[:, :width] for b in stream.blocks()))
    if not stream.name.endswith(FFN_IN):
        return stream

    def blocks() -> Iterator[mx.array]:
        found = pieces(stream.blocks(), (width, zeros, width, zeros))
        return (block for piece, block in found if piece % 2 == 0)

    return Stream(stream.name, Spec(dtype, (2 * width, shape[1])), blocks)


def plain(stream: Stream) -> Output:
    """The tensor as it is."""
    return Output({stream.name: stream.spec}, lambda: ((stream.name, block) for block in stream.blocks()))


def in_memory(name: str, array: mx.array) -> Output:
    """A tensor that is there already."""
    return Output({name: Spec(array.dtype, array.shape)}, lambda: iter([(name, array)]))


def quantize(stream: Stream, scheme: Scheme) -> Output:
    """The packed matrix, its scales and, in mode affine, its biases, as `mx.quantize` gives them for the whole."""
    path = stream.name.removesuffix(".weight")
    dtype, (count, columns) = stream.spec
    packed, groups = scheme.columns(columns)
    affine = scheme.mode == "affine"
    scales = Spec(dtype if affine else mx.uint8, (count, groups))
    specs = {f"{path}.weight": Spec(mx.uint32, (count, packed)), f"{path}.scales": scales}
    specs |= {f"{path}.biases": scales} if affine else {}

    def rows() -> Iterator[tuple[str, mx.array]]:
        for block in stream.blocks():
            made = mx.quantize(block, group_size=scheme.group_size, bits=scheme.bits, mode=scheme.mode)
            yield from zip(specs, made)

    return Output(specs, rows)


def split(stream: Stream, parts: Mapping[str, Part]) -> Output:
    """Another format's tensors that hold this parameter's rows."""
    names = list(parts)
    counts = [part.stop - part.start for part in parts.values()]

    def rows() -> Iterator[tuple[str, mx.array]]:
        for piece, block in pieces(stream.blocks(), counts):
            yield names[piece], block.reshape(-1, *parts[names[piece]].shape[1:])

    return Output({name: Spec(stream.spec.dtype, part.shape) for name, part in parts.items()}, rows)
