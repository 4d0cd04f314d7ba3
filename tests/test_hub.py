"""Hub ids with the real client against a server on the loopback; each call in a process of its own, as users do it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import TINY_FOLDER
from hub_server import Hub, serve

from rodimus_mlx.errors import RodimusError
from rodimus_mlx.hub import find_folder

REPO = "owner/Tiny-Chat"
WEIGHTS = bytes(range(256)) * 4000
SMALL = {"config.json": b"{}", "tokenizer.json": b"{}", "README.md": b"# Tiny\n"}

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve(Hub(REPO, {**SMALL, "model.safetensors": WEIGHTS})) as running:
        yield running


@pytest.fixture
def find(hub: Hub, tmp_path: Path) -> Run:
    """Runs find_folder(repo) in a fresh process; prints the folder, or the error's one line."""
    code = """
import sys
from rodimus_mlx.errors import RodimusError
from rodimus_mlx.hub import find_folder
try:
    print(find_folder(sys.argv[1]))
except RodimusError as error:
    print(error, file=sys.stderr)
    sys.exit(1)
"""

    def run(repo: str = REPO, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, repo],
            env=hub_environment(hub, tmp_path) | environment,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=120,
        )

    return run


def hub_environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return kept | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_downloads_one_format_and_keeps_it(hub: Hub, find: Run) -> None:
    hub.files |= {"pytorch_model.bin": b"unwanted", "modeling.py": b"unwanted", "onnx/model.onnx": b"unwanted"}
    first = find()
    folder = Path(first.stdout.strip())
    assert sorted(path.name for path in folder.iterdir()) == sorted([*SMALL, "model.safetensors"])
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    hub.downloads.clear()
    assert find().stdout == first.stdout
    assert hub.downloads == []


def test_torch_weights_where_there_are_no_others(hub: Hub, find: Run) -> None:
    hub.files = {**SMALL, "pytorch_model.bin": WEIGHTS, "onnx/model.safetensors": b"unwanted"}
    assert (Path(find().stdout.strip()) / "pytorch_model.bin").read_bytes() == WEIGHTS


def test_a_cut_transfer_goes_on_where_it_stopped(hub: Hub, find: Run) -> None:
    large = WEIGHTS * 25  # the client keeps what has come in whole pieces of 10 MB
    hub.files["model.safetensors"] = large
    hub.cut["model.safetensors"] = 15_000_000
    folder = Path(find().stdout.strip())
    assert (folder / "model.safetensors").read_bytes() == large
    first, second = (wanted for name, wanted in hub.downloads if name == "model.safetensors")
    assert first is None
    assert second is not None and 0 < int(second.removeprefix("bytes=").rstrip("-")) <= 15_000_000


def test_a_second_call_fetches_only_what_is_missing(hub: Hub, find: Run) -> None:
    hub.fail["model.safetensors"] = 500
    assert "run this again" in last_line(find())
    hub.fail.clear()
    hub.downloads.clear()
    folder = Path(find().stdout.strip())
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert {name for name, _ in hub.downloads} == {"model.safetensors"}


@pytest.mark.parametrize("status", [401, 403])
def test_gated(hub: Hub, find: Run, status: int) -> None:
    hub.refuse_files = (status, {"X-Error-Code": "GatedRepo"})
    line = last_line(find())
    assert f"{REPO} is gated: accept its licence at {hub.url}/{REPO}" in line
    assert "hf auth login" in line


def test_missing(hub: Hub, find: Run) -> None:
    line = last_line(find("owner/absent"))
    assert line.startswith("there is no folder owner/absent here, and no model owner/absent at http://127.0.0.1")


@pytest.mark.parametrize("why", [{}, {"X-Error-Message": "Invalid credentials in Authorization header"}])
def test_unauthorized(hub: Hub, find: Run, why: dict[str, str]) -> None:
    hub.refuse_api = (401, why)
    assert last_line(find(HF_TOKEN="hf_wrong")).endswith(
        f"{REPO} refuses access (401): it does not exist, or needs `hf auth login` with a token that may read it"
    )


def test_offline(find: Run) -> None:
    line = last_line(find(HF_HUB_OFFLINE="1"))
    assert f"there is no folder {REPO} here, HF_HUB_OFFLINE is set, and {REPO} is not in " in line
    folder = find().stdout
    assert find(HF_HUB_OFFLINE="1").stdout == folder


def test_no_network(hub: Hub, find: Run) -> None:
    nobody = "http://127.0.0.1:9"  # discard: nothing listens there
    assert f"{nobody} cannot be reached" in last_line(find(HF_ENDPOINT=nobody))
    folder = find().stdout
    assert find(HF_ENDPOINT=nobody).stdout == folder


def test_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Api:
        def model_info(self, repo: str, revision: str | None = None) -> huggingface_hub.ModelInfo:
            return huggingface_hub.ModelInfo(id=repo, siblings=[])

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(RodimusError, match=r"is full: free some space, or set HF_HOME .* owner/x$"):
        find_folder("owner/x")


@pytest.mark.parametrize("source", ["./x", "../a/b", "/no/such", "owner/name/", "a/b/c", "~/absent-x", "a\\b", "../x"])
def test_paths_never_go_to_the_hub(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rodimus_mlx.hub._download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(RodimusError) as caught:
        find_folder(source)
    assert str(caught.value) == f"there is no folder {source}"


def test_a_bare_name_explains_hub_ids() -> None:
    with pytest.raises(RodimusError, match=r"no folder absent \(a Hugging Face id has the form owner/name\)"):
        find_folder("absent")


def test_a_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(RodimusError, match="is a file; give the folder that holds it"):
        find_folder(tmp_path / "model.bin")


def test_generates_from_a_hub_id(hub: Hub, tmp_path: Path) -> None:
    hub.files = {path.name: path.read_bytes() for path in TINY_FOLDER.iterdir()}
    command = [sys.executable, "-m", "rodimus_mlx.cli.app", "generate", "--model", REPO, "hello", "-n", "4"]
    result = subprocess.run(
        command, env=hub_environment(hub, tmp_path), capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) == 5
    assert "rodimus.py" not in {name for name, _ in hub.downloads}
