"""The small model's recipe, end to end at a tiny size: tokenizer, samples, training, and every measure."""

import json
import lzma
import math
import random
import sys
from pathlib import Path

import bits_per_byte
import loss_by_position
import mlx.core as mx
import mlx.nn as nn
import models
import numpy as np
import parse_rate
import pytest
import tokenize_data
import train
import train_tokenizer
import transformer
from tokenizers import Tokenizer

from rodimus_mlx import load, stream_generate

SEQ_LEN = 64
FLOAT32 = 1e-4  # two ways to the same float32 sums
RECIPE = Path(__file__).parents[2] / "examples" / "train_small"


def module(i: int) -> str:
    """A small module; every third is longer than a row."""
    functions = [
        f"def name_{i}_{j}(first, second):\n    if first > {j}:\n        return second\n    return first + {i}\n"
        for j in range(9 if i % 3 == 0 else 2)
    ]
    return "\n\n".join(functions)


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    return script.main()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """train.jsonl, valid.jsonl and heldout.jsonl, a tokenizer, and samples."""
    folder = tmp_path_factory.mktemp("data")
    for name, numbers in (("train", range(40)), ("valid", range(40, 44)), ("heldout", range(44, 54))):
        records = [{"text": module(i), "path": f"{i}.py", "package": "p", "group": "module"} for i in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.MonkeyPatch.context() as patch:
        run(patch, train_tokenizer, folder, folder / "tokenizer", "--vocab-size", 320)
        run(patch, tokenize_data, folder, folder / "tokenizer", folder / "tokens", "--seq-len", SEQ_LEN)
    return folder


@pytest.fixture(scope="session")
def tokenizer(data):
    return Tokenizer.from_file(str(data / "tokenizer" / "tokenizer.json"))


def small(name: str, folder):
    """A config of the recipe, made small."""
    config = json.loads((RECIPE / f"config_{name}.json").read_text())
    if config["model_type"] == "llama":
        config |= {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2}
        config["num_key_value_heads"] = 2
    else:
        config |= {"d_model": 32, "n_layer": 2}
        config["mixer_cfg"]["mem_size"] = 8
        if "attn_cfg" in config:
            config["attn_cfg"] |= {"num_heads": 2, "num_heads_v": 2, "window_size": 16}
    config["vocab_size"] = 320
    file = folder / f"config_{name}.json"
    file.write_text(json.dumps(config))
    return file


@pytest.fixture(scope="session", params=["plus", "rodimus", "transformer"])
def trained(request, data):
    """A model that train.py made in a few steps."""
    out = data / f"trained_{request.param}"
    with pytest.MonkeyPatch.context() as patch:
        config = small(request.param, data)
        options = ("--steps", 8, "--seq-len", SEQ_LEN, "--batch-size", 4, "--learning-rate", 0.01)
        run(patch, train, config, data / "tokens", data / "tokenizer", out, *options)
    return out


@pytest.mark.parametrize(
    "text", ["def f(x):\n\n        return x  # \u00e4\u00f6 \u4f60\n\tpass\n", "", " ", "\n\n  \n", "a.b(1234)"]
)
def test_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_tokenizer_has_the_special_tokens_first_and_opens_in_rodimus_mlx(data, tokenizer):
    from rodimus_mlx.tokenizer import is_chat_model, load_tokenizer

    loaded = load_tokenizer(data / "tokenizer")
    assert [tokenizer.token_to_id(token) for token in train_tokenizer.SPECIAL] == list(range(8))
    assert loaded.bos_token_id == 0
    assert loaded.eos_token_ids == {1}
    assert not is_chat_model(loaded)


@pytest.mark.parametrize("name", ["plus", "rodimus", "transformer"])
def test_the_configs_make_models_of_about_ten_million_parameters(name):
    model = models.new(RECIPE / f"config_{name}.json")
    assert models.parameters(model) == pytest.approx(10.4e6, rel=0.02)


@pytest.mark.parametrize("length", [2, 10, 64, 65, 66, 200])
def test_pieces_hold_every_target_once_and_fit_a_row(length):
    tokens = list(range(length))
    pieces = list(tokenize_data.pieces(tokens, SEQ_LEN, random.Random(length)))
    assert [target for piece in pieces for target in piece[1:]] == tokens[1:]
    assert all(2 <= len(piece) <= SEQ_LEN + 1 for piece in pieces)


def test_a_filled_sample_holds_the_text_around_its_middle(tokenizer):
    text = module(3)
    tokens = tokenizer.encode(text).ids
    rng = random.Random(0)
    for _ in range(20):
        filled = tokenize_data.fill_in_middle(tokens, tokenizer, 2 * len(tokens), rng)
        begin, prefix, suffix, middle = split_filled(tokenizer, filled)
        assert (begin, filled[-1]) == (tokenizer.token_to_id("<|fim_begin|>"), tokenizer.token_to_id("<|endoftext|>"))
        assert prefix + middle + suffix == text
        assert len(middle) >= tokenize_data.MIDDLE


def split_filled(tokenizer, filled):
    hole, end = (filled.index(tokenizer.token_to_id(token)) for token in ("<|fim_hole|>", "<|fim_end|>"))
    parts = filled[1:hole], filled[hole + 1 : end], filled[end + 1 : -1]
    return filled[0], *(tokenizer.decode(part, skip_special_tokens=False) for part in parts)


def test_some_samples_are_filled_and_no_validation_sample_is(data, tokenizer):
    begin = tokenizer.token_to_id("<|fim_begin|>")
    train_samples, valid = (tokenize_data.read(data / "tokens" / f"{name}.npz") for name in ("train", "valid"))
    assert 0.1 < np.mean([sample[0] == begin for sample in train_samples]) < 0.5
    assert not any(begin in sample for sample in valid)
    whole = [tokenize_data.texts(data / "valid.jsonl")[0]]
    assert tokenizer.decode(valid[0].tolist()) == whole[0][: len(tokenizer.decode(valid[0].tolist()))]


def test_training_lowers_the_loss_and_leaves_a_folder_to_load(data, trained):
    events = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "valid"]
    assert losses[-1] < losses[0] - 0.1
    model = models.load(trained)
    assert model(mx.array([[0, 20, 30]])).shape == (1, 3, 320)
    if "transformer" not in trained.name:
        assert load(trained)[1].decode(load(trained)[1].encode("def f(x):")) == "def f(x):"


def test_minutes_become_steps(data, monkeypatch, tmp_path):
    options = ("--minutes", 0.05, "--seq-len", SEQ_LEN, "--batch-size", 2)
    run(monkeypatch, train, small("rodimus", tmp_path), data / "tokens", data / "tokenizer", tmp_path / "out", *options)
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["iters"] >= 1


def test_the_transformer_sees_its_own_document_alone(data):
    model = transformer.initialize(json.loads(small("transformer", data).read_text()))
    first, second = mx.array([[5, 6, 7]]), mx.array([[9, 8]])
    packed = model(mx.concatenate([first, second], axis=1), documents=mx.array([[0, 0, 0, 1, 1]]))
    assert mx.allclose(packed[:, :3], model(first), atol=FLOAT32)
    # RoPE is relative: a document's place in the row changes nothing.
    assert mx.allclose(packed[:, 3:], model(second), atol=FLOAT32)


class Uniform(nn.Module):
    """Finds every token equally likely."""

    def __call__(self, tokens, cache=None):
        return mx.zeros((*tokens.shape, 320))

    def make_cache(self):
        return []


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (16, 8), (300, 7)])
def test_each_token_is_counted_once_whatever_the_windows(window, stride):
    documents = [list(range(n)) for n in (2, 8, 9, 17, 40)]
    bits = bits_per_byte.windowed(Uniform(), documents, window, stride)
    assert bits == pytest.approx([(len(tokens) - 1) * math.log2(320) for tokens in documents], rel=1e-5)


def test_windows_longer_than_a_module_give_what_one_reading_gives(data, trained, tokenizer):
    model = models.load(trained)
    documents = [
        bits_per_byte.encode(tokenizer, record["text"]) for record in bits_per_byte.read(data / "heldout.jsonl")
    ]
    windowed = bits_per_byte.windowed(model, documents, 1024, 512)
    assert bits_per_byte.whole(model, documents, 24) == pytest.approx(windowed, rel=1e-3)


def test_bits_per_byte_are_printed_beside_xz(data, trained, monkeypatch, capsys):
    run(monkeypatch, bits_per_byte, data, trained, "--window", 32, "--stride", 16, "--json")
    result = json.loads(capsys.readouterr().out)
    text = "".join(tokenize_data.texts(data / "heldout.jsonl")).encode()
    xz = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert result["bytes"]["all"] == len(text)
    assert result["xz -9e"]["all"] == pytest.approx(xz)
    assert 0 < result[trained.name]["all"] < 8


def test_loss_by_position_has_a_row_for_each_model(data, trained, monkeypatch, capsys):
    run(monkeypatch, loss_by_position, data, trained, "--length", 512, "--step", 200, "--json")
    result = json.loads(capsys.readouterr().out)
    assert (result["from"], result["to"]) == ([0, 256], [256, 512])
    assert all(0 < loss < 7 for loss in result[trained.name])


def test_loss_by_position_needs_enough_text(data, trained, monkeypatch):
    with pytest.raises(SystemExit, match="Error: the held-out text has"):
        run(monkeypatch, loss_by_position, data, trained, "--length", 10**6)


def test_carrying_the_state_gives_the_losses_of_one_pass(trained):
    model = models.load(trained)
    rows = np.random.default_rng(0).integers(8, 320, (3, 49)).astype(np.int32)
    assert loss_by_position.by_position(model, rows, 16) == pytest.approx(
        loss_by_position.by_position(model, rows, 48), abs=FLOAT32
    )


@pytest.mark.parametrize(
    ("text", "kept", "ended"),
    [
        ("\n    return 1\n\n\nclass A:\n", "\n    return 1\n\n\n", True),
        ("\n    x = (\n1\n", "\n    x = (\n", True),
        ("\n    x = f(\n        1,\n)\n    return x\ny", "\n    x = f(\n        1,\n)\n    return x\n", True),
        ("\n    return 1\n    retu", "\n    return 1\n", False),
        (" \n        return 1\n\n    def g(x):\n", " \n        return 1\n\n", True),
        ("\n    if x:\n        y()\n    z()\n\n# more\nw()", "\n    if x:\n        y()\n    z()\n\n# more\n", True),
        (" return (\n    1)\nx = 2", " return (\n    1)\n", True),
        (" pass", "", False),
    ],
)
def test_a_completion_is_cut_at_the_functions_end(text, kept, ended):
    assert parse_rate.cut(text) == (kept, ended)


@pytest.mark.parametrize(
    ("body", "parses", "does_something"),
    [
        ("\n    return 1\n", True, True),
        (" return 1\n", True, True),
        ('\n    """Only words."""\n    pass\n', True, False),
        ("\n    return (1\n", False, False),
        ("", False, False),
    ],
)
def test_what_parses_and_does_something(body, parses, does_something):
    judged = parse_rate.judge("def f(x):", body, True)
    assert (judged["parses"], judged["does_something"]) == (parses, does_something)


def test_headers_are_the_functions_own_lines_at_the_margin():
    text = (
        "class A:\n    @property\n    def long(\n        self,\n        x: int,\n    ) -> int:\n"
        "        y = x\n        y += 1\n        return y\n\n    def short(self): return 1\n"
    )
    assert list(parse_rate.functions(text)) == ["def long(\n    self,\n    x: int,\n) -> int:"]


def test_a_batch_completes_as_one_by_one(trained):
    if "transformer" in trained.name:
        pytest.skip("generation is of Rodimus models")
    model, tokenizer = load(trained)
    headers = ["def f(x):", "def name_7_1(first, second):", "class A:"]
    alone = ["".join(r.text for r in stream_generate(model, tokenizer, h, max_tokens=30)) for h in headers]
    together = list(parse_rate.complete(model, tokenizer, headers, 30, 0.0))
    assert together == [parse_rate.cut(text) for text in alone]
    assert any(body for body, _ in together)


def test_the_parse_rate_is_printed_as_json(data, trained, monkeypatch, capsys, tmp_path):
    if "transformer" in trained.name:
        pytest.skip("generation is of Rodimus models")
    options = ("--functions", 3, "--max-tokens", 12, "--out", tmp_path / "out.jsonl")
    run(monkeypatch, parse_rate, data, trained, *options)
    result = json.loads(capsys.readouterr().out)
    assert result["functions"] == len((tmp_path / "out.jsonl").read_text().splitlines()) == 3
    assert 0 <= result["parses"] <= 1
