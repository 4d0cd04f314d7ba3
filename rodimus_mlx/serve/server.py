"""Starting the server, its limits, and its end."""

from __future__ import annotations

import functools
import ipaddress
import logging
import signal
import socket
import threading
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

import mlx.core as mx

from ..errors import RodimusError
from ..fim import MARKS
from ..states.fingerprint import fingerprint
from ..version import __version__
from .errors import ApiError
from .generator import Generator, OneModel, PromptCache
from .handler import Handler

logger = logging.getLogger("rodimus_mlx")

_BATCH = 32  # requests that decode together
_PROMPT_BATCH = 8  # prompts that are read together
_PREFILL_STEP = 2048  # tokens of a prompt between two tokens of everybody else's answers
_KEPT_PROMPTS = 256


@dataclass(frozen=True)
class Limits:
    """What one request, and all together, may take."""

    requests: int = 64
    body_bytes: int = 4 << 20
    prompt_tokens: int = 1 << 17
    new_tokens: int = 1 << 15
    cache_bytes: int = 2 << 30


class Server(ThreadingHTTPServer):
    """Serves one model. `serve_until_signal` runs it; `serve_forever` in a thread of one's own and `end` do too.

    Args:
        model, tokenizer: what ``load`` returned.
        model_name: what requests call it; "default_model" always works too.
        host, port: port 0 takes a free one, see ``server_address``.
        api_key: what requests must bring as bearer token; None: nothing.
        default_state: named state for requests that name none.
        allowed_origins: web pages that may use the server, beside its own; "*" for all.
        sampling: what requests do not say: ``temp``, ``top_p``, ``top_k``, ``min_p``, ``max_tokens``.

    Raises:
        RodimusError: there is no tokenizer, or the address cannot be had.
    """

    daemon_threads = True
    request_queue_size = 128  # clients that may knock at once; the default, 5, makes them wait for seconds

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        model_name: str,
        host: str = "127.0.0.1",
        port: int = 8080,
        api_key: str | None = None,
        default_state: str | None = None,
        allowed_origins: Sequence[str] = (),
        limits: Limits | None = None,
        sampling: dict[str, Any] | None = None,
    ) -> None:
        if tokenizer is None:
            raise RodimusError("this checkpoint has no tokenizer, so it cannot be served")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
            raise RodimusError("the API key must be of ASCII letters, digits and signs")
        self.model_name, self.api_key, self.limits = model_name, api_key, limits or Limits()
        self.default_state = default_state
        self.vocab_size = model.args.vocab_size
        self.started = int(time.time())
        self.is_loopback = _is_loopback(host)
        self.running = 0  # requests that are being answered
        self._counting = threading.Lock()
        mx.eval(model.parameters())  # here: the threads that answer must find nothing left to do
        self.fingerprint = fingerprint(model)
        try:
            self.address_family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            super().__init__(address[:2], Handler)  # type: ignore[arg-type]
        except OSError as error:
            raise RodimusError(f"cannot listen at {host} port {port}: {error.strerror or error}") from error
        settings = _mlx_settings(allowed_origins, sampling or {})
        # of end tokens, marks for filling in stand in prompts too
        vocab = tokenizer.get_vocab()
        ends = set(tokenizer.eos_token_ids) - {vocab[mark] for mark in MARKS if mark in vocab}
        prompt_cache = PromptCache(_KEPT_PROMPTS, self.limits.cache_bytes, ends)
        self.generator = Generator(OneModel(settings, model, tokenizer), prompt_cache, self.limits.prompt_tokens)
        self.RequestHandlerClass = functools.partial(  # type: ignore[assignment]
            Handler, self.generator, system_fingerprint=f"rodimus-mlx-{__version__}"
        )

    @property
    def url(self) -> str:
        """Where the page is."""
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"

    def serve_until_signal(self) -> None:
        """Serve until SIGINT or SIGTERM; then finish what was begun, for at most 10 seconds, or until another one."""
        asked = threading.Event()
        previous = {each: signal.signal(each, lambda *_: asked.set()) for each in (signal.SIGINT, signal.SIGTERM)}
        thread = threading.Thread(target=self.serve_forever)
        thread.start()
        try:
            while not asked.wait(1):
                if not self.generator.is_healthy:
                    raise RodimusError("the generating thread has ended: see the log")
            asked.clear()
            logger.info("ending")
            self.end(10, hurry=asked)
        finally:
            self.end(0)
            thread.join()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def end(self, seconds: float, hurry: threading.Event | None = None) -> None:
        """Take no more requests, give those that run so many seconds, and stop; may be called twice."""
        self.shutdown()
        self.server_close()
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline and not (hurry and hurry.wait(0.05)):
            time.sleep(0.05)
        self.generator.stop_and_join()

    @contextmanager
    def request_slot(self) -> Iterator[None]:
        """A place among those that run.

        Raises:
            ApiError: there is none.
        """
        with self._counting:
            if self.running >= self.limits.requests:
                raise ApiError(429, "too many requests at once: try again in a moment", code="rate_limit_exceeded")
            self.running += 1
        try:
            yield
        finally:
            with self._counting:
                self.running -= 1

    def server_bind(self) -> None:
        """Without the look-up of the host's name in the stock one, which can take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """What no handler caught."""
        logger.exception("a connection failed")


def _mlx_settings(allowed_origins: Sequence[str], sampling: dict[str, Any]) -> Namespace:
    """The command line that mlx-lm's server would have been started with."""
    defaults: dict[str, Any] = {"temp": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": 512}
    return Namespace(
        **{**defaults, **sampling},
        model=None,
        adapter_path=None,
        draft_model=None,
        num_draft_tokens=0,
        trust_remote_code=False,
        chat_template="",
        use_default_chat_template=False,
        chat_template_args={},
        allowed_origins=list(allowed_origins),
        decode_concurrency=_BATCH,
        prompt_concurrency=_PROMPT_BATCH,
        prefill_step_size=_PREFILL_STEP,
        prompt_cache_size=_KEPT_PROMPTS,
        prompt_cache_bytes=None,
        kv_bits=None,
        kv_group_size=64,
        quantized_kv_start=0,
        pipeline=False,
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
