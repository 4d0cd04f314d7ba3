"""The doctor finds what is wrong, says so plainly, and knows the released sizes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from helpers import random_model, tiny_config
from mlx.utils import tree_flatten
from mlx_lm.models.cache import CacheList, RotatingKVCache
from rodimus_mlx.cli.app import main
from talker import talker

from rodimus_mlx import doctor
from rodimus_mlx.bench.models import SHAPES
from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.doctor import Check, Report, examine, verdict
from rodimus_mlx.kernels.check import Comparison, Sizes


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 100 GB/s and 16 GB."""
    monkeypatch.setattr(doctor, "memory_bandwidth", lambda: 100e9)
    monkeypatch.setattr(doctor, "_memory_bytes", lambda: 16e9)


def found(report: Report) -> dict[str, bool | None]:
    return {check.name: check.passed for check in report.checks}


class TestExamine:
    def test_a_sound_machine(self) -> None:
        seen: list[str] = []
        report = examine(*talker(), seen.append)
        assert found(report) == {
            "kernels = plain MLX": None,
            "recurrence = float64 reference": True,
            "GPU = CPU": None,
            "decode = prefill": True,
            "batch = alone": True,
            "continuous batching = alone": True,
        }
        assert seen == [*found(report), "memory bandwidth"]
        assert report.passed
        assert verdict(report).startswith("All is right. No GPU kernels run here")
        assert json.loads(json.dumps(report.to_dict()))["passed"]
        assert {"Python", "mlx", "mlx-lm", "rodimus-mlx"} <= set(report.versions)

    def test_a_wrong_cache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, tokenizer = talker()

        def short_window(self: Any) -> list[Any]:
            return [CacheList(layer[0], RotatingKVCache(max_size=3)) for layer in original(self)]

        original = type(model).make_cache
        monkeypatch.setattr(type(model), "make_cache", short_window)
        report = examine(model, tokenizer)
        assert found(report)["decode = prefill"] is False
        assert not report.passed
        assert verdict(report).startswith("NOT RIGHT: decode = prefill")

    def test_what_raises_is_what_was_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> Iterator[Comparison]:
            raise RuntimeError("program_source:3: error")

        monkeypatch.setattr(doctor, "active_backend", lambda: "metal")
        monkeypatch.setattr(doctor, "recurrence_errors", lambda *_: {"o": 0.0})
        monkeypatch.setattr(doctor, "compare_all", fail)
        report = examine(*talker())
        assert report.checks[0] == Check("kernels = plain MLX", False, "RuntimeError: program_source:3: error")
        assert verdict(report).startswith("NOT RIGHT: kernels = plain MLX. Please report this")

    @pytest.mark.parametrize(
        ("errors", "passed", "text"),
        [
            ([1e-6, 5e-6], True, "2 comparisons, the worst 0.50 of what is allowed (step[0])"),
            ([1e-6, 3e-5], False, "1 of 2 differ; step[0] float32 B=2 T=37 n=24 D=72: 3.0e-05 > 1e-05"),
            ([float("nan")], False, "1 of 1 differ; step[0] float32 B=2 T=37 n=24 D=72: nan > 1e-05"),
        ],
        ids=["right", "wrong", "nan"],
    )
    def test_kernels(self, errors: list[float], passed: bool, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        one = Comparison("step[0]", mx.float32, Sizes(), 0.0, 1e-5)
        monkeypatch.setattr(doctor, "active_backend", lambda: "metal")
        monkeypatch.setattr(doctor, "compare_all", lambda: (replace(one, error=error) for error in errors))
        assert doctor._kernels() == (passed, text)

    def test_a_recurrence_that_is_not_a_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "recurrence_errors", lambda *_: {"o": 1e-9, "state": float("nan")})
        assert doctor._recurrence()[0] is False

    def test_the_metal_verdict(self) -> None:
        report = Report({}, {}, "metal", [Check("kernels = plain MLX", True, "")])
        assert verdict(report) == "All is right: the Metal kernels give what the reference gives on this machine."


# Stated with the checkpoints; vectors (norms, biases) are left out, and are less than this share.
COUNTS = {"1.6b": 1_607_095_296, "4b": 4_786_527_232, "1.4b": 1_531_551_744}
VECTORS = 1e-3


class TestSpeeds:
    @pytest.mark.parametrize("name", COUNTS)
    def test_released_sizes(self, name: str) -> None:
        weights, _ = doctor._parameters(RodimusConfig.from_dict(SHAPES[name]))
        assert 0 <= 1 - weights / COUNTS[name] < VECTORS

    @pytest.mark.parametrize("block", ["rodimus", "rodimus_plus"])
    @pytest.mark.parametrize("tied", [True, False])
    def test_every_matrix_is_counted(self, block: str, tied: bool) -> None:
        config = tiny_config(block, tie_word_embeddings=tied)
        parameters = tree_flatten(random_model(config).parameters())
        matrices = sum(array.size for _, array in parameters if array.ndim > 1)
        embedding = 0 if tied else config.vocab_size * config.d_model
        assert doctor._parameters(config) == (matrices, matrices - embedding)

    def test_table(self) -> None:
        speeds = {(each.checkpoint, each.weights): each for each in doctor._speeds(100e9, 16e9)}
        assert len(speeds) == 9
        four = speeds["4b", "16 bits"]
        assert 9.5 < four.gigabytes < 10.5
        assert four.fits and not next(doctor._speeds(100e9, 4e9)).fits
        assert 100 / 10 < four.tokens_per_second < 100 / 8
        assert speeds["4b", "4 bits"].tokens_per_second > 2.5 * four.tokens_per_second


class TestCommand:
    def test_report(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["doctor"]) == 0
        out, error = capsys.readouterr()
        assert error == ""
        for line in ("Versions", "Machine", "Checks, with the bundled model", "  bandwidth       100.0 GB/s"):
            assert line in out.splitlines()
        assert "  ok   decode = prefill " in out
        assert "  -    GPU = CPU                       there is no GPU\n" in out
        assert out.endswith("nothing to say about them.\n")

    def test_json_and_status(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "_decode", lambda *_: (False, "logits differ by 1.0"))
        assert main(["doctor", "--json"]) == 1
        report = json.loads(capsys.readouterr().out)
        assert not report["passed"]
        assert {"name": "decode = prefill", "passed": False, "found": "logits differ by 1.0"} in report["checks"]
        assert main(["doctor"]) == 1
        assert "  FAIL decode = prefill " in capsys.readouterr().out
