"""Load on a server: many clients at once, some of them rude. Prints what came of it; ends with 1 if anything is wrong.

    python tests/load_server.py --clients 64 --seconds 120 [--model FOLDER]

Each client asks, over and over, one of: a streamed answer at temperature 0, which must be the model's own; the same
read slowly, or left half-way; a bad body, an oversize prompt, no key, each of which must get an OpenAI-style error
with the right status.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.client import HTTPConnection
from typing import Any

from helpers import TINY_FOLDER

KEY = "load"
CHAT = "/v1/chat/completions"
PROMPTS = [[{"role": "user", "content": f"{'long ' * (17 * i % 60)}question {i}"}] for i in range(40)]
MOST = 1500  # prompt tokens that the server allows here
BAD_BODIES: list[tuple[bytes, int]] = [
    (b"{", 400),
    (b"[]", 400),
    (b'{"messages": []}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"999999999": 1}}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "top_k": -1}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "model": "other"}', 404),
    (b'{"messages": [{"role": "user", "content": "x"}], "state": "../x"}', 404),
    (json.dumps({"messages": [{"role": "user", "content": "y" * 6000}]}).encode(), 400),
    (b"x" * 300_000, 413),
]


@dataclass
class Outcome:
    """What the clients saw."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    first_token_seconds: list[float] = field(default_factory=list)


class Client(threading.Thread):
    """One client, until the time is over."""

    def __init__(self, port: int, until: float, expected: list[str], tokens: int, seed: int) -> None:
        super().__init__()
        self.port, self.until, self.expected, self.most = port, until, expected, tokens
        self.random = random.Random(seed)
        self.outcome = Outcome()

    def run(self) -> None:
        while time.monotonic() < self.until:
            kind = self.random.choices(["whole", "slow", "left", "bad", "no key"], [50, 5, 20, 15, 10])[0]
            try:
                {"whole": self.whole, "slow": self.slow, "left": self.left, "bad": self.bad, "no key": self.no_key}[
                    kind
                ]()
                self.outcome.counts[kind] += 1
            except Exception as error:
                self.outcome.wrong.append(f"{kind}: {type(error).__name__} {error}")

    def send(self, body: bytes, key: str | None = KEY) -> tuple[HTTPConnection, Any]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        connection.request("POST", CHAT, body, headers)
        return connection, connection.getresponse()

    def ask(self) -> tuple[int, HTTPConnection, Any]:
        number = self.random.randrange(len(PROMPTS))
        body = {"messages": PROMPTS[number], "stream": True, "temperature": 0, "max_tokens": self.most}
        connection, response = self.send(json.dumps(body).encode())
        if response.status == 429:
            check_error(response, 429)
            raise RuntimeError("refused as too many, though so many are allowed")
        assert response.status == 200, response.read()
        return number, connection, response

    def whole(self, pause: float = 0.0) -> None:
        begin = time.monotonic()
        number, connection, response = self.ask()
        text, done = "", False
        for line in response:
            if line.startswith(b"data: [DONE]"):
                done = True
            elif line.startswith(b"data: "):
                piece = json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                if piece and not text:
                    self.outcome.first_token_seconds.append(time.monotonic() - begin)
                text += piece
                time.sleep(pause)
        connection.close()
        self.outcome.tokens += self.most
        if not done or text != self.expected[number]:
            self.outcome.wrong.append(f"prompt {number}: {text!r} rather than {self.expected[number]!r}, done: {done}")

    def slow(self) -> None:
        self.whole(pause=0.05)

    def left(self) -> None:
        _, connection, response = self.ask()
        for _ in range(self.random.randrange(12)):
            response.readline()
        connection.close()

    def bad(self) -> None:
        body, status = self.random.choice(BAD_BODIES)
        connection, response = self.send(body)
        check_error(response, status)
        connection.close()

    def no_key(self) -> None:
        connection, response = self.send(b"{}", key=self.random.choice([None, "wrong"]))
        check_error(response, 401)
        connection.close()


def check_error(response: Any, status: int) -> None:
    """An OpenAI-style error of this status."""
    answer = json.loads(response.read())
    assert response.status == status, f"{response.status} rather than {status}: {answer}"
    assert set(answer["error"]) == {"message", "type", "param", "code"}, answer


class Memory(threading.Thread):
    """Looks at a process' memory twice a second, in bytes."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.samples, self.ended = pid, list[int](), threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.5):
            self.samples.append(resident(self.pid))


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    text = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True).stdout
    return int(text) * 1024


def load(model: str, clients: int, seconds: float, tokens: int = 24) -> dict[str, Any]:
    """Start a server, put the load on it, end it; returns the figures."""
    import rodimus_mlx

    loaded = rodimus_mlx.load(model)
    expected = [rodimus_mlx.generate(*loaded, prompt, max_tokens=tokens) for prompt in PROMPTS]
    options = [
        "--port",
        "0",
        "--api-key",
        KEY,
        "--max-requests",
        str(2 * clients),
        "--max-prompt",
        str(MOST),
    ]  # who left counts until that is noticed
    options += ["--max-body", "0.2", "--cache", "0.02", "--model", model]
    command = [sys.executable, "-m", "rodimus_mlx.cli.app", "serve", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        log: list[str] = []
        while not (found := re.search(r"http://[^:]+:(\d+)/", line := server.stderr.readline())):
            assert line, "the server did not start"
        threading.Thread(target=lambda: log.extend(server.stderr or ()), daemon=True).start()
        memory = Memory(server.pid)
        memory.start()
        until = time.monotonic() + seconds
        threads = [Client(int(found[1]), until, expected, tokens, seed) for seed in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        memory.ended.set()
        alive = server.poll() is None
        time.sleep(1)
        at_end = resident(server.pid) if alive else 0
        server.terminate()
        status = server.wait(60)
    outcomes = [thread.outcome for thread in threads]
    later = memory.samples[len(memory.samples) // 3 :]  # the first third of the time is for growing to the plateau
    first = sorted(second for each in outcomes for second in each.first_token_seconds) or [0.0]
    return {
        "requests": dict(sum((each.counts for each in outcomes), Counter())),
        "wrong": [line for each in outcomes for line in each.wrong],
        "tokens per second": round(sum(each.tokens for each in outcomes) / seconds, 1),
        "first token, median and 95%": [round(first[len(first) * q // 100], 3) for q in (50, 95)],
        "memory, MB": {
            "plateau": round(statistics.median(later) / 1e6, 1),
            "most": round(max(memory.samples) / 1e6, 1),
            "end": round(at_end / 1e6, 1),
        },
        "alive to the end": alive,
        "status": status,
        "log": log[:5],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_FOLDER))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--tokens", type=int, default=24)
    arguments = parser.parse_args()
    os.environ.pop("RODIMUS_API_KEY", None)
    figures = load(arguments.model, arguments.clients, arguments.seconds, arguments.tokens)
    for name, value in figures.items():
        print(f"{name}: {value if name != 'wrong' else f'{len(value)} {value[:5]}'}")
    memory = figures["memory, MB"]
    steady = abs(memory["end"] - memory["plateau"]) <= 0.05 * memory["plateau"]
    return int(bool(figures["wrong"]) or not figures["alive to the end"] or figures["status"] != 0 or not steady)


if __name__ == "__main__":
    sys.exit(main())
