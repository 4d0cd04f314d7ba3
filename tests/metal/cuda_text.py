"""The text that MLX would hand to CUDA's compiler, put together as MLX does, and compiled by nvcc where there is one.

That it compiles says nothing about its results: those are compared on a GPU.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx

from rodimus_mlx.kernels.launch import Kernel

ARCHITECTURE = "sm_90"
TYPES = {
    mx.bool_: "bool",
    mx.int32: "int32_t",
    mx.uint32: "uint32_t",
    mx.int64: "int64_t",
    mx.uint8: "uint8_t",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
}
# In place of mlx/backend/cuda/device/utils.cuh, which lies inside MLX's library.
HEADER = """#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>
#include <cuda/std/array>
#include <cooperative_groups.h>
namespace mlx::core::cu { using Shape = cuda::std::array<int32_t, 10>; }
"""


def cuda_text(
    kernel: Kernel,
    inputs: Sequence[mx.array],
    *,
    output_dtypes: Sequence[mx.Dtype],
    template: Mapping[str, mx.Dtype | int | bool] | None = None,
    **_,
) -> str:
    """The translation unit for one launch, from the arguments of that launch."""
    header, source = kernel.text("cuda")
    arguments = []
    for name, x in zip(kernel.inputs, inputs):
        arguments.append(f"const {TYPES[x.dtype]}* {name}")
        if f"{name}_shape" in source:
            arguments.append(f"const __grid_constant__ Shape {name}_shape")
    arguments += [f"{TYPES[dtype]}* {name}" for name, dtype in zip(kernel.outputs, output_dtypes)]
    constants = "".join(f"  {_constant(name, value)};\n" for name, value in (template or {}).items())
    return (
        f"{HEADER}{header}namespace mlx::core::cu {{\n\nnamespace cg = cooperative_groups;\n\n"
        f"__global__ void {kernel.name}(\n    {', '.join(arguments)}) {{\n{constants}\n{source}\n}}\n\n}}\n"
    )


def _constant(name: str, value: mx.Dtype | int | bool) -> str:
    if isinstance(value, bool):
        return f"constexpr bool {name} = {str(value).lower()}"
    if isinstance(value, int):
        return f"constexpr int {name} = {value}"
    return f"using {name} = {TYPES[value]}"


def nvcc() -> str | None:
    return shutil.which("nvcc")


def compile_cuda(text: str, architecture: str = ARCHITECTURE) -> str:
    """Compile to a cubin; ptxas's lines on registers, spills and shared memory. Raises with nvcc's message."""
    command = nvcc()
    if command is None:
        raise RuntimeError("no nvcc on this machine")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "kernel.cu"
        source.write_text(text)
        flags = ["-std=c++17", f"-arch={architecture}", "-cubin", "-Xptxas=-v", "-o", str(source.with_suffix(".cubin"))]
        result = subprocess.run([command, *flags, str(source)], capture_output=True, text=True)
    if result.returncode:
        raise AssertionError(f"nvcc refuses the text:\n{result.stderr}")
    return "\n".join(line for line in result.stderr.splitlines() if "registers" in line or "spill" in line)
