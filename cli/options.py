"""Options that several commands share, with the ranges they accept."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from ..serve.checks import COLDEST

MOST_NEW_TOKENS = 2**31 - 1
MOST_SEED = 2**64 - 1  # what mx.random.seed takes


def between(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[float | None], float | None]:
    """A callback that accepts numbers in [low, high], or in (low, high] if ``above``; nan and inf never."""
    least = f"above {_shown(low)}" if above else f"{_shown(low)} or more"
    wanted = least if high == math.inf else f"{least}, and at most {_shown(high)}"

    def check(value: float | None) -> float | None:
        if value is None:
            return None
        # without math.isfinite, which fails at whole numbers that no float holds
        if not low <= value <= high or value == math.inf or (above and value == low):
            raise typer.BadParameter(f"must be {wanted}, not {_shown(value)}")
        return value

    return check


def _shown(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def _temperature(value: float | None) -> float | None:
    value = between(0)(value)
    return 0.0 if value is not None and value < COLDEST else value


def _no_empty_text(texts: list[str] | None) -> list[str] | None:
    if texts and "" in texts:
        raise typer.BadParameter("must not be empty")
    return texts


Model = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="MODEL", help="Folder or Hugging Face id.  [default: bundled]"),
]
ChatModel = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="MODEL", help="Folder or Hugging Face id of a chat model; needed."),
]
Adapter = Annotated[
    str | None, typer.Option("--adapter", metavar="FOLDER", help="Folder of a LoRA adapter to load on top.")
]
MaxTokens = Annotated[
    int,
    typer.Option("--max-tokens", "-n", metavar="N", callback=between(1, MOST_NEW_TOKENS), help="Stop after N tokens."),
]
Temp = Annotated[
    float,
    typer.Option("--temp", "-t", metavar="T", callback=_temperature, help="Temperature; 0 takes the likeliest token."),
]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p", metavar="P", callback=between(0, 1, above=True), help="Sample from the likeliest that sum to P."
    ),
]
TopK = Annotated[
    int, typer.Option("--top-k", metavar="K", callback=between(0), help="Sample from the K likeliest; 0 for all.")
]
MinP = Annotated[
    float,
    typer.Option(
        "--min-p", metavar="P", callback=between(0, 1), help="Drop what is below P times the likeliest's probability."
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        "--repetition-penalty",
        metavar="X",
        callback=between(0, above=True),
        help="Above 1: avoid the last 20 tokens.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", callback=between(0, MOST_SEED), help="Make sampling repeatable."),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        "--stop", metavar="TEXT", callback=_no_empty_text, help="Stop before TEXT; may be given more than once."
    ),
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat", help="Answer the prompt or continue it; the default fits the model.", show_default=False
    ),
]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message of a chat.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")]
DraftModel = Annotated[
    str | None,
    typer.Option(
        "--draft-model", metavar="MODEL", help="Smaller model of the same tokens that guesses ahead: faster, same text."
    ),
]
Lookup = Annotated[
    bool, typer.Option("--lookup", help="Guess ahead that what came before comes again: faster, same text.")
]
DraftTokens = Annotated[
    int, typer.Option("--draft-tokens", metavar="N", callback=between(1, 64), help="Tokens to guess at a time.")
]
State = Annotated[
    str | None, typer.Option("--state", metavar="NAME", help="Named state to go on from, or the path of its file.")
]


CHAT_MODEL = "codefuse-ai/Rodimus-Plus-Coder-1.6B-Chat"
NO_CHAT = f"the bundled model completes Python and does not chat: give --model, say {CHAT_MODEL}"


def model_or_bundled(model: str | None) -> str:
    """--model, or the folder of the bundled model and a word about it on standard error."""
    from ..loading import DEMO_FOLDER

    if model is None:
        print("No --model given: the bundled 10M-parameter model completes Python.", file=sys.stderr)
        return str(DEMO_FOLDER)
    return model
