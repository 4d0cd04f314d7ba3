"""``rodimus-mlx inspect`` as a user types it, of folders and of what is on the hub alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TINY_FOLDER
from hub_server import Hub, serve
from rodimus_mlx.cli.app import main
from rodimus_mlx.convert.convert import convert
from rodimus_mlx.convert.schemes import make_scheme
from synthetic import ARCHITECTURES

from rodimus_mlx.loading import DEMO_FOLDER

REPO = "owner/Plus-Chat"


def test_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(TINY_FOLDER), "--context", "500"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    text = " ".join(printed.out.split())
    for part in ("Rodimus+, ", "ours format, safetensors (model.safetensors)", "not tied", "quantization: none, 32.00"):
        assert part in text
    for part in (
        "Memory at a context of 500 tokens",
        "as it is",
        "4 bit",
        "fits",
        "To finetune (lora, 4 x 2,048 tokens",
    ):
        assert part in text
    assert main(["inspect", str(TINY_FOLDER), "--context", "500", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert f"Rodimus+, {found['parameters']:,} parameters" in text
    assert found["context"] == 500 and found["available_memory"] > found["memory"]["as it is"]["total"]


def test_the_bundled_model_is_as_large_as_commands_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(DEMO_FOLDER), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] // 1_000_000 == 10


def test_quantized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(TINY_FOLDER, tmp_path / "out", scheme=make_scheme(3))
    assert main(["inspect", str(tmp_path / "out"), "--method", "full"]) == 0
    text = capsys.readouterr().out
    assert "quantization: 3 bit affine, groups of 64, " in text and "8 bit" not in text
    assert "To finetune: --method full cannot train a quantized model" in text


@pytest.mark.parametrize("options", [["--batch-size", "1"], ["--seq-len", "256"], ["--grad-checkpoint"]])
def test_finetuning_settings_matter(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    needs = []
    for given in ([], options):
        assert main(["inspect", str(TINY_FOLDER), "--json", *given]) == 0
        needs.append(json.loads(capsys.readouterr().out)["finetuning"]["memory"])
    assert needs[1] < needs[0]


def test_the_hub_is_asked_for_small_files_alone(tmp_path: Path) -> None:
    config = json.dumps({**ARCHITECTURES["1.6b"], "torch_dtype": "bfloat16"}).encode()
    files = {"config.json": config, "README.md": b"# Plus", "model.safetensors": b"x" * 1000, "their_code.py": b""}
    with serve(Hub(REPO, files)) as hub:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        code = "import sys; from rodimus_mlx.cli.app import main; sys.exit(main())"
        result = subprocess.run(
            [sys.executable, "-c", code, "inspect", REPO],
            env={
                **kept,
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_DISABLE_XET": "1",
                "NO_PROXY": "127.0.0.1",
            },
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        assert {name for name, _ in hub.downloads} == {"config.json", "README.md"}
    assert "1,607,095,296 parameters" in result.stdout and "not downloaded (sizes by config.json)" in result.stdout
    assert "quantization: none, 16.00 bits per weight" in result.stdout
