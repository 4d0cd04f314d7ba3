"""--upload with the real client against a server on the loopback; a process for each, as users have it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import TINY_FOLDER
from upload_server import TOKEN, UploadHub, serve_uploads

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[UploadHub]:
    with serve_uploads(UploadHub()) as running:
        yield running


@pytest.fixture
def convert(hub: UploadHub, tmp_path: Path) -> Run:
    def run(repo: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        own = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        code = "import sys; from rodimus_mlx.cli.app import main; sys.exit(main())"
        return subprocess.run(
            [sys.executable, "-c", code, "convert", str(TINY_FOLDER), "out", *options, "--upload", repo],
            env={**kept, **own, **environment},
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=120,
        )

    return run


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert "Traceback" not in result.stderr
    return line


@pytest.mark.parametrize("repo", ["someone/tiny", "some-team/tiny"])
def test_everything_arrives(hub: UploadHub, convert: Run, tmp_path: Path, repo: str) -> None:
    result = convert(repo, "--bits", "4")
    assert result.returncode == 0, result.stderr
    out = tmp_path / "out"
    assert hub.files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert hub.created == [repo] and result.stdout.splitlines()[-1] == f"{hub.url}/{repo}"
    assert b"4 bit affine in groups of 64" in hub.files["README.md"]


@pytest.mark.parametrize(
    ("repo", "environment", "message"),
    [
        ("tiny", {}, "has the form owner/name, not 'tiny'"),
        ("a/b/c", {}, "has the form owner/name"),
        ("someone/tiny", {"HF_TOKEN": ""}, "needs a Hugging Face token that may write: run `hf auth login`"),
        ("someone/tiny", {"HF_TOKEN": "hf_old"}, "the Hugging Face token is not valid"),
        ("other/tiny", {}, "the token is for someone, some-team, who cannot write to other's"),
        ("someone/tiny", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ("someone/tiny", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "failed ("),
    ],
    ids=["no owner", "too deep", "no token", "old token", "not mine", "offline", "no hub"],
)
def test_refused_before_anything_is_written(
    hub: UploadHub,
    convert: Run,
    tmp_path: Path,
    repo: str,
    environment: dict[str, str],
    message: str,
) -> None:
    assert message in error_line(convert(repo, **environment))
    assert not (tmp_path / "out").exists() and not hub.files


@pytest.mark.parametrize("path", ["/api/repos/create", "/api/models/someone/tiny/commit"])
def test_a_token_that_may_not_write(hub: UploadHub, convert: Run, tmp_path: Path, path: str) -> None:
    hub.refuse = {path: 403}
    line = error_line(convert("someone/tiny"))
    assert "may not write to someone/tiny" in line
    assert "out is complete: `hf upload someone/tiny out` tries again" in line
    assert (tmp_path / "out" / "model.safetensors").exists()
