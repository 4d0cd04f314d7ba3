"""``rodimus-mlx serve`` as a process: its start, its refusals, its end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest
from helpers import TINY_FOLDER
from rodimus_mlx.cli.app import main

import rodimus_mlx

TINY = str(TINY_FOLDER)
SECONDS = 60  # after which a test has failed


class Process:
    """A server on a free port."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        command = [sys.executable, "-m", "rodimus_mlx.cli.app", "serve", "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
        assert self.process.stderr is not None
        self.said = ""
        while not (found := re.search(r"Serving (\S+) at http://127.0.0.1:(\d+)/ \(Ctrl-C ends\)", self.said)):
            line = self.process.stderr.readline()
            assert line, self.said
            self.said += line
        self.name, self.port = found[1], int(found[2])

    def request(self, method: str, path: str, body: object = None, key: str | None = None) -> HTTPResponse:
        self.connection = HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.connection.request(method, path, None if body is None else json.dumps(body), headers)
        return self.connection.getresponse()

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Status and what it said since its start."""
        assert self.process.stderr is not None
        self.process.send_signal(number)
        rest = self.process.stderr.read()
        return self.process.wait(SECONDS), rest


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RODIMUS_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def server(home: Path) -> Iterator[Process]:
    main(["state", "make", "text", "--system", "once upon", "--chat", "--model", TINY])
    process = Process("--model", TINY, "--state", "text", "--name", "mine", RODIMUS_API_KEY="sesame")
    yield process
    process.process.kill()
    process.process.wait()
    assert process.process.stderr is not None
    process.process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_life(server: Process, number: int) -> None:
    assert server.request("GET", "/v1/models").status == 401
    models = json.loads(server.request("GET", "/v1/models", key="sesame").read())
    assert [model["id"] for model in models["data"]] == [server.name] == ["mine"]
    answer = json.loads(server.request("POST", "/v1/completions", {"prompt": "x", "max_tokens": 9}, "sesame").read())
    text = rodimus_mlx.generate(*rodimus_mlx.load(TINY_FOLDER), "<role>SYSTEM</role>once uponx", max_tokens=9)
    assert answer["choices"][0]["text"] == text

    body = {"prompt": "x", "max_tokens": 200, "stream": True}
    running = server.request("POST", "/v1/completions", body, "sesame")
    rest: list[bytes] = []
    reader = threading.Thread(target=lambda: rest.append(running.read()))
    reader.start()
    assert server.end(number) == (0, "")
    reader.join()
    assert rest[0].endswith(b"data: [DONE]\n\n")


def test_a_second_signal_does_not_wait(server: Process) -> None:
    body = {"prompt": "x", "max_tokens": 30000, "stream": True}
    running = server.request("POST", "/v1/completions", body, "sesame")
    assert running.read(10)
    server.process.send_signal(signal.SIGINT)
    while True:
        try:
            server.request("GET", "/health")
        except OSError:  # the first has arrived
            break
    assert server.end(signal.SIGINT)[0] == 0
    assert b"[DONE]" not in running.read()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--state", "absent"], "there is no state absent: rodimus-mlx state list shows them"),
        (["--host", "256.0.0.1"], "cannot listen at 256.0.0.1 port 8080: "),
        (["--api-key", "é"], "the API key must be of ASCII letters, digits and signs"),
        (["--model", "./absent"], "there is no folder ./absent"),
    ],
    ids=" ".join,
)
def test_refused(home: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model", TINY, *arguments]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"Error: {message}")


def test_others_can_reach_it_without_a_key(home: Path) -> None:
    command = [sys.executable, "-m", "rodimus_mlx.cli.app", "serve", "--port", "0", "--host", "0.0.0.0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = [process.stderr.readline() for _ in range(3)]
        process.terminate()
    assert said[0].startswith("No --model given: the bundled ")
    assert said[1] == "Warning: anyone who reaches 0.0.0.0 may use this server: give --api-key\n"
    assert said[2].startswith("Serving demo at http://0.0.0.0:")
