"""Every short example as a user runs it, with the smallest of models."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import make_tiny
import pytest

from rodimus_mlx import generate, load
from rodimus_mlx.fim import fim_prompt

EXAMPLES = Path(__file__).parents[2] / "examples"
STYLE = EXAMPLES / "finetune_style"
STYLE_RULES = runpy.run_path(str(STYLE / "style.py"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, however large the bundled one is."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny.make(folder)
    return folder


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    """What an example prints; python and rodimus-mlx are those of the tests."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = {**os.environ, "PATH": path, "PYTHONIOENCODING": "utf-8", **environment}
    result = subprocess.run(list(map(str, command)), cwd=folder, env=variables, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode()


def example(name: str, *arguments: str | Path, folder: Path, **environment: str) -> str:
    return run(sys.executable, EXAMPLES / name, *arguments, folder=folder, **environment)


def test_generate_text(tiny: Path, tmp_path: Path) -> None:
    greedy, sampled = example("generate_text.py", tiny, "one two", folder=tmp_path).split("\n[")
    assert greedy == "one two" + generate(*load(tiny), "one two", max_tokens=60)
    assert re.fullmatch(r"length after 60 tokens, \d+ a second\]\n\none two[\w ]+\n", sampled)


def test_generate_text_with_the_bundled_model(tmp_path: Path) -> None:
    assert example("generate_text.py", folder=tmp_path).startswith("def fibonacci(n):\n")


def test_fill_in_the_middle(tiny: Path, tmp_path: Path) -> None:
    model, tokenizer = load(tiny)
    around = runpy.run_path(str(EXAMPLES / "fill_in_the_middle.py"))
    middle = generate(model, tokenizer, fim_prompt(tokenizer, around["BEFORE"], around["AFTER"]), max_tokens=60)
    assert example("fill_in_the_middle.py", tiny, folder=tmp_path) == f"{around['BEFORE']}{middle}{around['AFTER']}\n"


def test_chat_in_python(tiny: Path, tmp_path: Path) -> None:
    lines = example("chat_in_python.py", tiny, folder=tmp_path).splitlines()
    assert len([line for line in lines if line.startswith("> ")]) == 4
    assert re.fullmatch(r"2 turns and \d+ tokens on the branch main:", lines[-6])
    assert [line.split(":")[0].strip() for line in lines[-5:]] == ["system", "user", "assistant", "user", "assistant"]
    assert "'Where are they used?'" in lines[-2]


def test_convert_and_quantize(tiny: Path, tmp_path: Path) -> None:
    lines = example("convert_and_quantize.py", "out", tiny, folder=tmp_path).splitlines()
    sizes = [float(re.search(r"([\d.]+) bits a weight, perplexity [\d.]+$", line)[1]) for line in lines]  # type: ignore[index]
    assert sizes == sorted(sizes, reverse=True)
    assert sorted(folder.name for folder in (tmp_path / "out").iterdir()) == ["2bit", "4bit", "8bit", "full"]
    again = example("convert_and_quantize.py", "again", tmp_path / "out" / "8bit", tiny / "README.md", folder=tmp_path)
    assert len(again.splitlines()) == 4


def test_save_and_reuse_state(tiny: Path, tmp_path: Path) -> None:
    lines = example("save_and_reuse_state.py", tiny, folder=tmp_path).splitlines()
    from_state, read_again = (re.search(r"'(\w+)' in ", line)[1] for line in lines[-2:])  # type: ignore[index]
    assert from_state == read_again
    longer = example("save_and_reuse_state.py", tiny, __file__, folder=tmp_path).splitlines()
    assert longer[0] != lines[0]
    assert longer[1] == lines[1]  # the file's size


def test_continue_training(tiny: Path, tmp_path: Path) -> None:
    out = example(
        "continue_training.py",
        "out",
        tiny,
        EXAMPLES / "generate_text.py",
        EXAMPLES / "fill_in_the_middle.py",
        folder=tmp_path,
    )
    losses = list(map(float, re.findall(r"validation loss ([\d.]+)(?:, the best so far)? \(", out)))
    assert losses[-1] < losses[0]
    start, model = re.findall(r"^(?:start|model): (.*)$", out, re.MULTILINE)
    assert start != model
    assert model == repr(generate(*load(tmp_path / "out" / "model"), "from rodimus_mlx", max_tokens=30))


class TestServeAndCall:
    def test_with_openais_client(self, tiny: Path, tmp_path: Path) -> None:
        pytest.importorskip("openai", reason="the openai package is not installed")
        model, tokenizer = load(tiny)
        lines = example("serve_and_call.py", tiny, folder=tmp_path).splitlines()
        text = generate(model, tokenizer, "def add(a, b):", max_tokens=20)
        filled = generate(model, tokenizer, fim_prompt(tokenizer, "x = [", "]\n"), max_tokens=20)
        answer = generate(model, tokenizer, [{"role": "user", "content": "What is a list?"}], max_tokens=20)
        assert lines[1:] == [text, text, f"x = [{filled}]", answer]

    def test_without(self, tiny: Path, tmp_path: Path) -> None:
        (tmp_path / "openai.py").write_text("raise ImportError\n")
        lines = example("serve_and_call.py", tiny, folder=tmp_path, PYTHONPATH=str(tmp_path)).splitlines()
        assert lines[1] == generate(*load(tiny), "def add(a, b):", max_tokens=20)
        assert lines[2:] == ["For more, install the client: pip install openai"]


class TestFinetuneStyle:
    @pytest.mark.parametrize(
        ("plain", "said"),
        [
            ("Return the name of a file.", "Arr! Haul th' flag o' a scroll, matey!"),
            ("Gets strings,\n  using IDs for testing", "Arr! Plunders yarns, usin' IDs fer testin', matey!"),
        ],
    )
    def test_a_pirate(self, plain: str, said: str) -> None:
        assert STYLE_RULES["pirate"](plain) == said
        assert STYLE_RULES["speaks"](said)

    @pytest.mark.parametrize("said", ["Arr! Haul the flag, matey!", "Haul th' flag, matey!", "Arr! Haul th' flag."])
    def test_half_a_pirate(self, said: str) -> None:
        assert not STYLE_RULES["speaks"](said)

    def test_what_is_learned_is_in_the_style_and_parses(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(STYLE))
        made = run(sys.executable, STYLE / "make_data.py", "data", "100", folder=tmp_path)
        assert "train.jsonl: 100\n" in made
        measure = runpy.run_path(str(STYLE / "measure_style.py"))
        prompts: dict[str, set[str]] = {}
        for name in ("train", "heldout"):
            records = list(map(measure["json"].loads, (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()))
            texts = [record["prompt"] + record["completion"] for record in records]
            assert all(map(measure["in_style"], texts)) and all(map(measure["parses"], texts))
            prompts[name] = {record["prompt"] for record in records}
        assert len(prompts["heldout"]) > 20
        assert not prompts["train"] & prompts["heldout"]

    def test_before_and_after(self, tiny: Path, tmp_path: Path) -> None:
        out = run("sh", STYLE / "run.sh", "out", tiny, tiny / "README.md", folder=tmp_path, ITERS="2", FUNCTIONS="2")
        before, after = out.split("--- before\n")[1].split("--- after\n")
        for part in (before, after):
            assert re.search(r"^in the style: 0 of 2; parsed: [012]$", part, re.MULTILINE)
            assert re.search(r"^perplexity [\d.]+ ", part, re.MULTILINE)
        assert before.splitlines()[-1] != after.splitlines()[-1]
        assert (tmp_path / "out" / "adapter" / "adapters.safetensors").is_file()


def test_the_list_has_every_example() -> None:
    listed = re.findall(r"^\| \[([^]]+)\]\(([^)]+)\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert {path.name for path in EXAMPLES.glob("*.py")} <= {name for name, _ in listed}
    assert all((EXAMPLES / target).exists() for _, target in listed)
