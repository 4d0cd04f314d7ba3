"""A small model whose every answer depends on all that it has read and is made of letters, and its tokenizer."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from helpers import TINY_FOLDER, random_model, tiny_config

from rodimus_mlx.tokenizer import load_tokenizer

_LETTERS = slice(64, 64 + 26)  # a to z, in the tiny checkpoint's tokenizer


@functools.cache
def talker(block_type: str = "rodimus_plus") -> tuple[Any, Any]:
    """Model and tokenizer; shared by the tests, which leave them as they are."""
    model = random_model(tiny_config(block_type, vocab_size=262, tie_word_embeddings=False))
    keys = model.args.mem_size
    for layer in model.layers:
        mixer = layer.mixer
        # Hardly any decay, and large queries: what came long ago still counts.
        mixer.gate_bias = mx.concatenate([mx.full((keys,), -4.0), mixer.gate_bias[keys:]])
        queries, key_rows, gates = mx.split(mixer.qkgt_proj.weight, [keys, 2 * keys])
        mixer.qkgt_proj.weight = mx.concatenate([queries * 10, key_rows, gates * 0.1])
    head = mx.zeros_like(model.lm_head.weight)
    head[_LETTERS] = model.lm_head.weight[_LETTERS]
    model.lm_head.weight = head
    return model, load_tokenizer(TINY_FOLDER)


def save_talker(folder: Path) -> Path:
    """The talker as a checkpoint, known as a chat model."""
    model, _ = talker()
    folder.mkdir()
    shutil.copy(TINY_FOLDER / "tokenizer.json", folder)
    settings = json.loads((TINY_FOLDER / "tokenizer_config.json").read_text()) | {"is_chat_model": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(model.args.to_dict()))
    model.save_weights(str(folder / "model.safetensors"))
    return folder
