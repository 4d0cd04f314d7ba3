"""Tokenizers of Rodimus checkpoints: from their files alone, running none of their code.

A checkpoint's ``tokenizer_config.json`` often names a class that only its authors have. The plain fast class reads
the same ``tokenizer.json``; a ``tokenizer.model`` alone is read by sentencepiece itself.
"""

from __future__ import annotations

import json
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    NaiveStreamingDetokenizer,
    SPMStreamingDetokenizer,
    TokenizerWrapper,
)
from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from .errors import RodimusError, RodimusWarning

SETTINGS = "tokenizer_config.json"
END_OF_TEXT = "<|endoftext|>"
CHAT_KEY = "is_chat_model"  # ours, in tokenizer_config.json: keeps the answer when a folder is renamed or converted

# One string, without bos, newlines or end-of-turn tokens. Roles in any case; content may be OpenAI-style text parts.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set role = message['role'] | upper -%}
{%- set role = {'USER': 'HUMAN', 'TOOL': 'OBSERVATION'}.get(role, role) -%}
{%- if role not in ['SYSTEM', 'HUMAN', 'ASSISTANT', 'OBSERVATION'] -%}
{{- raise_exception('the role is ' ~ message['role'] ~ ', but must be system, user, assistant or tool') -}}
{%- endif -%}
{{- '<role>' ~ role ~ '</role>' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- elif message['content'] is iterable -%}
{%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<role>ASSISTANT</role>' -}}{%- endif -%}"""

_CHAT_NAME = re.compile(r"(?<![a-z])(chat|instruct)(?![a-z])", re.IGNORECASE)


def load_tokenizer(folder: str | Path, name: str | None = None) -> TokenizerWrapper | None:
    """Read the tokenizer of a checkpoint's folder.

    Args:
        folder: holds ``tokenizer.json`` or ``tokenizer.model``, and usually ``tokenizer_config.json``.
        name: what the checkpoint is called, where the folder's own name does not tell (hub snapshots).

    Returns:
        mlx-lm's wrapper: no bos is added, batches are padded on the left with the end token, ``eos_token_ids`` has
        every end token that the folder names, and there is a chat template, the checkpoint's own or
        ``CHAT_TEMPLATE``. None, with a warning, where the folder has no tokenizer.

    Raises:
        RodimusError: a file is damaged.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        inner, detokenizer = _from_json(folder)
    elif (folder / "tokenizer.model").exists():
        inner, detokenizer = _from_sentencepiece(folder)
    else:
        warnings.warn(
            f"{folder} has no tokenizer.json and no tokenizer.model: the model loads, but text needs a tokenizer",
            RodimusWarning,
            stacklevel=2,
        )
        return None
    inner.init_kwargs[CHAT_KEY] = _looks_like_chat(inner, name or folder.resolve().name)
    if inner.chat_template is None:
        inner.chat_template = CHAT_TEMPLATE
    ends = _end_tokens(inner, folder)
    if inner.pad_token is None:
        inner.pad_token = inner.eos_token
    inner.padding_side = "left"
    return TokenizerWrapper(inner, detokenizer, eos_token_ids=ends)


def is_chat_model(tokenizer: Any | None) -> bool:
    """Whether prompts are best put as a chat.

    Decided when the tokenizer was loaded: by ``is_chat_model`` in tokenizer_config.json (converted folders have it),
    else by a chat template of the checkpoint's own, else by the word Chat or Instruct in its name. The built-in
    template does not count: base checkpoints get it too.
    """
    return tokenizer is not None and bool(tokenizer.init_kwargs.get(CHAT_KEY, False))


class ByteLevelDetokenizer(BPEStreamingDetokenizer):
    """mlx-lm's, but it keeps a space at the start: ``return`` continues to `` x``, not to ``x``."""

    def _maybe_trim_space(self, current_text: str) -> str:
        return current_text


class SentencePieceTokenizer(SentencePieceBackend):
    """A ``tokenizer.model`` read by sentencepiece itself, byte pieces and spaces decoded as it decodes them."""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.sp_model.decode(tokens)


def _to_blame(folder: Path) -> Path:
    """Of the two files that `PreTrainedTokenizerFast` reads, the one that is damaged."""
    file = folder / "tokenizer.json"
    try:
        Tokenizer.from_file(str(file))
    except Exception:  # the only kind it raises
        return file
    return folder / SETTINGS


def _from_json(folder: Path) -> tuple[Any, Any]:
    try:
        inner = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exception
        raise RodimusError(f"{_to_blame(folder)} cannot be read as a tokenizer: {error}") from error
    if not isinstance(inner.model_max_length, (int, float)):
        raise RodimusError(f"{folder / SETTINGS}: model_max_length must be a number, not {inner.model_max_length!r}")
    for key in ("auto_map", "tokenizer_class"):  # or saving it would ask for the authors' code again
        inner.init_kwargs.pop(key, None)
    byte_level = isinstance(inner.backend_tokenizer.decoder, decoders.ByteLevel)
    return inner, ByteLevelDetokenizer if byte_level else NaiveStreamingDetokenizer


def _from_sentencepiece(folder: Path) -> tuple[Any, Any]:
    file = folder / "tokenizer.model"
    settings = _read_json(folder / SETTINGS, missing={})
    tokens = {key: _token_text(value) for key, value in settings.items() if key.endswith("_token")}
    chat = {key: settings[key] for key in ("chat_template", CHAT_KEY) if key in settings}
    try:
        inner = SentencePieceTokenizer(vocab_file=str(file), **chat, **{k: v for k, v in tokens.items() if v})
    except Exception as error:  # sentencepiece raises RuntimeError, protobuf its own
        raise RodimusError(f"{file} cannot be read as a sentencepiece model: {error}") from error
    # The space that sentencepiece puts before a text stands before the prompt: what is generated keeps its own.
    return inner, partial(SPMStreamingDetokenizer, trim_space=False)


def _token_text(token: Any) -> str | None:
    """A special token of tokenizer_config.json, which writes it as a string or as a dict."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _looks_like_chat(inner: Any, name: str) -> bool:
    if CHAT_KEY in inner.init_kwargs:
        return bool(inner.init_kwargs[CHAT_KEY])
    return inner.chat_template not in (None, CHAT_TEMPLATE) or bool(_CHAT_NAME.search(name))


def _end_tokens(inner: Any, folder: Path) -> set[int]:
    """Ids that end a text: what the configs name, and <|endoftext|> where the vocabulary has it."""
    if inner.eos_token is None and END_OF_TEXT in inner.get_vocab():
        inner.eos_token = END_OF_TEXT
    ends = {inner.convert_tokens_to_ids(END_OF_TEXT)} if END_OF_TEXT in inner.get_vocab() else set()
    for file in ("generation_config.json", "config.json"):
        named = _read_json(folder / file, missing={}).get("eos_token_id")
        found = named if isinstance(named, list) else [] if named is None else [named]
        if not all(type(each) is int and each >= 0 for each in found):
            raise RodimusError(f"{folder / file}: eos_token_id must be a token id or a list of them, not {named!r}")
        ends.update(found)
    if inner.eos_token_id is not None:
        ends.add(inner.eos_token_id)
    if not ends:
        warnings.warn(f"{folder} names no end token: texts end only at the token limit", RodimusWarning, stacklevel=3)
    return ends


def _read_json(file: Path, missing: Any = None) -> Any:
    if missing is not None and not file.exists():
        return missing
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RodimusError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise RodimusError(f"{file} must hold a JSON object")
    return content
