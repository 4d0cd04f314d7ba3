"""``rodimus-mlx init``: a model with random weights, to train from scratch."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import RodimusError
from . import options

EXAMPLE = "  rodimus-mlx init config.json blank --tokenizer my-tokenizer"


def run(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A config.json, or a folder that has one.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to make.")],
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Where to take the tokenizer from.  [default: CONFIG's folder]")
    ] = None,
    seed: options.Seed = None,
) -> None:
    """Make a model with random weights, by the official initialisation.

    Train it with finetune --method full.
    """
    from pathlib import Path

    from ..config import RodimusConfig
    from ..convert.checkpoint import read_json
    from ..convert.mapping import count_parameters
    from ..finetune.initialize import initialize
    from ..finetune.saving import save_checkpoint
    from ..tokenizer import load_tokenizer
    from .progress import size

    file = Path(config) / "config.json" if Path(config).is_dir() else Path(config)
    sizes = RodimusConfig.from_dict(read_json(file))
    words = load_tokenizer(tokenizer or file.parent)
    if words is not None and len(words.get_vocab()) > sizes.vocab_size:
        entries = len(words.get_vocab())
        raise RodimusError(f"{file}: vocab_size is {sizes.vocab_size}, but the tokenizer has {entries} entries")
    model = initialize(sizes, seed or 0)
    history = "Random weights, to be trained."
    print(f"{out}: {count_parameters(sizes):,} parameters, {size(save_checkpoint(model, words, out, history))}")
