"""Train the small model's tokenizer: byte-level BPE on the training text alone.

    python train_tokenizer.py DATA OUT [--vocab-size 8192]

Reads DATA/train.jsonl, writes OUT/tokenizer.json and tokenizer_config.json with the special tokens of the released
checkpoints, and prints the bytes that a token stands for on DATA/valid.jsonl.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
FIM_BEGIN, FIM_HOLE, FIM_END, FIM_PAD = "<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>", "<|fim_pad|>"
SPECIAL = [BOS, EOS, FIM_BEGIN, FIM_HOLE, FIM_END, FIM_PAD, "<|repo_name|>", "<|file_sep|>"]

# What a token may span: line ends with the indentation after them (a line's start costs one token), a word with the
# space or dot before it, up to three digits, punctuation.
PIECES = r"(?:[ \t]*\n)+[ \t]*|[ .]?[A-Za-z_]+| ?[^\W\d_a-zA-Z]+| ?\d{1,3}| ?[^\s\w]+|[ \t]+"
LONGEST = 32  # characters in a token
SAMPLE = 40_000_000  # characters of text to learn from


def main() -> None:
    """Train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of train.jsonl and valid.jsonl")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--vocab-size", type=int, default=8192)
    args = parser.parse_args()
    tokenizer = train(texts(args.data / "train.jsonl", SAMPLE), args.vocab_size)
    args.out.mkdir(parents=True, exist_ok=True)
    save(tokenizer, args.out)
    valid = texts(args.data / "valid.jsonl")
    size = sum(len(text.encode()) for text in valid)
    print(f"{args.vocab_size} entries, {size / count(tokenizer, valid):.3f} bytes a token")


def texts(file: Path, characters: int | None = None) -> list[str]:
    """The texts of a .jsonl, from its start up to about so many characters."""
    result: list[str] = []
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            result.append(json.loads(line)["text"])
            if characters is not None:
                characters -= len(result[-1])
                if characters <= 0:
                    break
    return result


def train(documents: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with the special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=LONGEST,
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, out: Path) -> None:
    """tokenizer.json, and the settings that the released checkpoints have: no bos added, padding left."""
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "additional_special_tokens": SPECIAL[2:],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "is_chat_model": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def count(tokenizer: Tokenizer, documents: list[str]) -> int:
    """Tokens of all documents."""
    return sum(len(encoding.ids) for encoding in tokenizer.encode_batch(documents))


if __name__ == "__main__":
    main()
