"""What the server refuses, how, and that it goes on afterwards."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from api_client import LIMITS, Client

from rodimus_mlx.errors import RodimusError
from rodimus_mlx.serve.handler import Handler
from rodimus_mlx.serve.server import Server

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


def refusal(status: int, answer: Any) -> tuple[int, str, Any]:
    """Status, message and parameter of an OpenAI-style error, which it must be."""
    assert set(answer) == {"error"}
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"]
    return status, error["message"], error["param"]


BAD_FIELDS: list[tuple[str, dict[str, Any], str]] = [
    (TEXT, {}, "prompt must be one text, or a list of token ids"),
    (TEXT, {"prompt": ""}, "the prompt is empty: there is nothing to continue"),
    (TEXT, {"prompt": ["a", "b"]}, "prompt must be one text"),
    (TEXT, {"prompt": [True]}, "prompt must be one text"),
    (TEXT, {"prompt": [1, 262]}, "the prompt has token 262, but the model's vocab_size is 262"),
    (TEXT, {"prompt": [-1]}, "the prompt has token -1"),
    (TEXT, {"prompt": "\ud800"}, "the prompt is not valid UTF-8 text"),
    (TEXT, {"prompt": "x" * 2001}, "the prompt has 2001 tokens, and at most 2000 are allowed"),
    (TEXT, {"prompt": "x", "suffix": 7}, "suffix must be a text"),
    (TEXT, {"prompt": "x", "suffix": "\ud800"}, "the prompt is not valid UTF-8 text"),
    (TEXT, {"prompt": [1, 2], "suffix": "x"}, "with a suffix, prompt must be a text"),
    (CHAT, {"messages": HI, "suffix": "x"}, "suffix goes with a prompt, not with messages"),
    (CHAT, {}, "messages must be a list with at least one message"),
    (CHAT, {"messages": []}, "messages must be a list with at least one message"),
    (CHAT, {"messages": "hi"}, "messages must be a list"),
    (CHAT, {"messages": [1]}, "messages[0] must be an object with a role"),
    (CHAT, {"messages": [*HI, {"role": "user", "content": 7}]}, "messages[1]: content must be text"),
    (
        CHAT,
        {"messages": [{"role": "judge", "content": "x"}]},
        "the chat template cannot write this",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}]},
        "messages[0]: only text content is supported",
    ),
    (TEXT, {"prompt": "x", "max_tokens": 0}, "max_tokens must be at least 1"),
    (TEXT, {"prompt": "x", "max_tokens": 5001}, "max_tokens must be at most 5000"),
    (TEXT, {"prompt": "x", "max_tokens": 10**40}, "max_tokens must be at most 5000"),
    (TEXT, {"prompt": "x", "max_tokens": 1.5}, "max_tokens must be of type int"),
    (TEXT, {"prompt": "x", "max_tokens": True}, "max_tokens must not be a boolean"),
    (TEXT, {"prompt": "x", "temperature": -1}, "temperature must be at least 0"),
    (TEXT, {"prompt": "x", "temperature": 101}, "temperature must be at most 100"),
    (TEXT, {"prompt": "x", "presence_penalty": 2**63}, "presence_penalty must be at most 100"),
    (TEXT, {"prompt": "x", "frequency_penalty": -1e300}, "frequency_penalty must be at least -100"),
    (TEXT, {"prompt": "x", "temperature": "hot"}, "temperature must be of type"),
    (TEXT, {"prompt": "x", "top_p": 2}, "top_p must be at most 1"),
    (TEXT, {"prompt": "x", "logit_bias": {"262": 1}}, "logit_bias: there is no token 262"),
    (TEXT, {"prompt": "x", "logit_bias": {"-1": 1}}, "logit_bias: there is no token -1"),
    (TEXT, {"prompt": "x", "logit_bias": {"9" * 5000: 1}}, "logit_bias: there is no token 999"),
    (TEXT, {"prompt": "x", "logit_bias": {"0" * 20 + "999999": 1}}, "logit_bias: there is no token 000"),
    (TEXT, {"prompt": "x", "logit_bias": {"1": 1000}}, "logit_bias: values must be from -100 to 100"),
    (TEXT, {"prompt": "x", "logit_bias": [1]}, "logit_bias must be an object"),
    (TEXT, {"prompt": "x", "stream": "yes"}, "stream must be of type bool"),
    (TEXT, {"prompt": "x", "stream_options": 1}, "stream_options must be an object"),
    (TEXT, {"prompt": "x", "stop": [1]}, "stop must be a text or a list of texts"),
    (TEXT, {"prompt": "x", "stop": ["y"] * 17}, "stop may have at most 16 texts"),
    (TEXT, {"prompt": "x", "seed": "1"}, "seed must be of type int"),
    (TEXT, {"prompt": "x", "state": 3}, "state must be the name of a state"),
    (TEXT, {"prompt": "x", "top_logprobs": 50}, "top_logprobs must be at most 11"),
    (TEXT, {"prompt": "x", "n": 2}, "n is not supported"),
    (TEXT, {"prompt": "x", "adapters": "/etc"}, "adapters is not supported"),
    (TEXT, {"prompt": "x", "draft_model": "a/b"}, "draft_model is not supported"),
    (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, "tools is not supported"),
    (CHAT, {"messages": HI, "response_format": {"type": "json_object"}}, "response_format is not supported"),
    (CHAT, {"messages": HI, "chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs is not supported"),
]


class TestFields:
    @pytest.mark.parametrize(("path", "body", "message"), BAD_FIELDS, ids=[bad[2][:45] for bad in BAD_FIELDS])
    def test_named(self, client: Client, path: str, body: dict[str, Any], message: str) -> None:
        status, found, _ = refusal(*client.post(path, body))
        assert status == 400
        assert found.startswith(message)

    def test_the_parameter_and_code(self, client: Client) -> None:
        assert refusal(*client.post(TEXT, {"prompt": "x", "top_p": 2}))[2] == "top_p"
        error = client.post(CHAT, {"messages": [{"role": "user", "content": "x" * 3000}]})[1]["error"]
        assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")

    @pytest.mark.parametrize("name", ["gpt-4", "/etc", "owner/name", "", 3, ["x"]], ids=repr)
    def test_other_models(self, client: Client, name: Any) -> None:
        status, answer = client.post(TEXT, {"prompt": "x", "model": name})
        assert (status, answer["error"]["code"]) == (404, "model_not_found")

    @pytest.mark.parametrize("name", ["absent", "../../etc/passwd", "/etc", "a\0b", "x" * 3000], ids=lambda n: n[:9])
    def test_other_states(self, client: Client, name: str) -> None:
        status, answer = client.post(TEXT, {"prompt": "x", "state": name})
        assert (status, answer["error"]["code"]) == (404, "state_not_found")

    @pytest.mark.parametrize(
        ("raw", "message"),
        [
            (b"{", "the request is not valid JSON"),
            (b"\xff", "the request is not valid JSON"),
            (b"[]", "the request must be a JSON object"),
            (b"[" * 20000, "the request's JSON is nested too deeply"),
            (b'{"prompt": "x", "temperature": NaN}', "the request is not valid JSON: NaN is no number in JSON"),
            (b'{"prompt": "x", "temperature": 1e999}', "temperature must be a finite number"),
        ],
        ids=["cut", "bytes", "list", "deep", "nan", "infinite"],
    )
    def test_not_json(self, client: Client, raw: bytes, message: str) -> None:
        status, found, _ = refusal(*client.post(TEXT, raw))
        assert status == 400
        assert found.startswith(message)


class TestHttp:
    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "/nothing", 404),
            ("GET", "/v1/completions", 404),
            ("GET", "/../../etc/passwd", 404),
            ("GET", "/page/index.html", 404),
            ("GET", "/v1/models/other", 404),
            ("POST", "/v1/embeddings", 404),
            ("DELETE", "/v1/models", 501),
            ("BREW", "/", 501),
        ],
    )
    def test_elsewhere(self, client: Client, method: str, path: str, status: int) -> None:
        connection, response = client.send(method, path, {} if method == "POST" else None)
        assert refusal(response.status, json.loads(response.read()))[0] == status
        connection.close()

    def test_a_body_that_is_too_large(self, client: Client) -> None:
        for size in (20_001, 3_000_000):
            status, message, _ = refusal(*client.post(TEXT, b"x" * size))
            assert (status, message) == (413, f"the request has {size} bytes, and at most 20000 are allowed")

    @pytest.mark.parametrize("length", ["-1", "x", "1e3", "99999999999999999999"])
    def test_odd_lengths(self, client: Client, length: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("rodimus_mlx.serve.handler._DRAINED", 0)
        answer = raw_request(client, f"POST {TEXT} HTTP/1.0\r\nContent-Length: {length}\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.0 4")
        refusal(400, json.loads(answer.partition(b"\r\n\r\n")[2]))

    @pytest.mark.parametrize(
        ("request_line", "status"),
        [
            (b"garbage\r\n\r\n", b"400"),
            (b"GET / HTTP/9.9.9\r\n\r\n", b"400"),
            (b"GET /" + b"x" * 70000 + b" HTTP/1.0\r\n\r\n", b"414"),
            (b"GET / HTTP/1.0\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"431"),
        ],
        ids=["garbage", "version", "long", "headers"],
    )
    def test_malformed(self, client: Client, request_line: bytes, status: bytes) -> None:
        answer = raw_request(client, request_line)
        head, _, body = answer.partition(b"\r\n\r\n")
        refusal(0, json.loads(body or head))
        assert not body or status in head.partition(b"\r\n")[0]

    def test_a_client_that_says_nothing_is_given_up(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Handler, "timeout", 0.2)
        assert raw_request(client, b"") == b""
        assert raw_request(client, f"POST {TEXT} HTTP/1.0\r\nContent-Length: 100\r\n\r\nhalf".encode()) == b""


def raw_request(client: Client, data: bytes) -> bytes:
    """What comes back for these bytes."""
    with socket.create_connection(client.server.server_address[:2], timeout=60) as connection:  # type: ignore[arg-type]
        connection.sendall(data)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


@pytest.fixture(scope="module")
def locked(serve: Callable[..., Client]) -> Client:
    return serve(api_key="sesame")


class TestAccess:
    @pytest.mark.parametrize("key", [None, "", "Bearer", "Bearer wrong", "Bearer sésame", "Basic sesame"])
    def test_without_the_key(self, locked: Client, key: str | None) -> None:
        headers = {} if key is None else {"Authorization": key}
        for answer in (
            locked.post(TEXT, {"prompt": "x"}, **headers),
            locked.post(CHAT, b"{", **headers),
            locked.get("/v1/models", **headers),
            locked.get("/v1/states", **headers),
        ):
            assert refusal(*answer)[:2] == (401, "the API key is missing or wrong")
            assert answer[1]["error"]["code"] == "invalid_api_key"

    def test_with_the_key(self, locked: Client) -> None:
        headers = {"Authorization": "Bearer sesame"}
        assert locked.get("/v1/models", **headers)[0] == 200
        assert locked.post(TEXT, {"prompt": "x", "max_tokens": 1}, **headers)[0] == 200

    def test_what_is_open(self, locked: Client) -> None:
        assert locked.get("/health") == (200, {"status": "ok"})
        assert locked.get("/")[0] == 200

    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ({"Origin": "http://evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Origin": "http://[evil"}, 403),
            ({"Host": "evil.example"}, 403),
            ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
            ({"Host": "localhost:1234"}, 200),
            ({"Host": "[::1]:80"}, 200),
            ({"Host": "localhost:1234", "Origin": "http://localhost:1234"}, 200),
        ],
        ids=str,
    )
    def test_pages_of_other_sites(
        self, client: Client, headers: dict[str, str], status: int, capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert client.get("/v1/models", **headers)[0] == status
        assert client.post(TEXT, {"prompt": "x", "max_tokens": 1}, **headers)[0] == status
        assert "Traceback" not in capfd.readouterr().err

    def test_sites_that_are_allowed(self, serve: Callable[..., Client]) -> None:
        site = "http://friend.example"
        client = serve(allowed_origins=[site])
        connection, response = client.send("POST", TEXT, {"prompt": "x", "max_tokens": 1}, {"Origin": site})
        assert (response.status, response.getheader("Access-Control-Allow-Origin")) == (200, site)
        connection.close()
        assert client.get("/v1/models", Origin="http://evil.example")[0] == 403


class TestLoad:
    def test_too_many_at_once(self, serve: Callable[..., Client]) -> None:
        client = serve(limits=replace(LIMITS, requests=2))
        held = [client.send("POST", TEXT, {"prompt": "x", "max_tokens": 5000, "stream": True}) for _ in range(2)]
        assert all(response.status == 200 for _, response in held)
        connection, response = client.send("POST", TEXT, {"prompt": "x"})
        assert response.getheader("Retry-After") == "1"
        assert refusal(response.status, json.loads(response.read()))[0] == 429
        connection.close()
        assert client.get("/health")[0] == 200
        for connection, response in held:
            response.close()
            connection.close()
        until(lambda: client.server.running == 0)
        assert client.complete("x") != ""

    @pytest.mark.parametrize("streaming", [True, False])
    def test_who_leaves_frees_the_place(self, serve: Callable[..., Client], streaming: bool) -> None:
        client = serve()
        with socket.create_connection(client.server.server_address[:2]) as connection:  # type: ignore[arg-type]
            body = json.dumps({"prompt": "x", "max_tokens": 5000, "stream": streaming}).encode()
            connection.sendall(f"POST {TEXT} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: client.server.running == 1)
        until(lambda: client.server.running == 0)
        assert client.complete("x") != ""

    def test_a_failure_over_a_prompt_is_an_answer(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise KeyError("x")

        monkeypatch.setattr("rodimus_mlx.serve.generator.encode_prompt", fail)
        assert refusal(*client.post(TEXT, {"prompt": "x"}))[:2] == (
            500,
            "the server failed at this prompt; its log says more",
        )
        monkeypatch.undo()
        assert client.complete("x") != ""

    def test_a_failure_inside_is_an_answer(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr("rodimus_mlx.serve.handler.check_body", fail)
        assert refusal(*client.post(TEXT, {"prompt": "x"}))[0] == 500


class TestEnd:
    def test_what_runs_is_finished(self, serve: Callable[..., Client]) -> None:
        client = serve()
        connection, response = client.send("POST", TEXT, {"prompt": "x", "max_tokens": 300, "stream": True})
        client.server.end(60)
        assert response.read().decode().endswith("data: [DONE]\n\n")
        connection.close()
        with pytest.raises(ConnectionRefusedError):
            client.get("/health")

    def test_without_patience(self, serve: Callable[..., Client]) -> None:
        client = serve()
        connection, response = client.send("POST", TEXT, {"prompt": "x", "max_tokens": 5000, "stream": True})
        client.server.end(0)
        *_, last, end = response.read().decode().split("\n\n")
        assert end == ""
        assert refusal(0, json.loads(last.removeprefix("data: ")))[1].startswith("the server")
        connection.close()

    def test_an_address_that_is_taken(self, client: Client) -> None:
        from talker import talker

        with pytest.raises(RodimusError, match=r"cannot listen at 127.0.0.1 port \d+: Address already in use"):
            Server(*talker(), model_name="x", port=client.server.server_address[1])


def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come to pass, but not for ever."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)
