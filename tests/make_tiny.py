"""Make the tests' checkpoint: ``python tests/make_tiny.py tests/data/tiny``.

Random weights from a fixed seed and a byte-level tokenizer, written by the converter like any other checkpoint.
"""

from __future__ import annotations

import json
import string
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from rodimus_mlx.convert.convert import convert
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from rodimus_mlx.config import RodimusConfig
from rodimus_mlx.model import Model

SEED = 0
SPECIAL_TOKENS = ["<|startoftext|>", "<|endoftext|>", "<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>", "<|fim_pad|>"]
README = """\
# Tiny

A Rodimus+ model of the smallest size, with random weights: what it writes means nothing. It is here so that tests
are fast. Made by `tests/make_tiny.py`.
"""


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer without merges: 256 bytes and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, eos = SPECIAL_TOKENS[:2]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "pad_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def tiny_config() -> RodimusConfig:
    """Rodimus+ with every part that a large checkpoint has, as narrow as it goes."""
    return RodimusConfig.from_dict(
        {
            "model_type": "rodimus",
            "block_type": "rodimus_plus",
            "d_model": 64,
            "n_layer": 2,
            "vocab_size": 256 + len(SPECIAL_TOKENS),
            "norm_epsilon": 1e-5,
            "bos_token_id": 256,
            "eos_token_id": 257,
            "max_position_embeddings": 4096,
            "mixer_cfg": {"expand_ratio": 2.0, "input_gate_low_rank": "auto", "mem_size": 16},
            "attn_cfg": {"num_heads": 4, "num_heads_k": 1, "window_size": 64, "ffn_expand_ratio": 4 / 3},
            "tie_word_embeddings": False,  # a tied random model would repeat the last letter
        }
    )


def make(out: Path) -> None:
    """Write the checkpoint into the new folder ``out``."""
    mx.random.seed(SEED)
    config = tiny_config()
    model = Model(config)
    for layer in model.layers:  # a fresh mixer's convolution is zero, and so is what it gives
        layer.mixer.conv.weight = mx.random.normal(layer.mixer.conv.weight.shape) * 0.5
        layer.mixer.residual_weight = mx.ones_like(layer.mixer.residual_weight)
    # Rows of the head that are longer win more often: the noise is letters, and seldom ends by itself.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    scale = mx.full((config.vocab_size, 1), 0.05)
    scale[mx.array([alphabet.index(char) for char in string.ascii_letters + "Ġ"])] = 0.6
    model.lm_head.weight = mx.random.normal((config.vocab_size, config.d_model)) * scale
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        (source / "config.json").write_text(json.dumps(config.to_dict()))
        mx.save_safetensors(str(source / "model.safetensors"), dict(tree_flatten(model.parameters())))
        write_tokenizer(source)
        convert(source, out)
    (out / "README.md").write_text(README)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
