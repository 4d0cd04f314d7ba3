"""The emulator itself: sample kernels equal numpy, and every fault that it is there to catch is caught."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from rodimus_mlx.kernels.launch import Kernel

from .emulator import HERE, KernelFault, metal_on_cpu, run_metal

pytestmark = pytest.mark.skipif(mx.metal.is_available(), reason="Metal itself runs the kernels here")

SAMPLES = HERE / "samples"
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
# One rounding of the result to T, and sums of a hundred float32 values in another order.
TOLERANCE = {mx.float32: 1e-6, mx.float16: 2**-11, mx.bfloat16: 2**-8}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[-1])


def sample(name: str, inputs: list[str], outputs: list[str], **files) -> Kernel:
    return Kernel(name, inputs=inputs, outputs=outputs, body=SAMPLES / f"{name}.metal", **files)


def written(tmp_path, text: str, helpers: str = "") -> Kernel:
    """A kernel x -> y from a body in a string."""
    (tmp_path / "body.metal").write_text(text)
    (tmp_path / "helpers.metal").write_text(helpers)
    return Kernel(
        "body", inputs=["x"], outputs=["y"], body=tmp_path / "body.metal", helpers=[tmp_path / "helpers.metal"]
    )


def launch(kernel: Kernel, x: mx.array, *, threads: int = 32, groups: int = 1, size: int | None = None, **template):
    return run_metal(
        kernel,
        [x],
        groups=(groups, 1, 1),
        threads=threads,
        output_shapes=[(x.size if size is None else size,)],
        output_dtypes=[x.dtype],
        template=template,
        backend="metal",
    )[0]


def values(shape: tuple[int, ...], dtype: mx.Dtype = mx.float32, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)


def exact(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def assert_close(actual: mx.array, expected: np.ndarray, dtype: mx.Dtype) -> None:
    assert actual.dtype == dtype
    np.testing.assert_allclose(exact(actual), expected, rtol=TOLERANCE[dtype], atol=1e-5)


# ---- sample kernels ----


@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (5, 77), (3, 300)], ids=str)
@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_row_sum(dtype, shape, threads):
    x = values(shape, dtype)
    kernel = sample("row_sum", ["x"], ["y"])
    y = launch(kernel, x, threads=threads, groups=shape[0], size=shape[0], T=dtype, N=shape[1], BARRIER=True)
    assert_close(y, exact(x).sum(1), dtype)


@dtypes
@pytest.mark.parametrize(("length", "width"), [(3, 45), (19, 64)])
def test_scan(dtype, length, width):
    x, g = values((length, width), dtype), -mx.abs(values((length,), seed=1))
    kernel = sample("scan", ["x", "g"], ["y", "last"], helpers=[SAMPLES / "scan_helpers.metal"])
    y, last = run_metal(
        kernel,
        [x, g],
        groups=(2, 1, 1),
        threads=32,
        output_shapes=[x.shape, (width,)],
        output_dtypes=[dtype, mx.float32],
        template={"T": dtype, "LENGTH": length, "WIDTH": width},
        backend="metal",
    )
    state, expected = np.zeros(width), []
    for row, decay in zip(exact(x), np.exp(exact(g))):
        state = decay * state + row
        expected.append(state)
    assert_close(y, np.stack(expected), dtype)
    assert_close(last, state, mx.float32)


def doubled(x: mx.array) -> mx.array:
    return sample("copy", ["x"], ["y"])(
        [x],
        groups=(1, 1, 1),
        threads=32,
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
        template={"T": x.dtype, "N": x.size},
        backend="metal",
    )[0]


def test_in_a_gradient_and_under_compile():
    function: Any = mx.custom_function(doubled)

    @function.vjp
    def doubled_vjp(primals, cotangent, output):
        return doubled(cotangent)

    x = values((64,))

    def loss(x: mx.array) -> mx.array:
        return mx.square(function(x)).sum()

    gradient = run_metal(mx.compile(mx.grad(loss)), x)
    assert_close(gradient, 8 * exact(x), mx.float32)


@pytest.mark.parametrize("n", [1, 31, 33, 250])
def test_prefix_sums(n):
    x = values((n,))
    y = launch(sample("prefix", ["x"], ["y"]), x, threads=256, N=n)
    assert_close(y, exact(x).cumsum(), mx.float32)


@dtypes
def test_four_at_a_time(dtype):
    x = values((140,), dtype)
    y = launch(sample("copy", ["x"], ["y"]), x, groups=2, T=dtype, N=140)
    assert_close(y, 2 * exact(x), dtype)


def test_c_functions(tmp_path):
    names = {"expf": np.exp, "exp2f": np.exp2, "log1pf": np.log1p, "sqrtf": np.sqrt, "logf": np.log, "log2f": np.log2}
    x = mx.array(np.geomspace(1e-6, 50, 64, dtype=np.float32))
    for name, function in names.items():
        y = launch(written(tmp_path, f"y[tid] = {name}(x[tid]);"), x, threads=64)
        np.testing.assert_allclose(exact(y), function(exact(x)), rtol=1e-6, err_msg=name)
    body = "y[tid] = powf(x[tid], 0.5f) * rsqrtf(x[tid]) * fmaxf(fminf(fabsf(-x[tid]), 3.0f), 1.0f);"
    y = launch(written(tmp_path, body), x, threads=64)
    np.testing.assert_allclose(exact(y), exact(x).clip(1, 3), rtol=1e-6)


def test_inputs_that_are_views():
    x = values((6, 9)).T[::2]
    y = launch(sample("row_sum", ["x"], ["y"]), x, groups=5, size=5, T=mx.float32, N=6, BARRIER=True)
    assert_close(y, exact(x).sum(1), mx.float32)


def test_shapes_as_arguments(tmp_path):
    y = launch(written(tmp_path, "y[tid] = x[0] * float(x_shape[tid % 2]);"), mx.ones((3, 32)), size=32)
    assert exact(y)[:2].tolist() == [3, 32]


def test_launches_are_listed():
    with metal_on_cpu() as launches:
        sample("prefix", ["x"], ["y"])(
            [values((40,))],
            groups=(1, 1, 1),
            threads=64,
            output_shapes=[(40,)],
            output_dtypes=[mx.float32],
            template={"N": 40},
            backend="metal",
        )
    assert [(each.grid, each.threadgroup) for each in launches] == [((64, 1, 1), (64, 1, 1))]
    assert "const device float* x [[buffer(0)]]" in launches[0].text


# ---- faults ----


def reverse(fault: int, size: int = 64) -> mx.array:
    return launch(sample("reverse", ["x"], ["y"]), values((64,)), threads=64, N=64, SIZE=size, FAULT=fault)


def test_reverse_without_fault():
    np.testing.assert_array_equal(np.array(reverse(0)), np.array(values((64,)))[::-1])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        pytest.param(1, r"the barrier is reached by 63 of 64 threads .*: TG_BARRIER\(\);", id="divergent_barrier"),
        pytest.param(2, "others wait at the barrier of line", id="two_barriers"),
        pytest.param(3, r"simd_sum is reached by 27 of 32 lanes \(mask ffffffe0\)", id="divergent_simd_sum"),
        pytest.param(4, "byte 256 of `y`, which has 256", id="write_after_output"),
        pytest.param(5, "a write outside of `y`: byte -4 of 256", id="write_before_output"),
        pytest.param(6, "out of bounds: byte 1048576 of `x`", id="read_far_after_input"),
        pytest.param(7, r"1 of 64 elements of `y` are not written, the first at \(5,\)", id="unwritten"),
        pytest.param(8, "thread 0 of .* an index outside of a local or threadgroup array", id="write_after_array"),
        pytest.param(9, "a write outside of the threadgroup arrays, before `behind`", id="pointer_after_array"),
    ],
)
def test_fault(fault, message):
    with pytest.raises(KernelFault, match=message):
        reverse(fault)


def test_missing_barrier():
    kernel = sample("row_sum", ["x"], ["y"])
    with pytest.raises(KernelFault, match="depend on the threads' order"):
        launch(kernel, values((5, 77)), threads=64, groups=5, size=5, T=mx.float32, N=77, BARRIER=False)


def test_too_much_threadgroup_memory():
    assert reverse(0, size=8 * 1024 - 4).shape == (64,)
    with pytest.raises(KernelFault, match="more than 32768"):
        reverse(0, size=8 * 1024 - 3)


@pytest.mark.parametrize("threads", [0, 40, 1056])
def test_threads_of_a_threadgroup(threads):
    with pytest.raises(KernelFault, match=r"not of 32, 64, \.\.\. 1024 threads"):
        launch(sample("prefix", ["x"], ["y"]), values((8,)), threads=threads, N=8)


def test_zero_dimensional_input(tmp_path):
    with pytest.raises(KernelFault, match="0-dim"):
        launch(written(tmp_path, "y[tid] = x;"), mx.array(1.0), size=32)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("const float* p = x; y[tid] = p[tid];", id="pointer_without_device"),
        pytest.param("const constant float* p = x; y[tid] = p[tid];", id="constant_for_device"),
        pytest.param("TG_ARRAY(float, a, 32); device float* p = a; y[tid] = p[tid];", id="device_for_threadgroup"),
        pytest.param("threadgroup float a[32]; a[tid] = x[tid]; y[tid] = a[tid];", id="array_without_macro"),
        pytest.param("y[tid] = static_cast<half>(x[tid]);", id="implicit_half_to_float"),
        pytest.param("half h = x[tid]; y[tid] = static_cast<float>(h);", id="implicit_float_to_half"),
        pytest.param("bfloat16_t h = x[tid]; y[tid] = static_cast<float>(h);", id="implicit_float_to_bfloat"),
        pytest.param("y[tid] = x[tid] * 0.1;", id="double_constant"),
        pytest.param("y[tid] = simd_sum(static_cast<int>(x[tid]));", id="simd_sum_of_int"),
        pytest.param("y[tid] = expm1f(x[tid]);", id="unknown_function"),
        pytest.param("float s; if (tid > 3) { s = 1.0f; } y[tid] = s;", id="uninitialised"),
        pytest.param("y[tid] = helper(x, tid);", id="helper_with_device_pointer_alone"),
    ],
)
def test_does_not_compile(tmp_path, body):
    helpers = "FN float helper(const device float* p, uint i) { return p[i]; }"
    x = values((4 if "helper" in body else 32,))  # below 8 elements an input is `constant`
    with pytest.raises(KernelFault, match="does not compile"):
        launch(written(tmp_path, body, helpers), x, size=32)
    launch(written(tmp_path, "y[tid] = 1.0f;", helpers), x, size=32)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param("float v[4]; v[tid] = x[0]; y[tid] = v[tid];", "undefined behaviour", id="local_array"),
        pytest.param("float v[4]; load4(x + tid, v); y[tid] = v[0];", "not aligned", id="load4_off_alignment"),
        pytest.param("y[tid] = x[tid];", "1 of 32 .* memory never written", id="just_after_input"),
        pytest.param("y[tid] = x[0] * float(x_shape[1]);", "memory never written", id="shape"),
    ],
)
def test_undefined_behaviour(tmp_path, body, message):
    with pytest.raises(KernelFault, match=message):
        launch(written(tmp_path, body), values((31,)), size=32)


def test_write_to_an_input(tmp_path):
    body = "device float* p = (device float*)x; p[tid] = 1.0f; y[tid] = 1.0f;"
    with pytest.raises(KernelFault, match="a write to the input `x`"):
        launch(written(tmp_path, body), values((32,)))
