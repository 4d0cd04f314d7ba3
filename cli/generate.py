"""``rodimus-mlx generate``: continue a text, or answer a message."""

from __future__ import annotations

import json
import sys
import warnings
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RodimusError, RodimusWarning
from . import EXIT_INTERRUPT, options
from .progress import size
from .stream_in import MARK, Reading, frame, read_standard_input
from .terminal import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_lm.generate import GenerationResponse

EXAMPLE = """\
  rodimus-mlx generate 'def quicksort(a):' --max-tokens 100 --temp 0.2
  rodimus-mlx generate -m coder --fim-prefix 'def f(x):' --fim-suffix 'return'"""


def run(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Text; '-' or nothing reads standard input.")
    ] = None,
    model: options.Model = None,
    adapter: options.Adapter = None,
    max_tokens: options.MaxTokens = 256,
    temp: options.Temp = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    chat: options.Chat = None,
    system: options.System = None,
    state: options.State = None,
    stream_in: Annotated[
        bool, typer.Option("--stream-in", help="Read standard input to its end, however long; PROMPT comes after it.")
    ] = False,
    fim_prefix: Annotated[
        str | None, typer.Option("--fim-prefix", metavar="TEXT", help="Fill in the middle: what stands before.")
    ] = None,
    fim_suffix: Annotated[
        str | None, typer.Option("--fim-suffix", metavar="TEXT", help="Fill in the middle: what stands after.")
    ] = None,
    draft_model: options.DraftModel = None,
    lookup: options.Lookup = False,
    draft_tokens: options.DraftTokens = 4,
    as_json: options.Json = False,
) -> None:
    """Generate text from a prompt.

    The text goes to standard output as it is made; speeds and memory go to
    standard error. Ctrl-C ends with what there is.

    --fim-prefix and --fim-suffix ask for the text between the two instead.
    """
    if temp == 0 and (top_p < 1 or top_k > 0 or min_p > 0):
        warnings.warn("--top-p, --top-k and --min-p do nothing at --temp 0", RodimusWarning, stacklevel=2)
    if draft_model and lookup:
        raise typer.BadParameter("either of the two, not both", param_hint="'--draft-model' / '--lookup'")
    fills = fim_prefix is not None or fim_suffix is not None
    if fills:
        _refuse_beside_fim(PROMPT=prompt is not None, chat=chat, system=system is not None, stream_in=stream_in)
        chat = False
    elif model is None and (chat or system is not None):
        raise RodimusError(options.NO_CHAT)
    text = "" if stream_in or fills else _read_prompt(prompt)

    import mlx.core as mx
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    from ..fim import fim_prompt
    from ..generation import ROLE_TAG, encode_prompt, stream_generate
    from ..loading import load
    from ..speculative import PromptLookup, SpeculativeStats, load_draft_model
    from ..states import load_state
    from ..states.store import find_state
    from ..tokenizer import is_chat_model

    loaded, tokenizer = load(options.model_or_bundled(model), adapter_path=adapter)
    if chat is None:
        chat = is_chat_model(tokenizer)
    if system is not None and not chat:
        raise RodimusError("--system needs a chat, and this model is not known as a chat model: add --chat")
    cache = load_state(find_state(state), loaded, f"the state {state}").cache if state else loaded.make_cache()
    reading: Reading | None = None
    if stream_in:
        question = "" if prompt in (None, "-") else prompt
        frame_of = frame(tokenizer, _messages(system, MARK + question)) if chat else ("", question)
        reading = read_standard_input(loaded, tokenizer, cache, *frame_of)
        tokens = reading.last
    elif fills:
        tokens = encode_prompt(loaded, tokenizer, fim_prompt(tokenizer, fim_prefix or "", fim_suffix or ""))
    else:
        tokens = encode_prompt(loaded, tokenizer, _messages(system, text) if chat else text)

    if seed is not None:
        mx.random.seed(seed)
    guessing: dict[str, Any] = {}
    if draft_model or lookup:
        guesser = load_draft_model(draft_model, loaded) if draft_model else PromptLookup()
        guessing = {"guesser": guesser, "num_draft_tokens": draft_tokens, "stats": SpeculativeStats()}
    responses = stream_generate(
        loaded,
        tokenizer,
        tokens,
        max_tokens=max_tokens,
        stop=[*(stop or ()), *([ROLE_TAG] if chat else ())],
        prompt_cache=cache,
        **guessing,
        # mlx-lm refuses a top-k of the whole vocabulary, which is no restriction
        sampler=make_sampler(temp, top_p, min_p, top_k=top_k if top_k < loaded.args.vocab_size else 0),
        logits_processors=make_logits_processors(
            repetition_penalty=None if repetition_penalty == 1 else repetition_penalty
        ),
    )
    result = _collect(responses, prompt_tokens=len(tokens), show=not as_json)
    if reading:
        result |= {"prompt_tokens": reading.count, "prompt_tokens_per_second": round(reading.rate, 3)}
    if guessing:
        result["tokens_per_step"] = round(guessing["stats"].tokens_per_step, 3)
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        _print_speeds(result)
    if result["finish_reason"] == "interrupt":
        raise typer.Exit(EXIT_INTERRUPT)


def _read_prompt(prompt: str | None) -> str:
    """The argument, or standard input where it is '-' or absent and something is piped in."""
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("give a text, or pipe one in", param_hint="PROMPT")
    if prompt is None or prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise RodimusError(f"standard input is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if not prompt:
        raise RodimusError("the prompt is empty: there is nothing to continue")
    return prompt


def _refuse_beside_fim(**others: bool | None) -> None:
    """``others``: what there is no place for in the middle, and whether it was given."""
    for name, given in others.items():
        if given:
            shown = name if name.isupper() else "--" + name.replace("_", "-")
            raise typer.BadParameter(f"not together with {shown}", param_hint="'--fim-prefix' / '--fim-suffix'")


def _messages(system: str | None, text: str) -> list[dict[str, str]]:
    question = {"role": "user", "content": text}
    return [question] if system is None else [{"role": "system", "content": system}, question]


def _collect(responses: Iterator[GenerationResponse], *, prompt_tokens: int, show: bool) -> dict[str, Any]:
    """Run the generation to its end or to Ctrl-C, printing as it goes if ``show``; what --json prints."""
    filtered = printable if sys.stdout.isatty() else str
    pieces: list[str] = []
    last: GenerationResponse | None = None
    interrupted = False
    try:
        for last in responses:
            pieces.append(last.text)
            if show:
                print(filtered(last.text), end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    if show:
        print(flush=True)
    return {
        "text": "".join(pieces),
        "finish_reason": "interrupt" if interrupted or last is None else last.finish_reason,
        "prompt_tokens": prompt_tokens,
        "generation_tokens": last.generation_tokens if last else 0,
        "prompt_tokens_per_second": round(last.prompt_tps, 3) if last else 0.0,
        "generation_tokens_per_second": round(last.generation_tps, 3) if last else 0.0,
        "peak_memory_gb": round(last.peak_memory, 6) if last else 0.0,
    }


def _print_speeds(result: dict[str, Any]) -> None:
    prompt = f"prompt {result['prompt_tokens']} at {result['prompt_tokens_per_second']:.1f} tokens/s"
    answer = f"generated {result['generation_tokens']} at {result['generation_tokens_per_second']:.1f} tokens/s"
    if "tokens_per_step" in result:
        answer += f" ({result['tokens_per_step']:.2f} a step)"
    print(f"{prompt}, {answer}, peak {size(result['peak_memory_gb'] * 1e9)}", file=sys.stderr)
