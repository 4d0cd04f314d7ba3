"""The official client, curl, and a short form of the load test."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from api_client import Client
from helpers import TINY_FOLDER
from load_server import load
from talker import talker

from rodimus_mlx.fim import fim_prompt
from rodimus_mlx.generation import generate

MESSAGES: list[dict[str, str]] = [{"role": "system", "content": "s"}, {"role": "user", "content": "one"}]
KEY = "sesame"


@pytest.fixture(scope="module")
def locked(serve: Callable[..., Client]) -> Client:
    return serve(api_key=KEY)


def alone(prompt: Any, count: int = 8) -> str:
    return generate(*talker(), prompt, max_tokens=count)


class TestOpenAI:
    @pytest.fixture
    def openai(self) -> Any:
        return pytest.importorskip("openai", reason="the openai package is not installed")

    @pytest.fixture
    def client(self, openai: Any, locked: Client) -> Any:
        with openai.OpenAI(base_url=f"{locked.server.url}v1", api_key=KEY, max_retries=0) as client:
            yield client

    def test_chat(self, client: Any) -> None:
        answer = client.chat.completions.create(model="talker", messages=MESSAGES, max_tokens=8, temperature=0)
        assert answer.choices[0].message.content == alone(MESSAGES)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 8

    def test_streamed_chat(self, client: Any) -> None:
        stream = client.chat.completions.create(
            model="talker",
            messages=MESSAGES,
            max_completion_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == alone(MESSAGES)
        assert chunks[-1].usage.completion_tokens == 8

    def test_completions(self, client: Any) -> None:
        options: dict[str, Any] = {"model": "talker", "prompt": "one", "max_tokens": 8, "stop": ["#"]}
        assert client.completions.create(**options).choices[0].text == alone("one")
        stream = client.completions.create(**options, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == alone("one")

    def test_a_suffix(self, client: Any) -> None:
        answer = client.completions.create(model="talker", prompt="one", suffix="two", max_tokens=8)
        assert answer.choices[0].text == alone(fim_prompt(talker()[1], "one", "two"))

    def test_models(self, client: Any) -> None:
        assert [model.id for model in client.models.list()] == ["talker"]
        assert client.models.retrieve("talker").owned_by == "local"

    def test_states(self, client: Any, openai: Any) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model="talker", prompt="x", extra_body={"state": "absent"})
        assert caught.value.code == "state_not_found"

    def test_errors_are_its_own(self, client: Any, openai: Any) -> None:
        for error, options in (
            (openai.BadRequestError, {"model": "talker", "temperature": -1}),
            (openai.NotFoundError, {"model": "other"}),
        ):
            with pytest.raises(error) as caught:
                client.chat.completions.create(messages=MESSAGES, **options)
            assert caught.value.type == "invalid_request_error"
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            client.with_options(api_key="wrong").models.list()


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
class TestCurl:
    def curl(self, url: str, *arguments: str) -> str:
        command = ["curl", "--silent", "--max-time", "60", *arguments, url]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=90).stdout

    def test_chat(self, locked: Client) -> None:
        body = json.dumps({"messages": MESSAGES, "max_tokens": 8})
        header = ["-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json"]
        answer = json.loads(self.curl(f"{locked.server.url}v1/chat/completions", *header, "-d", body))
        assert answer["choices"][0]["message"]["content"] == alone(MESSAGES)

    def test_stream(self, locked: Client) -> None:
        body = json.dumps({"prompt": "one", "max_tokens": 8, "stream": True})
        lines = self.curl(f"{locked.server.url}v1/completions", "-N", "-H", f"Authorization: Bearer {KEY}", "-d", body)
        events = [json.loads(line[6:]) for line in lines.splitlines() if line.startswith("data: {")]
        assert "".join(event["choices"][0]["text"] for event in events) == alone("one")
        assert lines.endswith("data: [DONE]\n\n")

    def test_refusals_are_read(self, locked: Client) -> None:
        status = ["--write-out", "\n%{http_code}", "--data-binary"]
        answer, _, code = self.curl(f"{locked.server.url}v1/completions", *status, "x" * 100_000).rpartition("\n")
        assert (json.loads(answer)["error"]["type"], code) == ("invalid_request_error", "413")
        answer, _, code = self.curl(f"{locked.server.url}v1/completions", *status, "{}").rpartition("\n")
        assert (json.loads(answer)["error"]["code"], code) == ("invalid_api_key", "401")


def test_a_little_load() -> None:
    figures = load(str(TINY_FOLDER), clients=6, seconds=4, tokens=12)
    assert figures["wrong"] == []
    assert figures["alive to the end"] and figures["status"] == 0 and figures["log"] == []
    assert figures["requests"]["whole"] > 0
