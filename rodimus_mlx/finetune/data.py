"""Text to samples: mlx-lm's data formats read, checked line by line, and tokenized.

A folder holds train.jsonl and maybe valid.jsonl, each line one of
    {"text": ...}   {"prompt": ..., "completion": ...}   {"messages": [{"role": ..., "content": ...}, ...]}
A name that is no folder is a data set of the Hugging Face hub with the same fields.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from mlx_lm.tuner.datasets import create_dataset

from ..errors import RodimusError, RodimusWarning

FORMATS = (("prompt", "completion"), ("messages",), ("text",))  # in mlx-lm's order of preference
TEXTS_AT_ONCE = 256  # encoded together, on all cores


class Sample(NamedTuple):
    """A sequence of tokens to learn."""

    tokens: np.ndarray  # [n + 1] int32: n inputs, and the target of each is the next token
    learn: np.ndarray  # [n] bool: which targets count
    others: np.ndarray | None = None  # [n] int32: targets that are not the next tokens, for tasks that are no text

    @property
    def targets(self) -> np.ndarray:
        """What to predict from each input, [n] int32."""
        return self.tokens[1:] if self.others is None else self.others

    @property
    def length(self) -> int:
        """Inputs, which is what a row must hold."""
        return len(self.learn)

    def part(self, begin: int, end: int) -> Sample:
        """Some of its inputs, with their targets."""
        others = None if self.others is None else self.others[begin:end]
        return Sample(self.tokens[begin : end + 1], self.learn[begin:end], others)


class Record(NamedTuple):
    """A line of data and where it stands, for messages."""

    where: str
    fields: dict[str, Any]


def sample(tokens: Sequence[int] | np.ndarray, learn_from: int = 1) -> Sample:
    """A sample whose targets count from token number ``learn_from`` on."""
    array = np.asarray(tokens, np.int32)
    return Sample(array, np.arange(1, len(array)) >= learn_from)


def load_data(source: str | Path) -> tuple[list[Record], list[Record]]:
    """The records of the training and the validation split (empty where there is none).

    Raises:
        RodimusError: no such data, an empty file, or the line that is wrong.
    """
    folder = Path(source)
    if folder.is_file():
        return _read_lines(folder), []
    if folder.is_dir():
        train, valid = folder / "train.jsonl", folder / "valid.jsonl"
        if not train.is_file():
            raise RodimusError(f"{folder} has no train.jsonl")
        return _read_lines(train), _read_lines(valid) if valid.is_file() else []
    return _load_from_hub(str(source))


def tokenize(records: Sequence[Record], tokenizer: Any, *, mask_prompt: bool, chat: bool) -> list[Sample]:
    """Samples of records that are all in one format; those of less than two tokens are left out, with a warning.

    Args:
        mask_prompt: only the completion, or the last message, is learned.
        chat: prompt and completion are put as a chat; else one follows the other.

    Raises:
        RodimusError: the record that lacks a field, has one of a wrong type, or whose role is unknown.
    """
    if not records:
        return []
    fields = _format_of(records)
    if fields == ("text",):
        if mask_prompt:
            raise RodimusError("--mask-prompt needs prompt and completion, or messages; the data has plain text")
        samples = _texts(records, tokenizer)
    elif fields == ("prompt", "completion") and not chat:
        samples = _continuations(records, tokenizer, mask_prompt)
    else:
        samples = _chats(records, tokenizer, mask_prompt)
    kept: list[Sample] = []
    empty: list[str] = []
    for record, made in zip(records, samples):
        if made.length and made.learn.any():
            kept.append(made)
        else:
            empty.append(record.where)
    if empty:
        warnings.warn(f"{empty[0]}: nothing to learn; {len(empty)} such left out", RodimusWarning, stacklevel=2)
    return kept


def fit(samples: Sequence[Sample], seq_len: int, long: str) -> list[Sample]:
    """Samples of at most ``seq_len`` inputs: longer ones are cut ("truncate") or split, and a warning says so."""
    too_long = [s.length for s in samples if s.length > seq_len]
    if not too_long:
        return list(samples)
    what = "split" if long == "split" else "cut, the rest is lost ('--long split' keeps it)"
    warnings.warn(
        f"{len(too_long)} of {len(samples)} samples are longer than --seq-len {seq_len} "
        f"(the longest has {max(too_long)} tokens): {what}",
        RodimusWarning,
        stacklevel=2,
    )
    result: list[Sample] = []
    lost = 0
    for each in samples:
        stop = each.length if long == "split" else 1
        cut = [each.part(begin, begin + seq_len) for begin in range(0, stop, seq_len)]
        pieces = [piece for piece in cut if piece.learn.any()]
        result += pieces
        lost += not pieces
    if lost:
        warnings.warn(f"{lost} samples have nothing to learn before --seq-len: left out", RodimusWarning, stacklevel=2)
    return result


def _read_lines(file: Path) -> list[Record]:
    records = []
    try:
        with open(file, encoding="utf-8-sig") as lines:  # Windows programs put a mark in front
            for number, line in enumerate(lines, 1):
                if line.strip():
                    records.append(Record(f"{file} line {number}", _parse(f"{file} line {number}", line)))
    except UnicodeDecodeError as error:
        raise RodimusError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise RodimusError(f"{file} cannot be read: {error.strerror or error}") from error
    if not records:
        raise RodimusError(f"{file} is empty")
    return records


def _is_text(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def _parse(where: str, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise RodimusError(f"{where} is not valid JSON: {reason}") from error
    if "\\ud" in line.lower() and not _is_text(json.dumps(record, ensure_ascii=False)):
        raise RodimusError(f"{where} has half a character, like \\ud83d without its other half: that is no text")
    if not isinstance(record, dict):
        raise RodimusError(f'{where} must be a JSON object like {{"text": ...}}')
    return record


def _load_from_hub(name: str) -> tuple[list[Record], list[Record]]:
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise RodimusError(f"{name} is neither a folder with train.jsonl nor the name of a data set (owner/name)")
    try:
        import datasets
    except ImportError as error:
        raise RodimusError(
            f"{name} is no folder here; to load it from the Hugging Face hub, install 'datasets'"
        ) from error
    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # the library raises many kinds
        raise RodimusError(f"the data set {name} cannot be loaded: {error}") from error
    if "train" not in splits:
        raise RodimusError(f"the data set {name} has no split 'train'; it has {', '.join(splits)}")
    valid = next((split for split in ("valid", "validation") if split in splits), None)
    return _numbered(name, splits["train"]), _numbered(name, splits[valid]) if valid else []


def _numbered(name: str, split: Iterable[dict[str, Any]]) -> list[Record]:
    return [Record(f"{name} row {i}", dict(fields)) for i, fields in enumerate(split)]


def _format_of(records: Sequence[Record]) -> tuple[str, ...]:
    """The fields of the first record, which all must have."""
    first = records[0]
    wanted = next((fields for fields in FORMATS if all(field in first.fields for field in fields)), None)
    if wanted is None:
        half = next((f for f in FORMATS[0] if f in first.fields), None)
        has = f"only {half!r}" if half else ", ".join(map(repr, first.fields)) or "no field"
        raise RodimusError(f"{first.where} has {has}; expected text, or prompt and completion, or messages")
    for where, fields in records:
        for name in wanted:
            if name not in fields:
                raise RodimusError(f"{where} has no {name!r}, which the first record has")
            if name == "messages":
                _check_messages(where, fields[name])
            elif not isinstance(fields[name], str):
                raise RodimusError(f"{where}: {name!r} must be text, not {type(fields[name]).__name__}")
    return wanted


def _check_messages(where: str, messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise RodimusError(f"{where}: 'messages' must be a list of messages")
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise RodimusError(f"{where}: message {i} must have a role and a content")


def _texts(records: Sequence[Record], tokenizer: Any) -> Iterator[Sample]:
    """As mlx-lm's TextDataset has them: the text and the end token; many at once, which is much faster."""
    inner, end = tokenizer._tokenizer, tokenizer.eos_token_id
    for i in range(0, len(records), TEXTS_AT_ONCE):
        texts = [record.fields["text"] for record in records[i : i + TEXTS_AT_ONCE]]
        for tokens in inner(texts)["input_ids"]:
            yield sample(_ended(tokens, end))


def _continuations(records: Sequence[Record], tokenizer: Any, mask_prompt: bool) -> Iterator[Sample]:
    for _, fields in records:
        prompt = tokenizer.encode(fields["prompt"])
        completion = tokenizer.encode(fields["completion"], add_special_tokens=False)
        tokens = _ended([*prompt, *completion], tokenizer.eos_token_id)
        yield sample(tokens, len(prompt) if mask_prompt else 1)


def _chats(records: Sequence[Record], tokenizer: Any, mask_prompt: bool) -> Iterator[Sample]:
    """By mlx-lm's data sets, with the end token after the last answer: the template has none, and a model that never
    saw one would not stop."""
    dataset = create_dataset([record.fields for record in records], tokenizer, SimpleNamespace(mask_prompt=mask_prompt))
    for where, fields in records:
        try:
            tokens, offset = dataset.process(fields)
        except Exception as error:  # jinja raises many kinds, whatever a message may hold
            raise RodimusError(f"{where} does not fit the chat template: {error}") from error
        answered = "messages" not in fields or fields["messages"][-1]["role"].lower() == "assistant"
        yield sample(_ended(tokens, tokenizer.eos_token_id) if answered else tokens, max(offset, 1))


def _ended(tokens: list[int], end: int | None) -> list[int]:
    return tokens if end is None or (tokens and tokens[-1] == end) else [*tokens, end]
