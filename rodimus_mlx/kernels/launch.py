"""One kernel body, launched by MLX's custom Metal kernel or its custom CUDA kernel.

A body is the inside of a kernel function, in the subset of Metal that ``prologue_cuda.h`` can say in CUDA. Around it
MLX writes the signature, from the arrays' names and dtypes; before it this module puts a prologue (types, macros, float
functions) and the names below, a thread's place. Threadgroups are one-dimensional and always whole.

    tid          uint    thread in its threadgroup            lane      uint   thread in its simdgroup, 0..31
    threads      uint    threads of a threadgroup             simd_id   uint   simdgroup in its threadgroup
    group        uint3   threadgroup in the grid              group_count  uint3  threadgroups of the grid

What MLX does with a custom kernel, read in its sources (0.30 to 0.32):

- Metal: the header, then ``template <typename T, int N, bool B> [[kernel]] void name(...)`` around the body, then the
  instantiation. CUDA: the header, then the function in namespace mlx::core::cu, with the templates as constants at the
  body's top. So helpers take template values as template arguments of their own.
- An input is ``const device T*`` on Metal, but ``const constant T*`` below 8 elements: write ``auto p = x + offset``,
  and helpers that are templates on the pointer's type. A 0-dim input is a reference on Metal and a pointer on CUDA: use
  shape (1,). The types are ``float16_t`` and ``bfloat16_t`` on both sides; load and store by static_cast.
- Metal's thread attributes are declared where the body, not the header, names them.
- Where the body holds the text ``x_shape`` for an input ``x``, its shape comes along as ints: ``x_shape[1]`` is how a
  size that changes from call to call gets in without an array. (``x_strides`` and ``x_ndim`` likewise; unused here.)
- MLX's grid counts threads; Metal cuts the last threadgroup, CUDA rounds it up. Here the grid counts threadgroups.
- Inputs that are not row contiguous are copied first, one launch each. Outputs start uninitialised.
- Metal's math mode is safe unless ``compile_options`` asks for another; CUDA compiles without fast math, fma allowed.
- Each set of templates, dtypes and small inputs is compiled once, so only sizes that stay are templates. Template ints
  become part of the function's name: none below 0.
- Each call joins header and body into one text, and each evaluation hashes it: comments are cut here.
- There is no gradient: wrap calls in mx.custom_function.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

Backend = Literal["metal", "cuda"]
FOLDER = Path(__file__).parent
LAUNCHES_KEPT = 256  # prepared launches a kernel, one for each set of sizes met

# Written into the body, not the header, so that MLX sees the attributes.
_PLACE = {
    "metal": """
const uint tid = thread_position_in_threadgroup.x;
const uint threads = threads_per_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simd_id = simdgroup_index_in_threadgroup;
const uint3 group = threadgroup_position_in_grid;
const uint3 group_count = threadgroups_per_grid;
""",
    "cuda": """
const uint tid = threadIdx.x;
const uint threads = blockDim.x;
const uint lane = tid % 32;
const uint simd_id = tid / 32;
const uint3 group = blockIdx;
const dim3 group_count = gridDim;
""",
}


class Kernel:
    """A kernel's name, arguments and texts; calling it launches it.

    Args:
        name: in the compiled function's name; letters, digits and underscores.
        inputs, outputs: names of the arrays in the body, in order.
        body: file of the body, in this folder (or an absolute path).
        helpers: files of functions that the body calls, put after the prologue; {backend} in a name becomes metal or
            cuda.
        ensure_row_contiguous: copy inputs that are not row contiguous before the launch.
        residents: a threadgroup's threads at most, and threadgroups that a multiprocessor is to hold at once, for which
            CUDA's compiler keeps to few enough registers; None: it takes as many as it likes.
    """

    def __init__(
        self,
        name: str,
        *,
        inputs: Sequence[str],
        outputs: Sequence[str],
        body: str | Path,
        helpers: Sequence[str | Path] = (),
        ensure_row_contiguous: bool = True,
        residents: tuple[int, int] | None = None,
    ):
        self.name = name
        self.inputs = list(inputs)
        self.outputs = list(outputs)
        self.body = FOLDER / body
        self.helpers = [FOLDER / helper for helper in helpers]
        self.ensure_row_contiguous = ensure_row_contiguous
        self.residents = residents
        self._launches: dict[tuple, Callable[..., list[mx.array]]] = {}

    def __call__(
        self,
        inputs: list[mx.array],
        *,
        groups: tuple[int, int, int],
        threads: int,
        output_shapes: list[tuple[int, ...]],
        output_dtypes: list[mx.Dtype],
        template: Mapping[str, mx.Dtype | int | bool] | None = None,
        backend: Backend,
    ) -> list[mx.array]:
        """Launch ``groups`` threadgroups of ``threads`` threads each (a multiple of 32, at most 1024)."""
        key = (backend, groups, threads, *output_shapes, *output_dtypes, *(template or {}).values())
        launch = self._launches.get(key)
        if launch is None:
            # MLX writes the kernel's text anew at each call; a compiled function keeps it, at a quarter of the time
            launch = mx.compile(
                partial(
                    self._launch,
                    build=self._metal if backend == "metal" else self._cuda,
                    template=list(template.items()) if template else None,
                    grid=(groups[0] * threads, groups[1], groups[2]),
                    threadgroup=(threads, 1, 1),
                    output_shapes=output_shapes,
                    output_dtypes=output_dtypes,
                )
            )
            if len(self._launches) >= LAUNCHES_KEPT:
                self._launches.clear()
            self._launches[key] = launch
        return launch(*inputs)

    @staticmethod
    def _launch(*inputs: mx.array, build: Callable[..., list[mx.array]], **arguments: Any) -> list[mx.array]:
        return build(inputs=list(inputs), **arguments)

    def text(self, backend: Backend) -> tuple[str, str]:
        """The header and the source that MLX is given."""
        helpers = [Path(str(path).format(backend=backend)) for path in self.helpers]
        header = "".join(_read(path) for path in [FOLDER / f"prologue_{backend}.h", *helpers])
        if self.residents and backend == "cuda":  # MLX writes the signature, so only its first word can say it
            header += "#undef __global__\n"
            header += "#define __global__ __attribute__((global)) __launch_bounds__({}, {})\n".format(*self.residents)
        return header, _PLACE[backend] + _read(self.body)

    @cached_property
    def _metal(self) -> Callable[..., list[mx.array]]:
        return self._build("metal")

    @cached_property
    def _cuda(self) -> Callable[..., list[mx.array]]:
        return self._build("cuda")

    def _build(self, backend: Backend) -> Callable[..., list[mx.array]]:
        make: Callable = mx.fast.metal_kernel if backend == "metal" else mx.fast.cuda_kernel
        header, source = self.text(backend)
        return make(
            name=self.name,
            input_names=self.inputs,
            output_names=self.outputs,
            source=source,
            header=header,
            ensure_row_contiguous=self.ensure_row_contiguous,
        )


def _read(path: Path) -> str:
    """A file's text without comments, indentation and empty lines."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(encoding="ascii"), flags=re.DOTALL)
    return "".join(f"{line.strip()}\n" for line in text.splitlines() if line.strip())
