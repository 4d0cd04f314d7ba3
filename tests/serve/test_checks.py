"""Whatever JSON comes: it is refused by name, or the server answers it and lives on."""

from __future__ import annotations

import json
from typing import Any

import pytest
from api_client import Client
from hypothesis import given, settings
from hypothesis import strategies as st

from rodimus_mlx.serve import checks
from rodimus_mlx.serve.checks import check_body, parse_body
from rodimus_mlx.serve.errors import ApiError

FIELDS = sorted(checks._PASSED | set(checks._UNSUPPORTED) | {"user"})
SHORT = {"max_tokens": 1}  # so that what is answered is answered soon

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8)
numbers = st.sampled_from([0, 1, -1, 0.5, 2, 261, 262, 1e-9, 1e300, 2**63, 2**64])
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
bodies = st.dictionaries(st.sampled_from(FIELDS), numbers | values, max_size=4)


@given(body=bodies | values, chat=st.booleans())
def test_checked_or_refused(body: Any, chat: bool) -> None:
    try:
        parsed = parse_body(json.dumps(body).encode())
        passed = check_body(parsed, chat=chat, names={"m"}, vocab_size=262, most_tokens=100)
    except ApiError as error:
        assert error.status in (400, 404)
        assert len(str(error)) < 400
        return
    assert set(passed) <= checks._PASSED
    assert passed.get("max_tokens", 1) <= 100
    assert ("messages" in passed) == chat


@settings(max_examples=80)
@given(body=bodies)
def test_the_server_lives_on(client: Client, body: dict[str, Any]) -> None:
    for path, always in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        status, answer = client.post(path, {**SHORT, **body, **always, "stream": False})
        assert status in (200, 400, 404), answer
        assert "choices" in answer or set(answer["error"]) == {"message", "type", "param", "code"}
    assert client.server.generator.is_healthy


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"nul", b'{"a": Infinity}', b'{"a": -Infinity}', b"{}{}", b'"x"', b"1"])
def test_not_an_object(raw: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_body(raw)
    assert caught.value.status == 400


def test_nulls_are_as_if_not_there() -> None:
    assert parse_body(b'{"a": null, "b": 0}') == {"b": 0}
