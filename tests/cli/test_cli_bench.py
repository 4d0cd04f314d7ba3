"""``rodimus-mlx bench`` as a user types it, on a tiny model and the bundled one."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from helpers import TINY_FOLDER
from rodimus_mlx.cli.app import main

from rodimus_mlx.bench import measure

TINY = ["--model", str(TINY_FOLDER)]
QUICK = ["--prompt-lengths", "5,40", "--tokens", "3", "--rounds", "3"]


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory's bandwidth is not what is tested."""
    monkeypatch.setattr(measure, "COPY_BYTES", 1 << 20)


def test_table_of_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *QUICK]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert ", MLX " in lines[0] and " GB/s; demo 9." in lines[0]
    rows = [line.split() for line in lines if line.startswith(" demo ")]
    assert [row[1] for row in rows] == ["5", "40"]
    assert all("±" in line and line.rstrip().endswith("%") for line in lines if line.startswith(" demo "))


def test_json_of_two_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *TINY, "--compare", TINY[1], "--bits", "4", "--json", *QUICK]) == 0
    found = json.loads(capsys.readouterr().out)
    ours, theirs = found["models"]
    assert (ours["name"], theirs["name"]) == ("tiny", f"{TINY_FOLDER}, 4 bit")
    assert theirs["weights_gb"] < ours["weights_gb"] / 4
    results = found["results"]
    assert [each["prompt_tokens"] for each in results] == [5, 5, 40, 40]
    for result in results:
        for kind in ("prefill_tokens_per_second", "decode_tokens_per_second"):
            speeds = result[kind]["rounds"]
            assert len(speeds) == 3 and min(speeds) > 0
            assert result[kind]["median"] == statistics.median(speeds)
        assert result["peak_memory_gb"] > 0
        decode = result["decode_tokens_per_second"]["median"]
        bandwidth = found["bandwidth_gb_per_second"] * 1e9
        assert result["bandwidth_share"] == pytest.approx(result["bytes_per_token"] * decode / bandwidth, rel=0.05)
    for ratio, (first, second) in zip(found["ratios"], [results[:2], results[2:]]):
        for kind in ("prefill", "decode"):
            key = f"{kind}_tokens_per_second"
            assert ratio[kind] == pytest.approx(first[key]["median"] / second[key]["median"], rel=1e-3)


def test_ratios_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *TINY, "--compare", TINY[1], *QUICK]) == 0
    assert f"\nprompt 40: tiny / {TINY_FOLDER}: prefill " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--model", "x", "--shape", "1.6b"], 2, "either of the two, not both"),
        (["--bits", "4"], 2, "is for random weights"),
        (["--prompt-lengths", "5,many"], 2, "must be whole numbers above 0, with commas between, not 5,many"),
        (["--prompt-lengths", "0"], 2, "must be whole numbers above 0"),
        (["--prompt-lengths", "5,99999999999"], 2, "must be at most 10000000 each, not 99999999999"),
        (["--tokens", "99999999999999999999"], 2, "'--tokens': must be 1 or more, and at most 10000000, not 9999999"),
        (["--tokens", "0"], 2, "'--tokens': must be 1 or more, and at most 10000000, not 0"),
        (["--shape", "7b"], 2, "'7b' is not one of '1.6b', '4b', '1.4b'"),
        (["--model", "nowhere"], 1, "there is no folder nowhere"),
        (["--compare", "nothing"], 1, "there is no model nothing: choose one of 1.6b, 4b, 1.4b, qwen2.5-1.5b"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == status
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("Error: ") and error.count("\n") == 1
    assert message in error


def test_another_architecture_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        **{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 96},
        **{"num_attention_heads": 4, "rms_norm_eps": 1e-5, "vocab_size": 50, "tie_word_embeddings": False},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["bench", *TINY, "--compare", str(tmp_path), *QUICK]) == 0
    assert f" {tmp_path} " in capsys.readouterr().out
