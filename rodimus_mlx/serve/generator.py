"""mlx-lm's batches with our models: prompts checked, cut at turn borders, and going on from named states."""

from __future__ import annotations

import copy
import logging
import select
import socket
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    GenerationContext,
    ModelDescription,
    ModelProvider,
    Response,
    ResponseGenerator,
)

from ..errors import RodimusError
from ..fim import fim_prompt
from ..generation import StopStrings, encode_prompt, encode_text, render_conversation
from ..states.file import load_state
from ..states.snapshot import Cache, compact, evaluate, snapshot
from ..states.store import state_path
from .errors import ApiError, Refused

logger = logging.getLogger("rodimus_mlx")

_MOST_STATES = 8  # named states held in memory


class OneModel(ModelProvider):
    """Provides the model that the server was started with, and never another."""

    def __init__(self, cli_args: Namespace, model: Any, tokenizer: Any) -> None:
        super().__init__(cli_args)
        self.model: Any
        self.tokenizer: Any
        self.model_key: Any
        self.model, self.tokenizer = model, tokenizer
        self.model_key = ("default_model", None, None)
        self.is_batchable = True

    def load(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Whatever a request says: the handler has checked the name."""
        return self.model, self.tokenizer

    def load_default(self) -> None:
        """There already."""


class StateToken(int):
    """Stands for a named state at the front of a prompt, so that mlx-lm's caches are looked up and kept per state.

    As a number, which only penalties on earlier tokens see, it is the begin token; as a key it is equal to itself
    alone. The model never reads it: `PromptCache` always has the state, or more.
    """

    cache: Cache
    version: int

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __deepcopy__(self, memo: dict) -> StateToken:
        return self


class PromptCache(LRUPromptCache):
    """mlx-lm's memory of prompts, for caches that cannot be trimmed."""

    def __init__(self, max_size: int, max_bytes: int, end_tokens: set[int]) -> None:
        super().__init__(max_size, max_bytes)
        self._end_tokens = end_tokens

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Cache | None, list[int]]:
        """The cache of the longest known beginning, and the rest: at least one token, as there is no trimming."""
        cache, rest = super().fetch_nearest_cache(model, tokens[:-1])
        if cache is not None:
            return cache, [*rest, tokens[-1]]
        if tokens and isinstance(tokens[0], StateToken):
            return snapshot(tokens[0].cache), tokens[1:]
        return None, tokens

    def insert_cache(self, model: Any, tokens: list[int], prompt_cache: Cache, **options: Any) -> None:
        """Keep a cache, unless it has read an end token, which no later prompt will have there."""
        if tokens and int(tokens[-1]) in self._end_tokens:
            return
        kept = compact(prompt_cache)  # a row of a batch would keep the whole batch
        evaluate(kept)
        super().insert_cache(model, tokens, kept, **options)


@dataclass
class StateRequest(CompletionRequest):
    """A request that may go on from a named state.

    suffix: what comes after the text that is asked for; the prompt comes before. stops: strings that end the text;
    mlx-lm would look for them token by token. connection: tells when the client has gone.
    """

    suffix: str = ""
    state: str | None = None
    stops: tuple[str, ...] = ()
    connection: socket.socket | None = None


class Generator(ResponseGenerator):
    """mlx-lm's generator with our prompts and stop strings."""

    def __init__(self, provider: OneModel, prompt_cache: PromptCache, most_prompt_tokens: int) -> None:
        self._most_prompt_tokens = most_prompt_tokens
        self._states: dict[str, StateToken] = {}
        super().__init__(provider, prompt_cache)

    def _run_generate(self) -> None:
        try:
            super()._run_generate()
        finally:
            mx.clear_streams()  # what this thread compiled must go before it does: its end may come after Python's

    def generate(  # type: ignore[override]
        self,
        request: StateRequest,
        generation_args: GenerationArguments,
        progress_callback: Callable[[int, int], None] | None = None,
    ) -> tuple[GenerationContext, Iterator[Response]]:
        """As mlx-lm's, but stop strings are found in the text, whatever its tokens.

        Raises:
            Refused: the prompt cannot be read, or nothing generates any more.
        """
        # One description for all, whatever name they used: they share a batch. A seed means nothing to greedy ones.
        generation_args = replace(
            generation_args,
            model=ModelDescription("default_model", None, None),  # type: ignore[arg-type]
            seed=generation_args.seed if generation_args.sampling.temperature > 0 else None,
            stop_words=[],
        )
        try:
            context, responses = super().generate(request, generation_args, progress_callback)
        except ApiError as error:
            raise Refused(error) from error
        except RuntimeError as error:
            raise Refused(ApiError(503, "the server is not generating: it is ending or has failed")) from error
        except Exception as error:
            logger.exception("a prompt could not be read")
            raise Refused(ApiError(500, "the server failed at this prompt; its log says more")) from error
        if context.prompt and isinstance(context.prompt[0], StateToken):
            context = _without_state_token(context)
        return context, _until_stop(context, responses, StopStrings(request.stops), request.connection)

    def _tokenize(
        self, tokenizer: Any, request: Any, args: Any
    ) -> tuple[list[int], list[list[int]], list[str], str, None]:
        """The prompt, its segments and their kinds (mlx-lm keeps a cache at the end of each), and mlx-lm's rest."""
        chat = request.request_type == "chat"
        try:
            given = request.messages if chat else request.prompt
            if request.suffix:
                given = fim_prompt(tokenizer, request.prompt, request.suffix)
            prompt = encode_prompt(self.model_provider.model, tokenizer, given)
            if len(prompt) > self._most_prompt_tokens:
                raise ApiError(
                    400,
                    f"the prompt has {len(prompt)} tokens, and at most {self._most_prompt_tokens} are allowed",
                    param="messages" if chat else "prompt",
                    code="context_length_exceeded",
                )
            borders = _turn_borders(tokenizer, request.messages, prompt) if chat else {}
            if request.state is not None:
                prompt = [self._state_token(request.state), *prompt]
                borders = {border + 1: kind for border, kind in borders.items()}
        except RodimusError as error:
            raise ApiError(400, str(error)) from error
        ends = [*borders, len(prompt)]
        segments = [prompt[begin:end] for begin, end in zip([0, *ends], ends)]
        return prompt, segments, [*borders.values(), "assistant" if not chat else "user"], "normal", None

    def _state_token(self, name: str) -> StateToken:
        """The token of a named state, read when it is first wanted and when its file has changed."""
        try:
            path = state_path(name)
            version = path.stat().st_mtime_ns
        except (RodimusError, OSError) as error:
            raise ApiError(404, f"there is no state {name[:100]}", param="state", code="state_not_found") from error
        token = self._states.pop(name, None)
        if token is None or token.version != version:
            model: Any = self.model_provider.model
            fresh = StateToken(model.args.bos_token_id or 0)
            fresh.cache, fresh.version = load_state(path, model, f"the state {name}").cache, version
            if token is not None:
                token.cache = []  # kept prompts may hold the token for long
            token = fresh
        self._states[name] = token  # the latest last
        if len(self._states) > _MOST_STATES:
            self._states.pop(next(iter(self._states))).cache = []
        return token


def _turn_borders(tokenizer: Any, messages: list[dict[str, str]], prompt: list[int]) -> dict[int, str]:
    """Where the system message and the turns before the last end in the prompt: later prompts may share so much."""
    borders: dict[int, str] = {}
    system = sum(1 for message in messages[:1] if message["role"] == "system")
    for count, kind in ((system, "system"), (len(messages) - 1, "user")):
        if 0 < count < len(messages):
            text = render_conversation(tokenizer, messages[:count], for_answer=False)
            shared = _shared(encode_text(tokenizer, text), prompt)
            if max(borders, default=0) < shared < len(prompt) - 1:
                borders[shared] = kind
    return borders


def _shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _without_state_token(context: GenerationContext) -> GenerationContext:
    """What the handler counts by; the generating thread keeps its own, and must hear of `stop`."""
    shown = copy.copy(context)
    shown.prompt = context.prompt[1:]
    shown.prompt_cache_count = context.prompt_cache_count - 1
    shown.stop = context.stop  # type: ignore[method-assign]
    return shown


def _until_stop(
    context: GenerationContext, responses: Iterator[Response], stops: StopStrings, connection: socket.socket | None
) -> Iterator[Response]:
    for response in responses:
        if connection is not None and _has_gone(connection):
            raise ConnectionAbortedError("the client has gone")
        text, stopped = stops.feed(response.text)
        if stopped:
            context.stop()
        elif response.finish_reason is not None:
            text += stops.flush()
        reason = "stop" if stopped else response.finish_reason
        if reason == "stop" and text:  # mlx-lm's handler drops the text of an end
            yield replace(response, text=text, finish_reason=None)
            text = ""
        yield replace(response, text=text, finish_reason=reason)
        if reason is not None:
            return


def _has_gone(connection: socket.socket) -> bool:
    """Whether the other side has closed; a client has nothing more to send, so that readable means closed."""
    try:
        poll = select.poll()  # select() itself knows no more than 1024 files
        poll.register(connection, select.POLLIN)
        return bool(poll.poll(0)) and not connection.recv(1, socket.MSG_PEEK)
    except (OSError, ValueError):
        return True
