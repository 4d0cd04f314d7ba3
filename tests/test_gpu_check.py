"""The check of a GPU, here in the emulator of Metal: that it passes, fails, and says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gpu_check
import mlx.core as mx
import pytest
from metal.emulator import metal_on_cpu

pytestmark = pytest.mark.skipif(mx.is_available(mx.gpu), reason="the script itself runs on this machine")


def test_all_bounds_kept(capsys):
    mx.random.seed(0)
    with metal_on_cpu():
        assert gpu_check.check("metal", quick=True)
    lines = capsys.readouterr().out.splitlines()
    assert "all kept" in lines[-1]
    assert len(lines) == 1 + 2 + 2 + 2 + 1  # header, kernels, recurrence, models, verdict


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_broken_bound_is_named(capsys, monkeypatch, error):
    errors = [gpu_check.Error("kept", 1e-6, 1e-5), gpu_check.Error("broken", error, 1e-5)]
    monkeypatch.setattr(
        gpu_check, "comparisons", lambda *_: [("first", mx.float32, errors[:1]), ("second", mx.float32, errors)]
    )
    assert not gpu_check.check()
    _, first, second, broken, verdict = capsys.readouterr().out.splitlines()
    assert "FAILED" not in first and second.endswith("broken  FAILED")
    assert broken.strip() == f"FAILED broken: {error:.1e} is above 1.0e-05"
    assert verdict.startswith("3 bounds, 1 FAILED")


def test_without_a_gpu():
    result = subprocess.run(
        [sys.executable, Path(gpu_check.__file__), "--quick"], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: MLX has no GPU here") and result.stderr.count("\n") == 1
