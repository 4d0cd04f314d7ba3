"""Requests to a server of the tests, without any client library."""

from __future__ import annotations

import json
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from typing import Any

from rodimus_mlx.serve.server import Limits, Server

LIMITS = Limits(requests=16, body_bytes=20_000, prompt_tokens=2000, new_tokens=5000)


@dataclass
class Client:
    """Requests to a server, without any client library."""

    server: Server

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[HTTPConnection, HTTPResponse]:
        """A request whose answer is still to be read."""
        connection = HTTPConnection(*self.server.server_address[:2], timeout=60)  # type: ignore[arg-type]
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        connection.request(method, path, body, headers or {})
        return connection, connection.getresponse()

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        return self._finish(*self.send("GET", path, headers=headers))

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        return self._finish(*self.send("POST", path, body, headers))

    def complete(self, prompt: Any, **fields: Any) -> str:
        status, answer = self.post("/v1/completions", {"prompt": prompt, "max_tokens": 8, **fields})
        assert status == 200, answer
        return answer["choices"][0]["text"]

    def chat(self, messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        body = {"messages": messages, "max_tokens": 8, **fields}
        status, answer = self.post("/v1/chat/completions", body)
        assert status == 200, answer
        return answer

    def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a streamed answer, up to [DONE]."""
        connection, response = self.send("POST", path, {**body, "stream": True})
        assert response.status == 200, response.read()
        assert response.getheader("Content-Type") == "text/event-stream"
        lines = [line[6:] for line in response.read().decode().splitlines() if line.startswith("data: ")]
        connection.close()
        assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]

    def _finish(self, connection: HTTPConnection, response: HTTPResponse) -> tuple[int, Any]:
        data = response.read()
        connection.close()
        kind = response.getheader("Content-Type", "")
        return response.status, json.loads(data) if kind == "application/json" else data.decode()
