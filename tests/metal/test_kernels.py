"""Every kernel, and whole models made of them, compute what plain MLX computes."""

import mlx.core as mx
import pytest

from rodimus_mlx.kernels import launchers, launchers_backward
from rodimus_mlx.kernels.check import DTYPES, Sizes, compare_all, recurrence_errors
from rodimus_mlx.kernels.launch import Kernel

from .comparisons import CASES, DECAY_SIZES, DECAYS, FLOAT64, SIZES, STATE, model_bound, model_errors

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).rpartition(".")[2])


@dtypes
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: str(sizes).replace(" ", ","))
@pytest.mark.usefixtures("metal")
def test_kernels_equal_plain_mlx(sizes, dtype):
    found = list(compare_all("metal", [sizes], [dtype]))
    assert len(found) > 20
    assert [each for each in found if not each.passed] == []


@pytest.mark.skipif(mx.metal.is_available(), reason="Metal does not list its launches")
def test_every_kernel_is_compared(metal):
    for _ in compare_all("metal", [Sizes(1, 17, 16, 32)], [mx.float32, mx.float16]):
        pass
    named = {**vars(launchers), **vars(launchers_backward)}
    kernels = [value.name for value in named.values() if isinstance(value, Kernel)]
    assert len(kernels) > 5
    launched = {launch.name for launch in metal}
    assert [name for name in kernels if not any(f"{name}__" in each for each in launched)] == []


@dtypes
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.usefixtures("metal")
def test_recurrence_and_gradients_against_float64(decay, dtype):
    errors = recurrence_errors("metal", DECAY_SIZES, dtype, DECAYS[decay])
    assert set(errors) == {"o", "state", "d_qkgt", "d_bias", "d_v", "d_state"}
    assert {name: error for name, error in errors.items() if not error <= FLOAT64[dtype]} == {}
    assert errors["state"] <= STATE


@dtypes
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("block_type", ["rodimus_plus", "rodimus"])
@pytest.mark.usefixtures("metal")
def test_models_equal_plain_mlx(block_type, case, dtype):
    errors = model_errors(case, block_type, dtype, "metal")
    assert {name: error for name, error in errors.items() if not error <= model_bound(case, dtype)} == {}
