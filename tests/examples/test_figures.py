"""The small model's pictures and card, from results as the measuring scripts write them."""

import json
import sys
from xml.etree import ElementTree

import card
import context
import figures
import models
import pytest
from test_train_small import small

TOKENS = [256, 512, 1024, 2048, 4096]
POSITIONS = {"from": [0, *TOKENS[:-1]], "to": TOKENS, "plus": [2.0, 1.8, 1.7, 1.6, 1.5], "rodimus": [2.1] * 5}
EVENTS = [
    {"event": "start", "iters": 20, "steps_in_epoch": 10, "tokens_in_epoch": 3e6, "rows_in_step": 4, "longest": 64}
    | {"dtype": "bfloat16", "valid_samples": 7},
    *({"event": "report", "step": step, "loss": 9 - step / 4, "learning_rate": 1e-3} for step in range(2, 21, 2)),
    {"event": "valid", "step": 0, "loss": 9.5},
    {"event": "valid", "step": 20, "loss": 4.25},
]
SOURCES = [
    {"package": "python", "version": "3.12 3.13", "licence": "PSF-2.0", "share": "train", "modules": 5, "megabytes": 2},
    {"package": "alpha", "version": "1.0", "licence": "MIT", "share": "train", "modules": 7, "megabytes": 3.5},
    {"package": "kept-out", "version": "2.0", "licence": "MIT", "share": "heldout", "modules": 1, "megabytes": 1},
]


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    script.main()


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The recipe's configs, made small."""
    folder = tmp_path_factory.mktemp("configs")
    for name in context.NAMES:
        small(name, folder)
    return folder


@pytest.fixture
def measured(configs, monkeypatch, tmp_path):
    file = tmp_path / "context.json"
    run(monkeypatch, context, file, "--contexts", 64, 600, "--tokens", 2, "--rounds", 2, "--configs", configs)
    return file


def words(svg):
    """All the texts of a picture."""
    return [element.text for element in ElementTree.parse(svg).iter() if element.tag.endswith("}text")]


def test_memory_grows_with_the_context_for_the_transformer_alone(measured):
    result = json.loads(measured.read_text())
    assert result["contexts"] == [64, 600]
    for name, found in result["models"].items():
        assert min(found["ms"]) > 0
        grown = found["bytes"][1] / found["bytes"][0]
        assert grown == (pytest.approx(600 / 64) if name == "Transformer" else 1)
    rows = [line.split(" | ")[0] for line in context.table(result).splitlines()[2:]]
    assert rows[0] == "| Rodimus+, ms a token"
    assert rows[-1] == "| Transformer, MB remembered"


def test_the_smaller_times_stay_when_it_runs_again(measured, configs, monkeypatch):
    result = json.loads(measured.read_text())
    result["models"]["Rodimus"]["ms"] = [0.01, 1e6]
    measured.write_text(json.dumps(result))
    run(monkeypatch, context, measured, "--contexts", 64, 600, "--tokens", 2, "--rounds", 2, "--configs", configs)
    again = json.loads(measured.read_text())["models"]["Rodimus"]["ms"]
    assert again[0] == 0.01
    assert again[1] < 1e6


def test_the_bytes_are_those_of_what_the_models_remember(measured, configs):
    held = {name: found["bytes"][1] for name, found in json.loads(measured.read_text())["models"].items()}
    config = models.new(configs / "config_plus.json").args
    mixer = (config.d_conv - 1 + config.mem_size) * config.d_inner
    window = config.window_keys * (1 + config.num_heads) * config.head_dim  # one key head
    assert held["Rodimus"] == 4 * config.n_layer * mixer
    assert held["Rodimus+"] == 4 * config.n_layer * (mixer + window)
    assert held["Transformer"] == 4 * 2 * 2 * 600 * 32


def test_the_picture_of_contexts_names_every_line_twice(measured, monkeypatch, tmp_path):
    run(monkeypatch, figures, "context", measured, tmp_path / "out.svg")
    for name in figures.COLOURS:
        assert sum(text.startswith(f"{name} ") for text in words(tmp_path / "out.svg")) == 2


def test_the_same_results_give_the_same_picture(monkeypatch, tmp_path):
    (tmp_path / "positions.json").write_text(json.dumps(POSITIONS))
    for name in ("one.svg", "two.svg"):
        run(monkeypatch, figures, "positions", tmp_path / "positions.json", tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert {"Rodimus+ 1.50", "Rodimus 2.10", "4,096"} <= set(words(tmp_path / "one.svg"))
    assert any("trained up to here" in text for text in words(tmp_path / "one.svg"))


@pytest.fixture
def trained_folder(configs, tmp_path):
    """A model's folder and its metrics."""
    folder = tmp_path / "plus"
    for name in models.TOKENIZER_FILES:
        (tmp_path / name).write_text("{}")
    models.save(models.new(configs / "config_plus.json"), configs / "config_plus.json", tmp_path, folder)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    return folder


def test_the_picture_of_training_ends_with_the_smoothed_loss(trained_folder, monkeypatch, tmp_path):
    run(monkeypatch, figures, "training", trained_folder, tmp_path / "out.svg")
    assert "Rodimus+ 5.00" in words(tmp_path / "out.svg"), "the mean of the last five reports"


@pytest.mark.parametrize("metrics", ["", "not JSON\n"])
def test_metrics_without_a_report_are_refused(trained_folder, monkeypatch, tmp_path, metrics):
    (trained_folder / "metrics.jsonl").write_text(metrics)
    with pytest.raises(SystemExit, match=r"Error: .*metrics.jsonl"):
        run(monkeypatch, figures, "training", trained_folder, tmp_path / "out.svg")
    assert not (tmp_path / "out.svg").exists()


def test_the_card_tells_data_training_and_what_was_measured(trained_folder, monkeypatch, tmp_path):
    results = {
        "sources": SOURCES,
        "bits": {"bytes": {"all": 1000}, "xz -9e": {"all": 1.5}, "plus": {"all": 1.125}},
        "parse": {"functions": 200, "temperature": 0.2, "parses": 0.65, "ended": 0.9, "does_something": 0.6},
        "positions": POSITIONS,
    }
    options = []
    for name, result in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
        options += [f"--{name}", tmp_path / f"{name}.json"]
    run(monkeypatch, card, trained_folder, *options, "--quantized", 8)
    text = " ".join((trained_folder / "README.md").read_text().split())
    for part in (
        "6 MB of Python in 12 modules: the standard library and 1 packages",
        "all of kept-out",
        "| MIT | alpha 1.0 | 3.5 | | PSF-2.0 | Python's standard library 3.12 to 3.13 | 2.0 |",
        "6 million tokens in all",
        "quantized to 8 bits",
        "1.125 bits a byte on 1,000 bytes of held-out modules; `xz -9e` needs 1.500",
        "65% parse",
        "1.50 (2,048 to 4,096)",
    ):
        assert part in text


def test_a_card_claims_nothing_that_was_not_measured(trained_folder, monkeypatch, tmp_path):
    (tmp_path / "sources.json").write_text(json.dumps(SOURCES))
    run(monkeypatch, card, trained_folder, "--sources", tmp_path / "sources.json")
    text = (trained_folder / "README.md").read_text()
    assert "## Measured" not in text
    assert "quantized" not in text
