"""Whether this machine computes right, and how fast it can be: a report for its user, and for who mends a bug."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.generate import batch_generate

from .bench.measure import memory_bandwidth
from .bench.models import SHAPES, parameter_bytes
from .config import RodimusConfig
from .generation import encode_text
from .kernels.backend import active_backend, use_backend
from .kernels.check import BOUNDS, DTYPES, Sizes, compare_all, recurrence_errors, relative_error
from .states.reading import read_tokens
from .states.snapshot import snapshot

PACKAGES = (
    *("rodimus-mlx", "mlx", "mlx-metal", "mlx-cuda-12", "mlx-cuda-13", "mlx-cpu"),
    *("mlx-lm", "transformers", "numpy"),
)
# ||found - expected|| / ||expected|| of logits: sums in another order, through all layers; a GPU may round float32
# products to fewer bits (TF32). An error in the maths shows as 0.1 or more.
LOGITS_BOUNDS = {mx.float32: 1e-2, mx.bfloat16: 6e-2, mx.float16: 2e-2}
CPU_BOUND = 1e-4  # of float32 without a GPU
TEXT = "def quicksort(items):\n    if len(items) < 2:\n        return items\n" * 5
BITS = {"16 bits": 16.0, "8 bits": 8.5, "4 bits": 4.5}  # a weight, with the scales of groups of 64
STATE_BYTES, KEY_BYTES = 4, 2  # of a number in the recurrent state and in the window

_MOST_ON_CPU = 1 << 30  # bytes of a model that the CPU runs in float32 for comparison

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Check:
    """One thing looked at. passed: None where there was nothing to look at."""

    name: str
    passed: bool | None
    found: str


@dataclass(frozen=True)
class Speed:
    """A released checkpoint on this machine: tokens/s are what the memory's bandwidth allows, and no less counts."""

    checkpoint: str
    weights: str
    gigabytes: float
    tokens_per_second: float
    fits: bool


@dataclass
class Report:
    """What `examine` found."""

    versions: dict[str, str]
    machine: dict[str, str]
    backend: str
    checks: list[Check] = field(default_factory=list)
    bandwidth: float = 0.0  # bytes/s
    speeds: list[Speed] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return {**asdict(self), "passed": self.passed}


def examine(model: Any, tokenizer: Any, progress: Progress = lambda name: None) -> Report:
    """Run every check with this model, and measure the memory; takes seconds to a minute.

    Whatever a check raises (a kernel that does not compile, say) is what it found.
    """
    backend = active_backend()
    report = Report(_versions(), _machine(), backend or f"plain MLX on the {'CPU' if _on_cpu() else 'GPU'}")
    tokens = encode_text(tokenizer, TEXT)
    checks: dict[str, Callable[[], tuple[bool | None, str]]] = {
        "kernels = plain MLX": _kernels,
        "recurrence = float64 reference": _recurrence,
        "GPU = CPU": lambda: _devices(model, tokens),
        "decode = prefill": lambda: _decode(model, tokens),
        "batch = alone": lambda: _batch(model, tokens),
        "continuous batching = alone": lambda: _batched_text(model, tokenizer),
    }
    for name, check in checks.items():
        progress(name)
        try:
            report.checks.append(Check(name, *check()))
        except Exception as error:
            report.checks.append(Check(name, False, f"{type(error).__name__}: {error}"))
    progress("memory bandwidth")
    report.bandwidth = memory_bandwidth()
    report.speeds = list(_speeds(report.bandwidth, _memory_bytes()))
    return report


def verdict(report: Report) -> str:
    """The report in a sentence."""
    failed = [check.name for check in report.checks if check.passed is False]
    if failed:
        return f"NOT RIGHT: {', '.join(failed)}. Please report this, with all of the above."
    if report.backend.startswith("plain"):
        return "All is right. No GPU kernels run here, so there was nothing to say about them."
    name = {"metal": "Metal", "cuda": "CUDA"}[report.backend]
    return f"All is right: the {name} kernels give what the reference gives on this machine."


def _kernels() -> tuple[bool | None, str]:
    if active_backend() is None:
        return None, "no kernels run here"
    results = list(compare_all())
    failed = [each for each in results if not each.passed]
    worst = max(results, key=lambda each: each.error / each.bound)
    found = f"{len(results)} comparisons, the worst {worst.error / worst.bound:.2f} of what is allowed ({worst.name})"
    lines = [f"{each.name} {_dtype(each.dtype)} {each.sizes}: {each.error:.1e} > {each.bound:.0e}" for each in failed]
    return not failed, "; ".join([f"{len(failed)} of {len(results)} differ", *lines]) if failed else found


def _recurrence() -> tuple[bool, str]:
    """The recurrence and its gradients, for decays from none to nearly all."""
    wish = active_backend() or "plain"
    worst, where = 0.0, ""
    for strength in (0.0, 5.0, 50.0):
        for dtype in DTYPES:
            for name, error in recurrence_errors(wish, Sizes(1, 200, 64, 96), dtype, strength).items():
                # outputs are rounded to their type; gates in 16 bits differ more where the decay is strong
                if not error / (10 * BOUNDS[dtype]) <= worst:
                    worst, where = error / (10 * BOUNDS[dtype]), f"{name}, {_dtype(dtype)}, strength {strength:g}"
    return worst <= 1, f"the worst {worst:.2f} of what is allowed ({where})"


def _devices(model: Any, tokens: list[int]) -> tuple[bool | None, str]:
    if _on_cpu():
        return None, "there is no GPU"
    if parameter_bytes(model) > _MOST_ON_CPU:
        return None, "this model is too large to run on the CPU too; the bundled model is not"
    on_gpu = model(mx.array([tokens]))
    mx.eval(on_gpu)
    with use_backend("plain"), mx.stream(mx.cpu):
        parameters = model.parameters()
        try:
            model.update(tree_map(lambda x: x.astype(mx.float32) if x.dtype in LOGITS_BOUNDS else x, parameters))
            on_cpu = model(mx.array([tokens]))
            mx.eval(on_cpu)
        finally:
            model.update(parameters)
    return _compared(on_gpu, on_cpu, on_gpu.dtype)


def _decode(model: Any, tokens: list[int]) -> tuple[bool, str]:
    """Token by token, and in uneven pieces, after one another from the same cache; TEXT has more than 20 tokens."""
    whole = model(mx.array([tokens]))[0]
    cache, rows, begin = model.make_cache(), [], 0
    for length in [1] * (len(tokens) // 2) + [7, 1, 2, len(tokens)]:
        rows.append(model(mx.array([tokens[begin : begin + length]]), cache=cache)[0])
        mx.eval(rows[-1])
        begin += length
    return _compared(mx.concatenate(rows), whole, whole.dtype)


def _batch(model: Any, tokens: list[int]) -> tuple[bool, str]:
    """Rows of different lengths, padded on the left."""
    lengths = (len(tokens), len(tokens) // 2, 3)
    rows = [[0] * (len(tokens) - length) + tokens[:length] for length in lengths]
    mask = mx.array([[column >= len(tokens) - length for column in range(len(tokens))] for length in lengths])
    together = model(mx.array(rows), mask=mask)
    found = mx.concatenate([together[i, -length:] for i, length in enumerate(lengths)])
    expected = mx.concatenate([model(mx.array([tokens[:length]]))[0] for length in lengths])
    return _compared(found, expected, found.dtype)


def _batched_text(model: Any, tokenizer: Any) -> tuple[bool, str]:
    """mlx-lm's batches, some of them from a state, against the likeliest tokens of each prompt alone."""
    prompts = [encode_text(tokenizer, text) for text in ("def f(x):", "import", TEXT[:60])]
    start = model.make_cache()
    read_tokens(model, start, prompts[2])
    caches = [model.make_cache(), model.make_cache(), snapshot(start)]
    together = batch_generate(
        model, tokenizer, prompts, prompt_caches=caches, max_tokens=12, return_token_ids=True
    ).token_ids
    worst = 0.0
    for i, (prompt, made) in enumerate(zip(prompts, together or ())):
        before = prompts[2] if i == 2 else []
        logits = model(mx.array([before + prompt + made]))[0, len(before) + len(prompt) - 1 : -1].astype(mx.float32)
        chosen = mx.take_along_axis(logits, mx.array(made)[:, None], axis=-1)[:, 0]
        # 0 where the batch chose what is likeliest alone; next to nothing where two are as good as equal
        worst = max(worst, ((logits.max(axis=-1) - chosen) / mx.abs(logits).max(axis=-1)).max().item())
    bound = _bound(model.model.norm_f.weight.dtype)
    return worst <= bound, f"the tokens chosen fall short by {worst:.1e} at most ({bound:.0e} allowed)"


def _compared(found: mx.array, expected: mx.array, dtype: mx.Dtype) -> tuple[bool, str]:
    error, bound = relative_error(found, expected), _bound(dtype)
    return error <= bound, f"logits differ by {error:.1e} ({bound:.0e} allowed)"


def _bound(dtype: mx.Dtype) -> float:
    return CPU_BOUND if dtype == mx.float32 and _on_cpu() else LOGITS_BOUNDS[dtype]


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _machine() -> dict[str, str]:
    system = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform()
    device = mx.device_info()
    known = ("device_name", "architecture")
    described = {name.replace("_", " "): str(device[name]) for name in known if name in device}
    return {"system": f"{system} {platform.machine()}", **described, "memory": f"{_memory_bytes() / 1e9:.0f} GB"}


def _memory_bytes() -> float:
    """Of the device: a Mac's GPU shares the machine's."""
    return float(mx.device_info().get("memory_size", 0)) or float(
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )


def _speeds(bandwidth: float, memory: float) -> Iterator[Speed]:
    for name, shape in SHAPES.items():
        config = RodimusConfig.from_dict(shape)
        weights, read = _parameters(config)
        state = config.n_layer * config.mem_size * config.d_inner * STATE_BYTES
        keys = 0
        if config.has_attention:
            width = (config.num_heads_k + config.num_heads_v) * config.head_dim
            keys = config.n_layer * (config.window_keys or 0) * width * KEY_BYTES
        for label, bits in BITS.items():
            size = weights * bits / 8 + state + keys
            touched = read * bits / 8 + 2 * state + keys  # the state is read and written
            # a quarter is left to the system, and to what prompts need on the way
            yield Speed(name, label, size / 1e9, bandwidth / touched, size < 0.75 * memory)


def _parameters(c: RodimusConfig) -> tuple[int, int]:
    """How many weights a model has, vectors apart, and how many of them a token needs."""
    mixer = c.d_inner * (3 * c.d_model + c.d_conv + 4 * c.mem_size + 2 * c.input_gate_low_rank)
    block = mixer
    if c.has_attention:
        heads = c.num_heads + c.num_heads_k + c.num_heads_v
        block += c.d_model * (heads * c.head_dim + c.d_model) + 3 * c.d_model * c.d_ffn
    embedding = c.vocab_size * c.d_model
    read = c.n_layer * block + embedding
    return read + (0 if c.tie_word_embeddings else embedding), read


def _on_cpu() -> bool:
    return mx.default_device() == mx.cpu


def _dtype(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
