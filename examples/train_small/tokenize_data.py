"""Text to the samples that training reads: tokens, cut into pieces that fit a row, some turned to fill in the middle.

    python tokenize_data.py DATA TOKENIZER OUT [--seq-len 2048] [--passes 2]

Reads DATA/train.jsonl and valid.jsonl, writes OUT/train.npz and valid.npz: `tokens` [sum of lengths] uint16 and
`lengths` [samples]. A pass has every document once; each cuts, joins and chooses anew. A sample of n + 1 tokens is n
inputs and their targets: neighbouring pieces of a document share a token. Documents are <bos> text <eos>.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from train_tokenizer import BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE, texts

FIM_SHARE = 0.3  # of the training samples
MIDDLE = 8  # least characters of a middle; the most is half of the sample
ROOM = 16  # tokens that filling in may add: its marks, and words that its two cuts divide
# A prompt may end inside what is usually one token (a line end without the next line's indentation): so that the model
# knows how to go on, text is tokenized in parts that are cut anywhere, of so many characters in the mean.
CUT_EVERY = 1000
DOCUMENTS_AT_ONCE = 500


def main() -> None:
    """Write both files; print how many samples and tokens they have."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of train.jsonl and valid.jsonl")
    parser.add_argument("tokenizer", type=Path, help="folder of tokenizer.json")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--passes", type=int, default=2)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    args.out.mkdir(parents=True, exist_ok=True)

    documents = texts(args.data / "train.jsonl")
    samples = (
        sample for number in range(args.passes) for sample in one_pass(documents, tokenizer, args.seq_len, number)
    )
    write(args.out / "train.npz", samples)
    valid = texts(args.data / "valid.jsonl")
    write(args.out / "valid.npz", one_pass(valid, tokenizer, args.seq_len, 0, fim_share=0, cut_every=math.inf))


def one_pass(
    documents: list[str],
    tokenizer: Tokenizer,
    seq_len: int,
    seed: int,
    *,
    fim_share: float = FIM_SHARE,
    cut_every: float = CUT_EVERY,
) -> Iterator[list[int]]:
    """Samples of all documents, of at most ``seq_len + 1`` tokens each."""
    rng = random.Random(seed)
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    for begin in range(0, len(documents), DOCUMENTS_AT_ONCE):
        parts = [cut(text, cut_every, rng) for text in documents[begin : begin + DOCUMENTS_AT_ONCE]]
        encoded = iter(tokenizer.encode_batch([part for each in parts for part in each]))
        for each in parts:
            tokens = [bos, *(token for _ in each for token in next(encoded).ids), eos]
            for piece in pieces(tokens, seq_len, rng):
                filled = fill_in_middle(piece, tokenizer, seq_len, rng) if rng.random() < fim_share else None
                yield filled or piece


def cut(text: str, every: float, rng: random.Random) -> list[str]:
    """A text in parts of about ``every`` characters in the mean, cut anywhere."""
    places = sorted(rng.sample(range(1, len(text)), min(int(len(text) / every), len(text) - 1)))
    return [text[a:b] for a, b in pairwise([0, *places, len(text)])]


def pieces(tokens: list[int], seq_len: int, rng: random.Random) -> Iterator[list[int]]:
    """A document's tokens in pieces that fit a row; of a long one the first is shorter, so that passes differ."""
    begin = 0
    if len(tokens) > seq_len + 1:
        begin = rng.randrange(1, seq_len)
        yield tokens[: begin + 1]
    for start in range(begin, len(tokens) - 1, seq_len):
        yield tokens[start : start + seq_len + 1]


def fill_in_middle(piece: list[int], tokenizer: Tokenizer, seq_len: int, rng: random.Random) -> list[int] | None:
    """The piece as prefix, suffix, middle; None where it is too short, or would be too long."""
    text = tokenizer.decode(piece[: seq_len + 1 - ROOM], skip_special_tokens=True)
    if len(text) < 4 * MIDDLE or "\ufffd" in text:
        return None
    length = round(math.exp(rng.uniform(math.log(MIDDLE), math.log(len(text) / 2))))
    start = rng.randrange(len(text) - length + 1)
    begin, hole, end, eos = (tokenizer.token_to_id(token) for token in (FIM_BEGIN, FIM_HOLE, FIM_END, EOS))
    parts = (text[:start], text[start : start + length], text[start + length :])
    prefix, middle, suffix = (tokenizer.encode(part).ids for part in parts)
    filled = [begin, *prefix, hole, *suffix, end, *middle, eos]
    return filled if len(filled) <= seq_len + 1 else None


def write(file: Path, samples: Iterable[list[int]]) -> None:
    """The samples end to end."""
    arrays = [np.array(sample, np.uint16) for sample in samples]
    lengths = np.array([len(array) for array in arrays], np.uint32)
    np.savez(file, tokens=np.concatenate(arrays), lengths=lengths)
    print(json.dumps({"file": file.name, "samples": len(arrays), "tokens": int(lengths.sum())}))


def read(file: Path) -> list[np.ndarray]:
    """What `write` wrote."""
    with np.load(file) as arrays:
        return np.split(arrays["tokens"], np.cumsum(arrays["lengths"])[:-1])


if __name__ == "__main__":
    main()
