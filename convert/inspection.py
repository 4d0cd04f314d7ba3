"""What a checkpoint is and what it takes to run, from its headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.errors import RodimusError
from rodimus_mlx.generation import PREFILL_STEP
from rodimus_mlx.hub import find_folder
from rodimus_mlx.model import Model

from .checkpoint import Checkpoint, open_checkpoint, read_json
from .mapping import HEAD, count_parameters, expected_shapes, parts
from .outputs import Wish, prepare
from .schemes import make_scheme
from .tensors import LazyTensor
from .weights import FLOAT_DTYPES, WeightPlan, plan_weights, widest

WHAT_IF_BITS = (8, 4)  # sizes also told for a checkpoint that is not quantized

_PARTS = {  # a part of the model, and what its parameters' names hold
    "embedding": ("model.embeddings", "model.embed_norm"),
    "mixer": (".mixer.", ".mixer_norm"),
    "attention": (".attn.", ".attn_norm"),
    "FFN": (".ffn.", ".ffn_norm"),
    "head": ("lm_head", "model.norm_f"),
}


def inspect(checkpoint: Checkpoint, context: int) -> dict[str, Any]:
    """Everything that the headers tell.

    Args:
        context: tokens that the memory is predicted for.

    Returns:
        ``architecture``, ``parameters``, ``format``, ``container``, ``files``, ``tied``, ``dtypes`` (bytes of each),
        ``parts`` (parameters and bytes of each), ``bytes`` and ``bits_per_weight`` (of what is loaded),
        ``quantization``, and ``memory``: bytes to run it as it is and, where it is not quantized, at fewer bits.

    Raises:
        RodimusError: the checkpoint is not sound.
    """
    config = RodimusConfig.from_dict(checkpoint.config)
    plan = plan_weights(checkpoint, config, compare_head=False)
    loaded = {weight.name: math.prod(weight.shape) * weight.dtype.size for weight in plan.weights}
    size, parameters = sum(loaded.values()), count_parameters(plan.config)
    dtypes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        dtypes[tensor.stored] = dtypes.get(tensor.stored, 0) + tensor.nbytes
    dtype = widest(plan.weights)
    memory = {"as it is": _run(plan.config, size, dtype, context)}
    if not plan.schemes:
        for bits in WHAT_IF_BITS:
            specs = prepare(checkpoint, Wish(scheme=make_scheme(bits)), compare_head=False).specs
            quantized = sum(spec.nbytes for spec in specs.values())
            half = mx.bfloat16 if dtype == mx.float32 else dtype
            memory[f"{bits} bit"] = _run(plan.config, quantized, half, context)
    return {
        "architecture": architecture(plan.config),
        "parameters": parameters,
        "format": plan.format,
        "container": _container(checkpoint),
        "files": [path.name for path in checkpoint.files],
        "tied": config.tie_word_embeddings,
        "repeats_head": config.tie_word_embeddings and HEAD in checkpoint.tensors,
        "dtypes": dtypes,
        "parts": _parts(plan, loaded),
        "bytes": size,
        "bits_per_weight": 8 * size / parameters,
        "quantization": checkpoint.config.get("quantization"),
        "context": context,
        "memory": memory,
    }


def architecture(c: RodimusConfig) -> dict[str, Any]:
    """The sizes of a model."""
    result: dict[str, Any] = {
        "type": "Rodimus+" if c.has_attention else "Rodimus",
        "layers": c.n_layer,
        "width": c.d_model,
        "inner width": c.d_inner,
        "state": [c.mem_size, c.d_inner],
        "vocabulary": c.vocab_size,
    }
    if c.has_attention:
        heads = {"heads": c.num_heads, "key heads": c.num_heads_k, "value heads": c.num_heads_v}
        result |= {**heads, "window": c.window_keys, "FFN width": c.d_ffn - c.ffn_padding}
    return {**result, "trained context": c.max_position_embeddings}


def cache_bytes(c: RodimusConfig, context: int, size: int) -> int:
    """Bytes that a text's memory takes after ``context`` tokens: states, convolution tails, keys and values."""
    mixer = c.mem_size * c.d_inner * 4 + (c.d_conv - 1) * c.d_inner * size
    if not c.has_attention:
        return c.n_layer * mixer
    return c.n_layer * (mixer + _keys(c, context) * (c.num_heads_k + c.num_heads_v) * c.head_dim * size)


def _keys(c: RodimusConfig, context: int) -> int:
    """Tokens whose keys are kept: while a prompt is read, a window's buffer also holds the step being read."""
    return context if c.window_keys is None else min(context, c.window_keys + PREFILL_STEP)


def step_bytes(c: RodimusConfig, context: int, size: int) -> int:
    """Bytes that reading one step of a prompt needs beside weights and cache.

    A count of the arrays that a block makes. On the CPU, where the layers' plain forms run, half as much again was
    measured, each layer's x | z lives to the step's end, and attention keeps its weights; for a GPU, whose kernels make
    fewer arrays, nothing was.
    """
    tokens = min(context, PREFILL_STEP)
    d, inner = c.d_model, c.d_inner
    stream = d * (2 * 4 + 2 * size)  # h in float32, twice while a sum is made, and what is to be added
    mixer = 2 * inner * size + inner * (4 * size + 3 * 4)  # x|z, u, c, v, y; v, o and their sum in float32
    ffn = 3 * c.d_ffn * size if c.has_attention else 0
    block = stream + max(mixer, ffn)
    if mx.default_device() == mx.gpu:
        return tokens * block
    scores = c.num_heads * _keys(c, context) * 4
    return tokens * (block * 3 // 2 + c.n_layer * 2 * inner * size + scores)


def _run(c: RodimusConfig, weights: int, dtype: mx.Dtype, context: int) -> dict[str, int]:
    """Bytes to read a prompt of ``context`` tokens and go on from it."""
    cache = cache_bytes(c, context, dtype.size)
    step = step_bytes(c, context, dtype.size)
    logits = c.vocab_size * (dtype.size + 2 * 4)
    return {"weights": weights, "cache": cache, "work": step + logits, "total": weights + cache + step + logits}


def _container(checkpoint: Checkpoint) -> str:
    if not checkpoint.files:
        return "not downloaded"
    return "PyTorch" if checkpoint.files[0].suffix == ".bin" else "safetensors"


def _parts(plan: WeightPlan, loaded: Mapping[str, int]) -> list[dict[str, Any]]:
    counts = {name: math.prod(shape) for name, shape in expected_shapes(plan.config).items()}
    result = []
    for part, marks in _PARTS.items():
        count, size = (
            sum(value for name, value in values.items() if any(mark in name for mark in marks))
            for values in (counts, loaded)
        )
        if part == "FFN":
            count -= 3 * plan.config.n_layer * plan.config.d_model * plan.config.ffn_padding
        if size:
            result.append({"part": part, "parameters": count, "bytes": size})
    return result


def open_headers(source: str | Path) -> Checkpoint:
    """A checkpoint of which no weight will be read, by its headers; one that is on the hub alone, by its config.json.

    The latter's ``files`` are empty: its tensors are what they must be, in the dtype that config.json names.

    Raises:
        RodimusError: there is no such checkpoint, or it is not sound.
    """
    folder = find_folder(source, weights=False)
    if any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        return open_checkpoint(folder)
    if folder == Path(source).expanduser():
        return open_checkpoint(folder)  # which says what is missing
    config = read_json(folder / "config.json")
    stored = config.get("torch_dtype", "float32")
    if stored not in FLOAT_DTYPES or "quantization" in config:
        raise RodimusError(f"{source} is not downloaded, and its config.json does not tell enough: convert or load it")
    format = "fla" if "hidden_size" in config else "official"
    names = parts(RodimusConfig.from_dict(config), format)
    tensors = {name: LazyTensor(folder / name, stored, part.shape, 0) for name, part in names.items()}
    return Checkpoint(folder, config, tensors, ())


def finetuning(checkpoint: Checkpoint, options: Mapping[str, Any]) -> dict[str, Any]:
    """What training by some of finetune's options takes.

    Args:
        options: names of `finetune.settings.Settings` and their values; None for the default.

    Returns:
        the ``settings`` that matter, numbers ``trained``, ``memory`` in bytes at the peak, and ``advice`` where this
        machine has less.

    Raises:
        RodimusError: the options make no sense for the model.
    """
    from rodimus_mlx.finetune.memory import advice, available, predict_peak
    from rodimus_mlx.finetune.methods import prepare as prepare_model
    from rodimus_mlx.finetune.settings import from_options
    from rodimus_mlx.finetune.step import compute_dtype

    settings = from_options(options)
    model = _shell(checkpoint)
    dtype = compute_dtype(model, settings.dtype)
    model.set_dtype(dtype)
    trained = sum(p.size for p in prepare_model(model, settings).values())
    arguments = (model, trained, settings, dtype, settings.seq_len)
    return {
        "settings": {"method": settings.method, "batch_size": settings.batch_size, "seq_len": settings.seq_len},
        "trained": trained,
        "memory": predict_peak(*arguments),
        "advice": advice(*arguments, available()),
    }


def _shell(checkpoint: Checkpoint) -> Any:
    """The model without its weights: MLX makes no array that nobody looks into."""
    plan = plan_weights(checkpoint, RodimusConfig.from_dict(checkpoint.config), compare_head=False)
    model = Model(plan.config)
    model.set_dtype(widest(plan.weights))
    schemes = plan.schemes
    nn.quantize(model, class_predicate=lambda path, _: schemes[path]._asdict() if path in schemes else False)
    return model
