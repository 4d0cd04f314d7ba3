"""Text out of a model: mlx-lm's ``stream_generate`` with chat prompts and stop strings around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .errors import RodimusError

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse

    from .speculative import Guesser

ROLE_TAG = "<role>"  # opens the next turn: a model that writes it has ended its answer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]

PREFILL_STEP = 512  # tokens of a prompt read at once: peak memory is a step's, whatever the prompt's length


def stream_generate(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    *,
    max_tokens: int = 256,
    stop: Sequence[str] = (),
    guesser: Guesser | None = None,
    **options: Any,
) -> Iterator[GenerationResponse]:
    """Generate token by token.

    Args:
        model, tokenizer: what ``load`` returned.
        prompt: a text to continue, token ids, or a conversation: a list of ``{"role": ..., "content": ...}``,
            whose answer also ends at a ``<role>`` tag.
        max_tokens: at most this many; -1 for no limit.
        stop: strings that end the text. They are found across token borders and never shown.
        guesser: guesses tokens for speculative decoding, which changes the speed but not the text: a fresh
            ``DraftModel`` or ``PromptLookup`` of ``rodimus_mlx.speculative``.
        **options: for ``mlx_lm.generate.generate_step``: ``sampler``, ``logits_processors``, ``prompt_cache``, ...;
            with a guesser, for ``speculative_steps``.

    Yields:
        ``mlx_lm.generate.GenerationResponse``; the texts joined are the answer. The last one's ``finish_reason``
        is "stop" (an end token or a stop string) or "length".

    Raises:
        RodimusError: there is no tokenizer, or the prompt is empty or cannot be encoded.
    """
    tokens = encode_prompt(model, tokenizer, prompt)
    if is_conversation(prompt):
        stop = [*stop, ROLE_TAG]
    responses: Iterator[GenerationResponse]
    if guesser is None:
        from mlx_lm.generate import stream_generate as mlx_stream_generate

        options = {"prefill_step_size": PREFILL_STEP} | options
        responses = mlx_stream_generate(model, tokenizer, tokens, max_tokens=max_tokens, **options)
    else:
        from .speculative import speculative_responses

        responses = speculative_responses(model, tokenizer, tokens, guesser, max_tokens=max_tokens, **options)
    return _until_stop(responses, StopStrings(stop))


def generate(model: Any, tokenizer: Any, prompt: Prompt, **options: Any) -> str:
    """The whole text that ``stream_generate`` yields; same arguments."""
    return "".join(response.text for response in stream_generate(model, tokenizer, prompt, **options))


def is_conversation(prompt: Prompt) -> bool:
    """Whether a prompt is a list of messages rather than text or token ids."""
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def encode_prompt(model: Any, tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, as ``stream_generate`` takes it; no bos is added.

    Raises:
        RodimusError: there is no tokenizer, or the prompt is empty, not Unicode, or has ids beyond the vocabulary.
    """
    if tokenizer is None:
        raise RodimusError(
            "this checkpoint has no tokenizer, so it cannot read or write text: "
            "put its tokenizer.json or tokenizer.model into the model's folder"
        )
    if is_conversation(prompt):
        tokens = encode_text(tokenizer, render_conversation(tokenizer, prompt))
    elif isinstance(prompt, str):
        tokens = encode_text(tokenizer, prompt)
    else:
        tokens = list(map(int, prompt))  # type: ignore[arg-type]
    if not tokens:
        raise RodimusError("the prompt is empty: there is nothing to continue")
    vocab_size = model.args.vocab_size
    if beyond := [token for token in tokens if not 0 <= token < vocab_size]:
        raise RodimusError(
            f"the prompt has token {beyond[0]}, but the model's vocab_size is {vocab_size}: "
            "the tokenizer belongs to another model"
        )
    return tokens


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text and nothing but the text.

    Raises:
        RodimusError: it is not Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RodimusError("the prompt is not valid UTF-8 text") from error
    return tokenizer.encode(text, add_special_tokens=False)


def render_conversation(tokenizer: Any, messages: Any, *, for_answer: bool = True) -> str:
    """A conversation as the one text that the model reads; ``for_answer`` opens the assistant's next turn.

    Raises:
        RodimusError: the chat template refuses it.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=for_answer)
    except Exception as error:  # a template is a program of the checkpoint's authors
        raise RodimusError(f"the chat template cannot write this conversation: {error}") from error


class StopStrings:
    """Cuts a stream of text at the first stop string, holding back what may turn out to begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Take the next piece; returns what may be shown now, and whether a stop string was met."""
        self._held += text
        found = [position for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown, False

    def flush(self) -> str:
        """What was held back and, the stream having ended, begins no stop string."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _until_stop(responses: Iterator[GenerationResponse], stops: StopStrings) -> Iterator[GenerationResponse]:
    for response in responses:
        text, stopped = stops.feed(response.text)
        if stopped:
            yield replace(response, text=text, finish_reason="stop")
            return
        if response.finish_reason is not None:
            text += stops.flush()
        yield replace(response, text=text)
