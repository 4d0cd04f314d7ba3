"""HTTP: who may ask what, in front of mlx-lm's handler, and every error as OpenAI-style JSON."""

from __future__ import annotations

import hmac
import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from mlx_lm.server import APIHandler, CompletionRequest

from ..errors import RodimusError
from ..generation import ROLE_TAG
from ..states.file import read_info
from ..states.store import state_names, state_path
from .checks import check_body, parse_body
from .errors import ApiError, Refused
from .generator import StateRequest

if TYPE_CHECKING:
    from .server import Server

logger = logging.getLogger("rodimus_mlx")

PAGE = Path(__file__).parent / "page"
_PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
# The page needs nothing from elsewhere, and what a model writes can load nothing either.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_COMPLETIONS = {"/v1/completions": False, "/v1/chat/completions": True, "/chat/completions": True}
_LOOPBACK = {"localhost", "127.0.0.1", "[::1]"}
_DRAINED = 64 << 20  # bytes of a refused body that are read, so that the client gets to read why


class Handler(APIHandler):
    """One request."""

    server: Server
    server_version, sys_version = "rodimus-mlx", ""
    timeout = 60  # seconds without a byte either way, after which a client is given up

    def do_GET(self) -> None:
        """The page, health, models and states."""
        with self._answering():
            self._check_origin()
            self.path = self.path.partition("?")[0]
            if self.path in _PAGE_FILES:
                self._send_page(*_PAGE_FILES[self.path])
            elif self.path == "/health":
                self.handle_health_check()
            else:
                self._check_key()
                self._send_json(200, self._listing(unquote(self.path)))

    def do_POST(self) -> None:
        """Completions."""
        with self._answering():
            self._check_origin()
            self.path = self.path.partition("?")[0]
            raw = self._read_body()
            self._check_key()
            if self.path not in _COMPLETIONS:
                raise ApiError(404, f"there is nothing at POST {self.path}")
            body = check_body(
                parse_body(raw),
                chat=_COMPLETIONS[self.path],
                names={"default_model", self.server.model_name},
                vocab_size=self.server.vocab_size,
                most_tokens=self.server.limits.new_tokens,
            )
            body["model"] = self.server.model_name
            self._hand_on(json.dumps(body).encode())
            with self.server.request_slot():
                super().do_POST()

    def do_OPTIONS(self) -> None:
        """What a browser asks before it asks for a page of another origin."""
        with self._answering():
            self._check_origin()
            super().do_OPTIONS()

    def validate_model_parameters(self) -> None:
        """mlx-lm's checks, with our errors."""
        try:
            super().validate_model_parameters()
        except ValueError as error:
            raise Refused(ApiError(400, str(error), param=str(error).partition(" ")[0])) from error

    def handle_chat_completions(self) -> CompletionRequest:
        """The request as ours."""
        return self._as_ours(super().handle_chat_completions())

    def handle_text_completions(self) -> CompletionRequest:
        """The request as ours."""
        return self._as_ours(super().handle_text_completions())

    def handle_completion(self, request: CompletionRequest, stop_words: list[str]) -> None:
        """mlx-lm's, after what ends the text was put where ours looks for it."""
        assert isinstance(request, StateRequest)
        chat = (ROLE_TAG,) if request.request_type == "chat" else ()
        request.stops = (*stop_words, *chat)
        super().handle_completion(request, [])

    def end_headers(self) -> None:
        """Remembers that the answer has begun."""
        self._begun = True
        super().end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What Python's HTTP server finds wrong (malformed requests, unknown methods), as JSON too."""
        self.close_connection = True
        if not hasattr(self, "headers"):
            self.headers = Message()  # mlx-lm's part of the answer looks at them
        self._send_error(ApiError(code, message or self.responses.get(code, ("error",))[0]))

    def log_message(self, format: str, *args: Any) -> None:
        """To the logger rather than to standard error."""
        logger.info("%s %s", self.address_string(), format % args)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Turns whatever goes wrong into an answer, or into silence where the client has gone."""
        self._begun = False
        try:
            yield
        except (ApiError, Refused) as error:
            self._send_error(error.error if isinstance(error, Refused) else error)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception:
            logger.exception("a request failed")
            self._send_error(ApiError(500, "the server failed at this request; its log says more"))

    def _check_origin(self) -> None:
        """Keep pages of other sites out: they can send requests, and without a key nothing else would stop them."""
        origin, host = self.headers.get("Origin"), self.headers.get("Host", "")
        allowed = self.response_generator.cli_args.allowed_origins
        if origin and "*" not in allowed and origin not in allowed and origin.partition("://")[2] != host:
            raise ApiError(403, f"pages of {origin} may not use this server")
        # A name of another site's that leads here (DNS rebinding) would make it the same origin.
        if self.server.is_loopback and not self.server.api_key and host and _without_port(host) not in _LOOPBACK:
            raise ApiError(403, f"this server is not known as {host}")

    def _check_key(self) -> None:
        key = self.server.api_key
        given = self.headers.get("Authorization", "").strip()
        if key and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    def _read_body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length:
            raise ApiError(411, "the Content-Length header is required")
        if not (length.isascii() and length.isdigit()):
            raise ApiError(400, "the Content-Length header must be a number")
        most = self.server.limits.body_bytes
        if len(length) > 18 or int(length) > most:
            self._drain(int(length[:18]))
            raise ApiError(413, f"the request has {length[:18]} bytes, and at most {most} are allowed")
        raw = self.rfile.read(int(length))
        if len(raw) < int(length):
            raise ConnectionAbortedError("the client has gone")
        return raw

    def _drain(self, length: int) -> None:
        left = min(length, _DRAINED)
        while left > 0 and (data := self.rfile.read(min(left, 1 << 16))):
            left -= len(data)

    def _hand_on(self, raw: bytes) -> None:
        """Let mlx-lm's handler read this body instead of the one that came."""
        self.rfile = io.BytesIO(raw)  # type: ignore[assignment]
        self.headers.replace_header("Content-Length", str(len(raw)))

    def _as_ours(self, request: CompletionRequest) -> StateRequest:
        return StateRequest(
            **vars(request),
            suffix=self.body.get("suffix", ""),
            state=self.body.get("state", self.server.default_state) or None,
            connection=self.connection,
        )

    def _listing(self, path: str) -> dict[str, Any]:
        model = {"id": self.server.model_name, "object": "model", "created": self.server.started, "owned_by": "local"}
        if path == "/v1/models":
            return {"object": "list", "data": [model]}
        if path == f"/v1/models/{self.server.model_name}":
            return model
        if path.startswith("/v1/models/"):
            name = path.removeprefix("/v1/models/")[:100]
            raise ApiError(404, f"there is no model {name}", param="model", code="model_not_found")
        if path == "/v1/states":
            return {"object": "list", "data": list(self._states())}
        raise ApiError(404, f"there is nothing at {path[:100]}")

    def _states(self) -> Iterator[dict[str, Any]]:
        """The named states that fit the model."""
        for name in state_names():
            try:
                info = read_info(state_path(name))
            except RodimusError:
                continue
            if info.fingerprint == self.server.fingerprint:
                yield {"id": name, "object": "state", "tokens": info.tokens, "source": info.source}

    def _send_page(self, name: str, kind: str) -> None:
        data = (PAGE / name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Security-Policy", _PAGE_POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-cache")
        self.end_headers()
        self.wfile.write(data)

    def _send_json(self, status: int, content: dict[str, Any], **headers: str) -> None:
        data = json.dumps(content).encode()
        self._set_completion_headers(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _send_error(self, error: ApiError) -> None:
        """An error as the answer, or as a stream's last event where the answer has begun."""
        try:
            if getattr(self, "_begun", False):
                self.wfile.write(f"data: {json.dumps(error.body())}\n\n".encode())
                return
            self._headers_buffer: list[bytes] = []  # what mlx-lm's handler may have begun
            self.requestline = getattr(self, "requestline", "")
            self._send_json(error.status, error.body(), **({"Retry_After": "1"} if error.status == 429 else {}))
        except OSError:
            self.close_connection = True


def _without_port(host: str) -> str:
    name, _, port = host.rpartition(":")
    return (name if port.isdigit() else host).lower()
