"""The command as a whole: help pages, start-up, errors, interrupts."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TINY_FOLDER
from rodimus_mlx.cli import app

from rodimus_mlx.errors import RodimusError
from rodimus_mlx.version import __version__

HEAVY = ("mlx", "mlx_lm", "numpy", "transformers", "tokenizers", "huggingface_hub", "rich", "tqdm")
COMMANDS = [module.__name__.rpartition(".")[2] for module in app.COMMANDS]
ALL_HELP = [["--help"], [], *([name, "--help"] for name in COMMANDS)]

every_help = pytest.mark.parametrize("arguments", ALL_HELP, ids=" ".join)


@every_help
def test_help_fits_80_columns_and_ends_with_an_example(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert app.main(arguments) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert text.rstrip().partition("\n  Example:\n")[2].strip().startswith("rodimus-mlx ")


@every_help
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from rodimus_mlx.cli.app import main
status = main({arguments})
print("HEAVY", [name for name in {HEAVY} if name in sys.modules], status)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "HEAVY [] 0", result.stderr


def test_every_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    app.main(["--help"])
    listed = capsys.readouterr().out.partition("Commands:")[2]
    assert all(f"\n  {name} " in listed for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rodimus-mlx {__version__}\n"


def test_the_installed_command_runs() -> None:
    script = Path(sys.executable).with_name("rodimus-mlx")
    result = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60)
    assert result.stdout == f"rodimus-mlx {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["genrate", "x"], "No such command 'genrate'. Did you mean 'generate'?"),
        (["generate", "x", "--max-token", "3"], "No such option: --max-token"),
        (["generate", "x", "y"], "unexpected extra argument"),
        (["convert", "x"], "Missing argument 'OUT'"),
        (["generate", "x", "--max-tokens", "many"], "Invalid value for '--max-tokens'"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("raised", "status", "shown"),
    [
        (RodimusError("the file\nis odd"), 1, "Error: the file is odd\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 1, ""),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "Error: standard output cannot be written: No space left on device\n",
        ),
    ],
)
def test_how_a_command_ends(
    raised: BaseException, status: int, shown: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(app, "app", fail)
    assert app.main([]) == status
    assert capfd.readouterr().err == shown


def test_an_unexpected_exception_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(app, "app", fail)
    with pytest.raises(ZeroDivisionError):
        app.main([])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize(
    "arguments", [["--help"], ["generate", "x", "-n", "1", "-m", str(TINY_FOLDER)]], ids=["help", "generate"]
)
def test_a_full_disk_is_one_line(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "rodimus_mlx.cli.app", *arguments]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (
        1,
        "Error: standard output cannot be written: No space left on device\n",
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams(closed: str) -> None:
    prompt = "" if closed == "<&-" else "x"
    command = f"{sys.executable} -m rodimus_mlx.cli.app generate {prompt} -n 1 -m {TINY_FOLDER} {closed}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in result.stderr and result.returncode == (1 if closed == "<&-" else 0)


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "rodimus_mlx.cli.app", "generate", "x", "--max-tokens", "20000"]
    command += ["--model", str(TINY_FOLDER)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(5)
        process.stdout.close()
        error = process.stderr.read().decode()
        assert process.wait(timeout=60) == 1
    assert error == ""
