"""Servers in this process, on free ports, with a model whose answers depend on all that it has read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from api_client import LIMITS, Client
from talker import talker

from rodimus_mlx.serve.server import Server


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[..., Client]]:
    """Starts servers, which end with the tests."""
    started: list[Server] = []

    def serve(**options: Any) -> Client:
        server = Server(*talker(), model_name="talker", port=0, **{"limits": LIMITS, **options})
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        started.append(server)
        return Client(server)

    yield serve
    for server in started:
        server.end(0)


@pytest.fixture(scope="session")
def client(serve: Callable[..., Client]) -> Client:
    """A server with small limits and no key, for tests that leave it as it is."""
    return serve()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of its own for named states."""
    monkeypatch.setenv("RODIMUS_HOME", str(tmp_path))
    return tmp_path
