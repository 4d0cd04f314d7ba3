"""The sample kernels' CUDA text compiles. Its results are not compared here: that takes a GPU."""

import mlx.core as mx
import pytest

from rodimus_mlx.kernels.launch import Kernel

from .cuda_text import compile_cuda, cuda_text, nvcc
from .emulator import HERE

needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="no nvcc: the CUDA texts are not compiled here")
SAMPLES = HERE / "samples"


def scan(dtype: mx.Dtype) -> str:
    kernel = Kernel(
        "scan",
        inputs=["x", "g"],
        outputs=["y", "last"],
        body=SAMPLES / "scan.metal",
        helpers=[SAMPLES / "scan_helpers.metal"],
    )
    inputs = [mx.zeros((8, 45), dtype), mx.zeros((8,))]
    template: dict = {"T": dtype, "LENGTH": 8, "WIDTH": 45, "FLAG": True}
    return cuda_text(kernel, inputs, output_dtypes=[dtype, mx.float32], template=template)


def test_text():
    text = scan(mx.bfloat16)
    assert "const __nv_bfloat16* x, const float* g, __nv_bfloat16* y, float* last)" in text
    assert "using T = __nv_bfloat16;\n  constexpr int LENGTH = 8;" in text and "constexpr bool FLAG = true;" in text


@needs_nvcc
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=lambda dtype: str(dtype).split(".")[-1])
def test_scan_compiles(dtype):
    assert "registers" in compile_cuda(scan(dtype))


@needs_nvcc
@pytest.mark.parametrize("name", ["prefix", "row_sum", "copy"])
def test_sample_compiles(name):
    kernel = Kernel(name, inputs=["x"], outputs=["y"], body=SAMPLES / f"{name}.metal")
    template: dict = {"T": mx.float32, "N": 140, "BARRIER": True}
    compile_cuda(cuda_text(kernel, [mx.zeros((140,))], output_dtypes=[mx.float32], template=template))


@needs_nvcc
def test_shapes_compile(tmp_path):
    (tmp_path / "body.metal").write_text("y[tid] = x[0] * float(x_shape[tid % 2]);")
    kernel = Kernel("body", inputs=["x"], outputs=["y"], body=tmp_path / "body.metal")
    compile_cuda(cuda_text(kernel, [mx.zeros((3, 32))], output_dtypes=[mx.float32]))


@needs_nvcc
def test_an_error_is_reported(tmp_path):
    (tmp_path / "body.metal").write_text("y[tid] = metal::exp(x[tid]);")
    kernel = Kernel("body", inputs=["x"], outputs=["y"], body=tmp_path / "body.metal")
    with pytest.raises(AssertionError, match="metal"):
        compile_cuda(cuda_text(kernel, [mx.zeros((32,))], output_dtypes=[mx.float32]))
