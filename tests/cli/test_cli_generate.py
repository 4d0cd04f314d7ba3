"""``rodimus-mlx generate`` as a user types it, on a tiny model."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import TINY_FOLDER
from rodimus_mlx.cli.app import main

import rodimus_mlx

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
COMMAND = [sys.executable, "-m", "rodimus_mlx.cli.app", "generate"]
SPEEDS = re.compile(r"prompt \d+ at [\d.]+ tokens/s, generated \d+ at [\d.]+ tokens/s, peak [\d.]+ [MG]B")


class Result(NamedTuple):
    """Exit status and what was printed."""

    status: int
    out: str
    err: str


Generate = Callable[..., Result]


@pytest.fixture
def generate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Generate:
    """Runs the command in this process."""

    def run(*arguments: str, stdin: bytes | None = None, model: str | Path | None = TINY_FOLDER) -> Result:
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status = main(["generate", *arguments, *(["--model", str(model)] if model else [])])
        return Result(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model under a chat model's name."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(TINY_FOLDER, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"is_chat_model": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def text_of(prompt: Any, **options: Any) -> str:
    return rodimus_mlx.generate(*rodimus_mlx.load(TINY_FOLDER), prompt, **options)


class TestText:
    def test_the_default_is_the_bundled_model(self, generate: Generate) -> None:
        result = generate("class Point:\n    def __init__(self, x, y):\n", "--max-tokens", "20", model=None)
        assert result.status == 0
        assert result.out.startswith("        self.x = x\n")
        note, speeds = result.err.splitlines()
        assert note == "No --model given: the bundled 10M-parameter model completes Python."
        assert SPEEDS.fullmatch(speeds)
        assert "generated 20 at" in speeds
        assert max(len(note), len(speeds)) <= 80

    def test_a_named_model_has_no_note(self, generate: Generate) -> None:
        result = generate("hello", "-n", "3")
        assert SPEEDS.fullmatch(result.err.strip())

    @pytest.mark.parametrize("arguments", [[], ["-"]])
    def test_standard_input(self, generate: Generate, arguments: list[str]) -> None:
        result = generate(*arguments, "-n", "5", stdin="grüße 你\n".encode())
        assert result.out == text_of("grüße 你\n", max_tokens=5) + "\n"

    def test_seeds(self, generate: Generate) -> None:
        def sample(seed: str) -> str:
            return generate("hello", "--temp", "1", "--seed", seed, "-n", "30").out

        assert sample("1") == sample("1") != sample("2")

    @pytest.mark.parametrize("temperature", ["1e-39", "9e-5"])
    def test_the_coldest_sampling_is_greedy(self, generate: Generate, temperature: str) -> None:
        result = generate("hello", "--temp", temperature, "--seed", "1", "-n", "20")
        assert result.out == text_of("hello", max_tokens=20) + "\n"

    @pytest.mark.parametrize(
        "option", [("--top-k", "1"), ("--top-p", "0.0001"), ("--min-p", "1")], ids=lambda option: option[0]
    )
    def test_narrow_sampling_is_greedy(self, generate: Generate, option: tuple[str, str]) -> None:
        result = generate("hello", "--temp", "1", "--seed", "1", "-n", "20", *option)
        assert result.out == text_of("hello", max_tokens=20) + "\n"

    def test_a_top_k_beyond_the_vocabulary(self, generate: Generate) -> None:
        sample = ["hello", "--temp", "1", "--seed", "1", "-n", "20"]
        assert generate(*sample, "--top-k", "5000").out == generate(*sample).out

    def test_repetition_penalty(self, generate: Generate) -> None:
        text = generate("hello", "-n", "20", "--repetition-penalty", "1e9").out
        assert len(set(text)) == len(text)

    def test_stop_strings(self, generate: Generate) -> None:
        whole = text_of("hello", max_tokens=20)
        result = generate("hello", "-n", "20", "--stop", "never there", "--stop", whole[7:10])
        assert result.out == whole[: whole.index(whole[7:10])] + "\n"


class TestChat:
    MESSAGES = ({"role": "system", "content": "S"}, {"role": "user", "content": "hello"})

    def test_chat_on_a_base_model(self, generate: Generate) -> None:
        assert generate("hello", "--chat", "-n", "9").out == text_of(self.MESSAGES[1:], max_tokens=9) + "\n"

    def test_a_chat_model_chats(self, generate: Generate, chat_folder: Path) -> None:
        result = generate("hello", "--system", "S", "-n", "9", model=chat_folder)
        assert result.out == text_of(self.MESSAGES, max_tokens=9) + "\n"

    def test_no_chat_on_a_chat_model(self, generate: Generate, chat_folder: Path) -> None:
        result = generate("hello", "--no-chat", "-n", "9", model=chat_folder)
        assert result.out == text_of("hello", max_tokens=9) + "\n"

    @pytest.mark.parametrize("flags", [[], ["--no-chat"]])
    def test_system_without_chat(self, generate: Generate, flags: list[str]) -> None:
        result = generate("hello", "--system", "S", *flags)
        assert result.status == 1
        assert result.err.splitlines()[-1].startswith("Error: --system needs a chat")


class TestJson:
    def test_one_object(self, generate: Generate) -> None:
        result = generate("hello", "--json", "-n", "6")
        assert result.err == ""
        value = json.loads(result.out)
        assert {key: type(item) for key, item in value.items()} == {
            "text": str,
            "finish_reason": str,
            "prompt_tokens": int,
            "generation_tokens": int,
            "prompt_tokens_per_second": float,
            "generation_tokens_per_second": float,
            "peak_memory_gb": float,
        }
        assert value["text"] == text_of("hello", max_tokens=6)
        assert (value["prompt_tokens"], value["generation_tokens"], value["finish_reason"]) == (5, 6, "length")

    def test_stopped(self, generate: Generate) -> None:
        stop = text_of("hello", max_tokens=6)[4]
        assert json.loads(generate("hello", "--json", "--stop", stop).out)["finish_reason"] == "stop"

    @pytest.mark.parametrize("after", [0, 3])
    def test_interrupted(self, generate: Generate, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        import rodimus_mlx.generation as generation

        real, whole = generation.stream_generate, text_of("hello", max_tokens=20)

        def interrupted(*arguments: Any, **options: Any) -> Any:
            responses = real(*arguments, **options)
            for _ in range(after):
                yield next(responses)
            raise KeyboardInterrupt

        monkeypatch.setattr(generation, "stream_generate", interrupted)
        result = generate("hello", "--json")
        value = json.loads(result.out)
        assert result.status == 130
        assert (value["finish_reason"], value["generation_tokens"], value["prompt_tokens"]) == ("interrupt", after, 5)
        assert value["text"] == whole[:after]


class TestErrors:
    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--temp", "-1", "must be 0 or more, not -1"),
            ("--temp", "nan", "must be 0 or more, not nan"),
            ("--temp", "inf", "must be 0 or more, not inf"),
            ("--top-p", "0", "must be above 0, and at most 1, not 0"),
            ("--top-p", "1.5", "must be above 0, and at most 1, not 1.5"),
            ("--top-k", "-1", "must be 0 or more, not -1"),
            ("--min-p", "2", "must be 0 or more, and at most 1, not 2"),
            ("--repetition-penalty", "0", "must be above 0, not 0"),
            ("--top-k", "-1" + "0" * 400, "must be 0 or more, not -1" + "0" * 400),
            ("--max-tokens", "0", "must be 1 or more, and at most 2147483647, not 0"),
            ("--max-tokens", "2147483648", "must be 1 or more, and at most 2147483647, not 2147483648"),
            ("--stop", "", "must not be empty"),
            ("--seed", "-1", "must be 0 or more, and at most 18446744073709551615, not -1"),
            (
                *("--seed", "18446744073709551616"),
                "must be 0 or more, and at most 18446744073709551615, not 18446744073709551616",
            ),
        ],
    )
    def test_ranges(self, generate: Generate, option: str, value: str, message: str) -> None:
        result = generate("hello", option, value)
        assert result.status == 2
        assert result.err.startswith(f"Error: Invalid value for '{option}'")
        assert result.err.endswith(f"{message}\n")

    @pytest.mark.parametrize(
        ("arguments", "stdin", "message"),
        [
            ([""], None, "the prompt is empty: there is nothing to continue"),
            ([], b"", "the prompt is empty: there is nothing to continue"),
            (["-"], b"ab\xff", "standard input is not UTF-8 text: invalid start byte at byte 2"),
            (["\udcff"], None, "the prompt is not valid UTF-8 text"),
            (["x", "--adapter", "./absent"], None, "absent is not an adapter: it has no adapter_config.json"),
        ],
    )
    def test_input(self, generate: Generate, arguments: list[str], stdin: bytes | None, message: str) -> None:
        result = generate(*arguments, stdin=stdin)
        assert (result.status, result.out) == (1, "")
        assert result.err.splitlines()[-1] == f"Error: {message}"

    def test_no_model(self, generate: Generate) -> None:
        assert generate("x", model="./absent") == Result(1, "", "Error: there is no folder ./absent\n")

    @pytest.mark.filterwarnings("default")
    def test_no_tokenizer(self, generate: Generate) -> None:
        result = generate("x", model=GOLDENS / "rodimus")
        warning, error = result.err.splitlines()
        assert warning.startswith("Warning: ") and "no tokenizer.json" in warning
        assert error.startswith("Error: this checkpoint has no tokenizer")

    @pytest.mark.filterwarnings("default")
    def test_sampling_options_at_temperature_0(self, generate: Generate) -> None:
        result = generate("x", "--top-k", "3", "-n", "1")
        assert result.err.splitlines()[0] == "Warning: --top-p, --top-k and --min-p do nothing at --temp 0"

    def test_nothing_to_read(self, generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        monkeypatch.setattr(sys, "stdin", Terminal())
        assert generate(model=None) == Result(2, "", "Error: Invalid value for PROMPT: give a text, or pipe one in\n")


class TestProcess:
    def test_ctrl_c_keeps_what_was_written(self) -> None:
        with subprocess.Popen(
            [*COMMAND, "hello", "--max-tokens", "1000000", "--model", str(TINY_FOLDER)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            start = process.stdout.read(10)
            process.send_signal(signal.SIGINT)
            rest, error = process.communicate(timeout=60)
        assert process.returncode == 130
        assert rest.endswith(b"\n")
        assert SPEEDS.fullmatch(error.decode().strip())
        assert (start + rest).decode().startswith(text_of("hello", max_tokens=10))

    def test_utf8_whatever_the_locale(self) -> None:
        environment = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
        command = [*COMMAND, "-", "--temp", "20", "--seed", "1", "-n", "100", "--model", str(TINY_FOLDER)]
        result = subprocess.run(command, input="ü".encode(), capture_output=True, env=environment, timeout=60)
        assert result.returncode == 0, result.stderr
        assert "\ufffd" in result.stdout.decode("utf-8")
