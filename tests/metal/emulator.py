"""Runs kernels written for Metal on the CPU, from the text that MLX would hand to Metal's compiler.

Within ``metal_on_cpu()`` every ``Kernel`` called with ``backend="metal"`` is captured, compiled by clang (from the
ziglang package) against ``stand_in.h``, run by ``runtime.cpp`` and answered with its outputs. Each launch runs twice,
the second time in reverse order and over another poison, and both must agree bit for bit. A fault raises
``KernelFault``: a compile error (address spaces count), a barrier or simd operation that not all reach, more than 32 KB
of threadgroup arrays, an access out of bounds, an output left unwritten, a result that depends on order or poison.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np

from rodimus_mlx.kernels.launch import Kernel

HERE = Path(__file__).parent
POISONS = (0xFF, 0xFE)  # NaN in every float type; large in float32 and bfloat16

# Common to kernels and the runtime. Conversions between float types must be written out, as in Metal and CUDA.
FLAGS = [
    *("-std=c++17", "-O2", "-shared", "-fPIC", "-fno-exceptions", "-fno-rtti", "-nostdlib++", "-ffp-contract=off"),
    *("-fno-sanitize=all", "-U_FORTIFY_SOURCE", "-Wno-everything"),
]
KERNEL_FLAGS = [
    *("-Werror=implicit-float-conversion", "-Werror=double-promotion", "-Werror=uninitialized", "-Werror=vla"),
    # Undefined behaviour ends in a trap, indices of local and threadgroup arrays included.
    *("-fsanitize=bounds,shift,integer-divide-by-zero,signed-integer-overflow", "-fsanitize-trap=all"),
    *("-Werror=sometimes-uninitialized", "-Werror=return-type", "-Werror=conditional-uninitialized"),
]

PLACE = {
    "thread_position_in_threadgroup": "uint3{place.thread_index, 0, 0}",
    "thread_index_in_threadgroup": "place.thread_index",
    "threads_per_threadgroup": "uint3{place.threads, 1, 1}",
    "thread_index_in_simdgroup": "place.thread_index % 32",
    "simdgroup_index_in_threadgroup": "place.thread_index / 32",
    "simdgroups_per_threadgroup": "place.simdgroups",
    "threadgroup_position_in_grid": "uint3{place.group[0], place.group[1], place.group[2]}",
    "threadgroups_per_grid": "uint3{place.group_count[0], place.group_count[1], place.group_count[2]}",
}
TG_ARRAY = (
    "#define TG_ARRAY(type, name, size) threadgroup type (&name)[size] = *(threadgroup type (*)[size])"
    "runtime_threadgroup_array(__COUNTER__, sizeof(type[size]), #name)"
)


class KernelFault(AssertionError):
    """What a kernel does that it must not, or that it does not compile."""


@dataclass(frozen=True)
class Captured:
    """A launch as MLX records it: the compiled function's name, its text, and the grid and threadgroup in threads."""

    name: str
    text: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    shape_infos: list[tuple[bool, bool, bool]]  # for each input: does it pass its shape, strides, ndim


@contextmanager
def metal_on_cpu() -> Iterator[list[Captured]]:
    """Within it, kernels called for Metal run here, in functions under mx.compile too; yields the list of launches."""
    launches: list[Captured] = []

    def call(kernel: Kernel, inputs: list[mx.array], *, backend: str, **arguments) -> list[mx.array]:
        if backend != "metal":
            raise ValueError(f"only kernels for Metal run here, not for {backend}")
        launches.append(capture(kernel, inputs, **arguments))
        return execute(launches[-1], kernel, inputs, arguments["output_shapes"], arguments["output_dtypes"])

    mx.disable_compile()  # a compiled function's trace has no values to run on
    try:
        with mock.patch.object(Kernel, "__call__", call):
            yield launches
    finally:
        mx.enable_compile()


def run_metal(function: Callable, *arguments, **keywords):
    """``function``'s result, with its Metal kernels run by Metal where there is one, else on the CPU."""
    if mx.metal.is_available():
        return function(*arguments, **keywords)
    with metal_on_cpu():
        return function(*arguments, **keywords)


_plain_call = Kernel.__call__


def capture(kernel: Kernel, inputs: Sequence[mx.array], **arguments) -> Captured:
    """Trace one launch and read the text that MLX wrote for it."""
    found: list[list] = []

    def note(event: dict) -> None:
        if event["type"] == "primitive" and event["name"] == "CustomKernel":
            found.append(event["arguments"])

    shapes = [mx.zeros(x.shape, x.dtype) for x in inputs]
    mx.export_function(note, lambda *xs: _plain_call(kernel, list(xs), backend="metal", **arguments), *shapes)
    name, text, *sizes = found[0][:8]
    return Captured(name, text, tuple(sizes[:3]), tuple(sizes[3:]), found[0][8])


def execute(launch: Captured, kernel: Kernel, inputs, output_shapes, output_dtypes) -> list[mx.array]:
    """Compile and run one captured launch, in both orders."""
    if any(x.ndim == 0 for x in inputs):
        raise KernelFault(f"{kernel.name}: a 0-dim input differs between Metal and CUDA: give it shape (1,)")
    threads = launch.threadgroup[0]
    if not 0 < threads <= 1024 or threads % 32 or launch.threadgroup[1:] != (1, 1):
        raise KernelFault(f"{kernel.name}: a threadgroup of {launch.threadgroup}, not of 32, 64, ... 1024 threads")
    groups = (launch.grid[0] // threads, *launch.grid[1:])
    if min(groups) < 1 or groups[0] * threads != launch.grid[0]:
        raise KernelFault(f"{kernel.name}: a grid of {launch.grid} threads is not one of whole threadgroups")

    entry = load(launch)
    sources = []
    for name, x, (shape, *others) in zip(kernel.inputs, inputs, launch.shape_infos):
        if any(others):
            raise KernelFault(f"{kernel.name}: strides and ndim of `{name}` are outside of the common subset")
        sources.append((name, to_numpy(x)))
        if shape:
            sources.append((f"{name}_shape", np.array(x.shape, np.int32)))
    rounds = []
    for reverse, poison in enumerate(POISONS):
        outputs = [np.empty(shape, numpy_dtype(dtype)) for shape, dtype in zip(output_shapes, output_dtypes)]
        message = _run(kernel, entry, sources, outputs, groups, threads, reverse, poison)
        if message:
            raise KernelFault(f"{kernel.name}: {_with_source(message, launch.text)}")
        rounds.append(outputs)
    for name, first, second in zip(kernel.outputs, *rounds):
        _check_output(kernel, name, first, second)
    return [mx.array(x).view(dtype) for x, dtype in zip(rounds[0], output_dtypes)]


def _run(kernel, entry, sources, outputs, groups, threads, reverse, poison) -> str:
    arrays = [*sources, *zip(kernel.outputs, outputs)]
    buffers = (_Buffer * len(arrays))()
    for i, (name, array) in enumerate(arrays):
        buffers[i] = _Buffer(name.encode(), array.ctypes.data, array.nbytes, i >= len(sources))
    message = ctypes.create_string_buffer(512)
    request = _Launch(
        groups, threads, reverse, poison, buffers, len(arrays), entry, ctypes.addressof(message), len(message)
    )
    return message.value.decode() if runtime().runtime_run(ctypes.byref(request)) else ""


def _with_source(message: str, text: str) -> str:
    """The message, with the source line that it names by number."""
    line = re.match(r"line (\d+): ", message)
    return f"{message}: {text.splitlines()[int(line.group(1)) - 1]}" if line else message


def _check_output(kernel: Kernel, name: str, first: np.ndarray, second: np.ndarray) -> None:
    """An element that keeps both poisons was not written; one that differs otherwise depends on the order."""
    a, b = (np.ascontiguousarray(x).reshape(-1).view(np.uint8).reshape(x.size, x.itemsize) for x in (first, second))
    unwritten = np.flatnonzero((a == POISONS[0]).all(1) & (b == POISONS[1]).all(1))
    if unwritten.size:
        raise KernelFault(
            f"{kernel.name}: {unwritten.size} of {first.size} elements of `{name}` are not written, "
            f"the first at {_index(unwritten[0], first.shape)}"
        )
    differing = np.flatnonzero((a != b).any(1))
    if differing.size:
        raise KernelFault(
            f"{kernel.name}: {differing.size} of {first.size} elements of `{name}` depend on the threads' order or on "
            f"memory never written (no barrier? out of bounds?), the first at {_index(differing[0], first.shape)}"
        )


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(flat, shape))


# ---- arrays ----


def numpy_dtype(dtype: mx.Dtype) -> np.dtype:
    """numpy's type of the same width; bfloat16 travels as uint16."""
    return np.dtype(np.uint16) if dtype == mx.bfloat16 else np.array(mx.zeros((1,), dtype)).dtype


def to_numpy(x: mx.array) -> np.ndarray:
    return np.ascontiguousarray(np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x))


# ---- compilation ----


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("is_output", ctypes.c_int),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("group_count", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("reverse", ctypes.c_int),
        ("poison", ctypes.c_uint),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("n_buffers", ctypes.c_uint),
        ("kernel", ctypes.c_void_p),
        ("message", ctypes.c_void_p),
        ("message_bytes", ctypes.c_uint),
    ]


def translation_unit(launch: Captured) -> str:
    """The captured text with the stand-in before it and an entry that passes buffers and place after it."""
    text, _, instantiation = launch.text.partition("\ntemplate [[host_name(")
    text, arrays = re.subn(r"^#define TG_ARRAY\(.*$", TG_ARRAY, text, flags=re.MULTILINE)
    if arrays != 1:
        raise KernelFault(f"{launch.name}: the text defines TG_ARRAY {arrays} times")
    signature = text[text.index(f"[[kernel]] void {launch.name}(\n") :]
    signature = signature[signature.index("\n") : signature.index(") {\n")]
    arguments = []
    for parameter in signature.split(",\n"):
        match = re.fullmatch(r"\s*(.+?) ?(\w+) \[\[(?:buffer\((\d+)\)|(\w+))\]\]", parameter)
        if not match:
            raise KernelFault(f"{launch.name}: cannot read the parameter {parameter!r}")
        kind, name, index, attribute = match.groups()
        if attribute is not None and attribute not in PLACE:
            raise KernelFault(f"{launch.name}: the attribute {attribute} is outside of the common subset")
        arguments.append(PLACE[name] if attribute else f"({kind})buffers[{index}]")
    values = re.search(r"decltype\((.*?)\) ", instantiation)
    function = values.group(1) if values else launch.name
    entry = (
        'extern "C" void kernel_entry(void* const* buffers) {\n'
        f"const Place place = runtime_place;\n{function}({', '.join(arguments)});\n}}\n"
    )
    return f'#include "{HERE / "stand_in.h"}"\n#line 1 "{launch.name}"\n{text}\n{entry}'


def load(launch: Captured) -> int:
    """The address of the compiled kernel's entry."""
    runtime()  # its symbols come first
    return _load(translation_unit(launch), launch.name)


@functools.cache
def _load(text: str, name: str) -> int:
    library = ctypes.CDLL(str(compile_library(text, [*KERNEL_FLAGS, "-nostdlib", *_undefined_allowed()], name)))
    _libraries.append(library)
    return ctypes.cast(library.kernel_entry, ctypes.c_void_p).value or 0


_libraries: list[ctypes.CDLL] = []


@functools.cache
def runtime() -> ctypes.CDLL:
    path = compile_library((HERE / "runtime.cpp").read_text(), [], "runtime")
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.runtime_run.argtypes = [ctypes.c_void_p]
    return library


def _undefined_allowed() -> list[str]:
    return ["-Wl,-undefined,dynamic_lookup"] if sys.platform == "darwin" else ["-Wl,--allow-shlib-undefined"]


def compiler() -> Path | None:
    """clang, as the ziglang package brings it; None without the package."""
    spec = importlib.util.find_spec("ziglang")
    return Path(spec.origin).parent / "zig" if spec and spec.origin else None


def compile_library(text: str, flags: Sequence[str], name: str) -> Path:
    """Compile to a shared library, kept in the temporary folder under the hash of all that goes into it."""
    zig = compiler()
    if zig is None:
        raise RuntimeError("the Metal texts need a compiler: install the package ziglang")
    parts = [str(zig), *FLAGS, *flags, text, (HERE / "stand_in.h").read_text()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"rodimus-metal-on-cpu-{os.getuid()}"
    library = folder / f"{key}.so"
    if library.exists():
        return library
    folder.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source = Path(scratch) / "source.cpp"
        source.write_text(text)
        built = Path(scratch) / "library.so"
        command = [str(zig), "c++", *FLAGS, *flags, str(source), "-o", str(built)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise KernelFault(f"{name} does not compile:\n{result.stderr}")
        built.replace(library)
    return library
