"""The page at ``/``, in a headless browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from api_client import Client
from browser import Browser, find_browser
from talker import talker

from rodimus_mlx.generation import generate
from rodimus_mlx.serve.handler import PAGE
from rodimus_mlx.states import save_state
from rodimus_mlx.states.make import make_state
from rodimus_mlx.states.sources import Source
from rodimus_mlx.states.store import state_path

COUNT = 8
needs_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")

ARTICLES = "[...document.querySelectorAll('article')].map(a => [a.className, a.textContent])"
IDLE = "!running && document.getElementById('send').textContent === 'Send'"


def alone(*messages: tuple[str, str]) -> str:
    return generate(*talker(), [{"role": role, "content": text} for role, text in messages], max_tokens=COUNT)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


def put(browser: Browser, field: str, value: Any) -> None:
    browser.value(f"at('{field}').value = '{value}'; at('{field}').dispatchEvent(new Event('change'))")


def ask(browser: Browser, text: str) -> None:
    browser.value("at('question').focus()")
    browser.type(text + "\n")
    browser.until(f"{IDLE} && {ARTICLES}.length > 0")


@needs_browser
def test_a_conversation(browser: Browser, client: Client, home: Path) -> None:
    model, tokenizer = talker()
    save_state(state_path("kind"), model, make_state(model, tokenizer, Source(), system="be kind"))
    browser.open(client.server.url)
    browser.until("at('model').textContent === 'talker'")
    put(browser, "temperature", 0)
    put(browser, "max-tokens", COUNT)

    ask(browser, "one")
    one = alone(("user", "one"))
    assert browser.value(ARTICLES) == [["user", "one"], ["assistant", one]]
    ask(browser, "two")
    two = alone(("user", "one"), ("assistant", one), ("user", "two"))
    assert browser.value(ARTICLES)[2:] == [["user", "two"], ["assistant", two]]

    browser.value("[...document.querySelectorAll('.tools button')].find(b => b.textContent === 'Retry').click()")
    browser.until(f"{IDLE} && {ARTICLES}.length === 4")
    assert browser.value(ARTICLES)[3] == ["assistant", two]
    browser.value("[...document.querySelectorAll('.tools button')].find(b => b.textContent === 'Edit').click()")
    assert browser.value("at('question').value") == "two"
    assert browser.value(f"{ARTICLES}.length") == 2

    browser.open(client.server.url + "?again")  # the conversation is kept by the browser
    assert browser.value(ARTICLES) == [["user", "one"], ["assistant", one]]
    browser.value("at('new').click()")
    assert browser.value(ARTICLES) == []

    browser.until("at('state').options.length === 2")
    put(browser, "state", "kind")
    ask(browser, "one")
    assert browser.value(ARTICLES)[1] == ["assistant", alone(("system", "be kind"), ("user", "one"))]
    put(browser, "state", "")
    put(browser, "system", "be brief")
    browser.value("at('new').click()")
    ask(browser, "one")
    assert browser.value(ARTICLES)[1] == ["assistant", alone(("system", "be brief"), ("user", "one"))]

    assert browser.complaints == []
    assert {urlsplit(url).netloc for url in browser.requests if not url.startswith("data:")} == {
        urlsplit(client.server.url).netloc
    }


@needs_browser
def test_stopping(browser: Browser, client: Client) -> None:
    browser.open(client.server.url)
    put(browser, "temperature", 0)
    put(browser, "max-tokens", 5000)
    browser.value("at('question').focus()")
    browser.type("one\n")
    browser.until(f"{ARTICLES}.length === 2 && {ARTICLES}[1][1].length > 5")
    assert browser.value("at('send').textContent") == "Stop"
    browser.value("at('send').click()")
    browser.until(IDLE)
    begun = browser.value(ARTICLES)[1][1]
    whole = generate(*talker(), [{"role": "user", "content": "one"}], max_tokens=len(begun))
    assert begun == whole
    assert browser.value("at('error').hidden")


@needs_browser
def test_a_key_and_errors(browser: Browser, serve: Callable[..., Client]) -> None:
    browser.open(serve(api_key="sesame").server.url)
    browser.until("at('error').textContent === 'the API key is missing or wrong'")
    put(browser, "key", "sesame")
    browser.until("at('model').textContent === 'talker' && at('error').hidden")
    put(browser, "max-tokens", 0)
    ask_and_fail = "at('question').value = 'one'; at('ask').requestSubmit()"
    browser.value(ask_and_fail)
    browser.until(f"{IDLE} && at('error').textContent === 'max_tokens must be at least 1'")
    assert browser.value("at('question').value") == "one"
    assert browser.value(ARTICLES) == []


@needs_browser
def test_what_a_model_writes_is_only_text(browser: Browser, client: Client) -> None:
    browser.open(client.server.url)
    text = "<b>x</b><script>alert(1)</script>\\n```html\\n<img src=x onerror=alert(1)>\\n```\\nend"
    browser.value(f"messages = [{{role: 'assistant', content: '{text}'}}]; show()")
    assert browser.value("document.querySelectorAll('main b, main script, main img').length") == 0
    assert browser.value("document.querySelector('main pre code').textContent") == "<img src=x onerror=alert(1)>\n"


def test_the_page_loads_nothing_from_elsewhere(client: Client) -> None:
    for name in ("", "page.js", "page.css"):
        status, text = client.get("/" + name)
        assert status == 200
        assert "http://" not in text and "https://" not in text and "//cdn" not in text
    connection, response = client.send("GET", "/")
    assert "default-src 'none'" in response.getheader("Content-Security-Policy", "")
    connection.close()


def test_every_file_of_the_page_is_served(client: Client) -> None:
    names = {path.name for path in PAGE.iterdir()}
    assert names == {"index.html", "page.js", "page.css"}
