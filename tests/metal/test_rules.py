"""Every text in the package keeps the rules, and each rule catches what it names."""

import pytest

from rodimus_mlx.kernels.launch import FOLDER

from .rules import faults

TEXTS = sorted(FOLDER.glob("*.metal"))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_package_texts(path):
    # Helpers are the texts that declare functions; the rest are bodies.
    assert faults(path, is_body="FN " not in path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("is_body", "text", "message"),
    [
        pytest.param(True, "float4 v;", "vector types", id="float4"),
        pytest.param(True, "auto f = [&](int i) { return i; };", "no lambdas", id="lambda"),
        pytest.param(True, "double x = 0;", "no double", id="double"),
        pytest.param(True, "x = metal::exp(x);", "one backend", id="metal_namespace"),
        pytest.param(True, "uint i = threadIdx.x;", "one backend", id="thread_idx"),
        pytest.param(True, "__syncthreads();", "one backend", id="cuda_function"),
        pytest.param(True, "int n = x_strides[0];", "MLX adds arguments", id="strides"),
        pytest.param(True, "uint i = thread_position_in_grid.x;", "thread attributes", id="attribute"),
        pytest.param(True, "THREADGROUP float a[3];", "by TG_ARRAY", id="threadgroup_array"),
        pytest.param(True, "const device float* p = x;", "address spaces", id="plain_device"),
        pytest.param(True, "if (x) {\nTG_ARRAY(float, a, 3);\n}", "body's top", id="nested_array"),
        pytest.param(False, "FN void f() {\nTG_ARRAY(float, a, 3);\n}", "body's top", id="array_in_helper"),
        pytest.param(False, "FN void f(const float* p, int i) {}", "without an address space", id="pointer"),
        pytest.param(False, "FN void f(int i, float& r) {}", "without an address space", id="reference"),
        pytest.param(False, "constexpr float A = 1.0f;", "CONSTANT constexpr", id="constant"),
        pytest.param(True, "float x = 1.0f; // caf\u00e9", "not ASCII", id="ascii"),
    ],
)
def test_rule(tmp_path, is_body, text, message):
    path = tmp_path / "text.metal"
    path.write_text(text, encoding="utf-8")
    found = faults(path, is_body=is_body)
    assert len(found) == 1 and message in found[0], found


@pytest.mark.parametrize(
    "text",
    [
        "// float4 and double in a comment\nconst auto p = x + group.x * N;",
        "TG_ARRAY(float, a, 32);\na[tid] = x[tid] * a[lane];",
        "FN void f(const DEVICE float* p, THREAD float& r, float x, float y) { r = g(x * y, p[0] & 3); }",
        "CONSTANT constexpr float A = 1.0f;\ntemplate <typename P, int N>\nFN float f(P p) { return p[N]; }",
    ],
)
def test_allowed(tmp_path, text):
    path = tmp_path / "text.metal"
    path.write_text(text)
    assert faults(path, is_body="FN" not in text and "CONSTANT" not in text) == []
