"""From files to samples, and a clear line for whatever is wrong with them."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import TINY_FOLDER

from rodimus_mlx.errors import RodimusError, RodimusWarning
from rodimus_mlx.finetune.data import fit, load_data, sample, tokenize
from rodimus_mlx.tokenizer import load_tokenizer

TEXT = {"text": "def f(): pass"}
PAIR = {"prompt": "2 + 2 =", "completion": " 4"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_FOLDER)


def write(folder, *lines, name="train.jsonl"):
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (folder / name).write_text(text)
    return folder


def read(folder, tokenizer, **choices):
    return tokenize(load_data(folder)[0], tokenizer, **{"mask_prompt": False, "chat": False, **choices})


def learned(sample, tokenizer):
    """The text of the targets that count."""
    return tokenizer.decode(sample.tokens[1:][sample.learn].tolist())


def test_text(tmp_path, tokenizer):
    (only,) = read(write(tmp_path, TEXT), tokenizer)
    assert tokenizer.decode(only.tokens.tolist()) == "def f(): pass<|endoftext|>"
    assert only.learn.all() and only.length == len(only.tokens) - 1


@pytest.mark.parametrize("mask", [False, True], ids=["all", "masked"])
def test_prompt_and_completion_of_a_base_model_follow_each_other(tmp_path, tokenizer, mask):
    (only,) = read(write(tmp_path, PAIR), tokenizer, mask_prompt=mask)
    assert tokenizer.decode(only.tokens.tolist()) == "2 + 2 = 4<|endoftext|>"
    assert learned(only, tokenizer) == (" 4<|endoftext|>" if mask else " + 2 = 4<|endoftext|>")


@pytest.mark.parametrize("record", [CHAT, {"prompt": "Hi", "completion": "Hello"}], ids=["messages", "pair"])
def test_a_chat_ends_with_the_end_token(tmp_path, tokenizer, record):
    (only,) = read(write(tmp_path, record), tokenizer, mask_prompt=True, chat=True)
    text = "<role>HUMAN</role>Hi<role>ASSISTANT</role>Hello<|endoftext|>"
    assert tokenizer.decode(only.tokens.tolist()) == text
    assert learned(only, tokenizer) == "Hello<|endoftext|>"


def test_a_chat_that_ends_with_a_question_is_not_ended(tmp_path, tokenizer):
    record = {"messages": [*CHAT["messages"], {"role": "user", "content": "Bye"}]}
    (only,) = read(write(tmp_path, record), tokenizer)
    assert tokenizer.decode(only.tokens.tolist()).endswith("Bye")


def test_blank_lines_a_missing_validation_file_and_a_single_file(tmp_path):
    folder = write(tmp_path, TEXT, "\n", "  \n", TEXT)
    train, valid = load_data(folder)
    assert [record.where for record in train] == [f"{folder}/train.jsonl line {i}" for i in (1, 4)]
    assert valid == []
    assert load_data(folder / "train.jsonl")[0] == train
    assert len(load_data(write(folder, TEXT, name="valid.jsonl"))[1]) == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "train.jsonl is empty"),
        (["\n\n"], "train.jsonl is empty"),
        ([TEXT, '{"text": "x"\n'], "line 2 is not valid JSON: "),
        ([TEXT, "", "[1]\n"], "line 2 must be a JSON object"),
        (["[" * 100_000 + "\n"], "line 1 is not valid JSON: nested too deeply"),
        ([TEXT, '{"text": "\\ud83d x"}\n'], "line 2 has half a character"),
        ([{"prompt": "x"}], "line 1 has only 'prompt'; expected text, or prompt and completion, or messages"),
        ([{"body": "x"}], "line 1 has 'body'; expected"),
        ([{}], "line 1 has no field; expected"),
        ([PAIR, {"prompt": "x"}], "line 2 has no 'completion', which the first record has"),
        ([TEXT, PAIR], "line 2 has no 'text'"),
        ([TEXT, {"text": 5}], "line 2: 'text' must be text, not int"),
        ([TEXT, {"text": None}], "line 2: 'text' must be text, not NoneType"),
        ([{"messages": []}], "line 1: 'messages' must be a list of messages"),
        ([{"messages": [{"role": "user"}]}], "line 1: message 1 must have a role and a content"),
        ([CHAT, {"messages": [{"role": "wizard", "content": "x"}]}], "line 2 does not fit the chat template: the role"),
    ],
)
def test_bad_lines(tmp_path, tokenizer, lines, message):
    with pytest.raises(RodimusError) as error:
        read(write(tmp_path, *lines), tokenizer)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_mark_of_windows_programs(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\n')
    assert load_data(tmp_path)[0][0].fields == {"text": "x"}


def test_bytes_that_are_not_text(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(RodimusError, match=r"train.jsonl is not UTF-8 text: .* at byte 10"):
        load_data(tmp_path)


def test_places_that_are_not_data(tmp_path, monkeypatch):
    with pytest.raises(RodimusError, match=r"has no train\.jsonl"):
        load_data(tmp_path)
    with pytest.raises(RodimusError, match=r"is neither a folder with train\.jsonl nor the name of a data set"):
        load_data(tmp_path / "missing")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RodimusError, match="install 'datasets'"):
        load_data("owner/name")


def test_a_masked_prompt_needs_a_prompt(tmp_path, tokenizer):
    with pytest.raises(RodimusError, match="--mask-prompt needs prompt and completion, or messages"):
        read(write(tmp_path, TEXT), tokenizer, mask_prompt=True)


def test_samples_without_a_target_are_left_out_and_said(tmp_path, tokenizer):
    folder = write(tmp_path, TEXT, {"text": ""}, TEXT, {"text": ""})
    with pytest.warns(RodimusWarning, match=r"line 2: nothing to learn; 2 such left out"):
        assert len(read(folder, tokenizer)) == 2


def test_long_samples_are_cut_and_said():
    long, short = sample(range(11)), sample(range(3))
    with pytest.warns(RodimusWarning, match=r"1 of 2 samples are longer than --seq-len 4 \(the longest has 10"):
        cut, same = fit([long, short], 4, "truncate")
    assert cut.tokens.tolist() == [0, 1, 2, 3, 4]
    assert same.tokens.tolist() == [0, 1, 2]


def test_pieces_keep_targets_that_are_not_the_next_tokens():
    whole = sample(range(9))._replace(others=np.arange(100, 108))
    with pytest.warns(RodimusWarning):
        pieces = fit([whole], 5, "split")
    assert [piece.targets.tolist() for piece in pieces] == [[100, 101, 102, 103, 104], [105, 106, 107]]
    assert [piece.tokens.tolist() for piece in pieces] == [[0, 1, 2, 3, 4, 5], [5, 6, 7, 8]]


def test_long_samples_are_split_into_pieces_with_every_target():
    with pytest.warns(RodimusWarning, match=": split"):
        pieces = fit([sample(range(11), learn_from=6)], 4, "split")
    assert [p.tokens.tolist() for p in pieces] == [[4, 5, 6, 7, 8], [8, 9, 10]]  # the first piece has no target
    targets = np.concatenate([p.tokens[1:][p.learn] for p in pieces])
    assert targets.tolist() == [6, 7, 8, 9, 10]


def test_answers_that_lie_beyond_the_cut_are_left_out_and_said():
    with pytest.warns(RodimusWarning) as warned:
        assert fit([sample(range(11), learn_from=8)], 4, "truncate") == []
    assert "1 samples have nothing to learn before --seq-len: left out" in str(warned[1].message)


def test_a_data_set_of_the_hub(monkeypatch, tokenizer):
    splits = {"train": [TEXT, TEXT], "validation": [TEXT]}
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda name: splits))
    train, valid = load_data("owner/name")
    assert [record.where for record in train] == ["owner/name row 0", "owner/name row 1"]
    assert len(tokenize(valid, tokenizer, mask_prompt=False, chat=False)) == 1
    splits.pop("train")
    with pytest.raises(RodimusError, match="has no split 'train'; it has validation"):
        load_data("owner/name")


def test_samples_that_fit_are_left_alone():
    samples = [sample(range(5))]
    assert fit(samples, 4, "truncate") == samples
