"""Which model a state belongs to: its architecture, precision, quantization, adapter and weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import RodimusError

SAMPLES = 64  # numbers looked at in each tensor: training of any kind changes some of them
_ADAPTER_PARAMETERS = {"lora_a", "lora_b", "m", "initial_state"}

# What differs is said in this order: quantizing changes the weights too, but the weights are not what to mend.
_WORDS = {
    "quantization": "quantization",
    "precision": "precision",
    "adapter": "adapter",
    "architecture": "architecture",
    "weights": "weights",
}


def fingerprint(model: Any) -> dict[str, str]:
    """What a state depends on, as short texts; equal for two models exactly if they may share states.

    Weights are compared by ``SAMPLES`` numbers of each tensor, so that a model of many GB takes no time.
    """
    base: list[tuple[str, mx.array]] = []
    adapter: list[tuple[str, mx.array]] = []
    parameters: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})  # type: ignore[assignment]
    for name, array in sorted(parameters.items()):
        name = name.replace(".linear.", ".").replace(".embedding.", ".")  # what an adapter wraps keeps its name
        (adapter if name.rpartition(".")[2] in _ADAPTER_PARAMETERS else base).append((name, array))
    return {
        "architecture": _short(json.dumps(model.args.to_dict(), sort_keys=True).encode()),
        "precision": str(model.model.norm_f.weight.dtype).removeprefix("mlx.core."),
        "quantization": _quantization(model),
        "adapter": _digest(adapter) + _scales(model) if adapter else "none",
        "weights": _digest(base),
    }


def refuse_mismatch(of_state: Mapping[str, str], of_model: Mapping[str, str], label: str) -> None:
    """Let only a state of this very model pass.

    Raises:
        RodimusError: naming the state and the first thing that differs.
    """
    for key, word in _WORDS.items():
        theirs, ours = of_state.get(key, "unknown"), of_model[key]
        if theirs != ours:
            raise RodimusError(
                f"{label} belongs to another model: its {word} is {theirs}, this model's is {ours}; "
                "use the model that made it, or make the state again"
            )


def _quantization(model: Any) -> str:
    kinds = {
        f"{module.bits} bits in groups of {module.group_size}"
        for _, module in model.named_modules()
        if hasattr(module, "bits") and hasattr(module, "group_size")
    }
    return " and ".join(sorted(kinds)) or "none"


def _digest(parameters: list[tuple[str, mx.array]]) -> str:
    samples = [_sample(array) for _, array in parameters]
    mx.eval(samples)
    digest = hashlib.sha256()
    for (name, array), sample in zip(parameters, samples):
        digest.update(f"{name} {array.shape} {array.dtype} ".encode())
        digest.update(memoryview(sample))  # type: ignore[arg-type]
    return digest.hexdigest()[:16]


def _sample(array: mx.array) -> mx.array:
    """At most SAMPLES numbers from all over the tensor, as bytes."""
    flat = array.reshape(-1)
    return mx.contiguous(flat[:: max(1, flat.size // SAMPLES)][:SAMPLES]).view(mx.uint8)


def _scales(model: Any) -> str:
    scales = {str(module.scale) for _, module in model.named_modules() if "lora_a" in module}
    return f" at scale {'/'.join(sorted(scales))}" if scales else ""


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
