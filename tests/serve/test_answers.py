"""The server answers as the model alone does: in batches, from states, after what it has read before."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from api_client import LIMITS, Client
from talker import talker

from rodimus_mlx.fim import fim_prompt
from rodimus_mlx.generation import generate, render_conversation
from rodimus_mlx.states import save_state
from rodimus_mlx.states.make import make_state
from rodimus_mlx.states.sources import Source
from rodimus_mlx.states.store import delete_state, state_path

COUNT = 8


def alone(prompt: Any, count: int = COUNT, **options: Any) -> str:
    return generate(*talker(), prompt, max_tokens=count, **options)


def tokens_of(messages: list[dict[str, str]]) -> int:
    return len(talker()[1].encode(render_conversation(talker()[1], messages)))


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


class TestCompletions:
    def test_text(self, client: Client) -> None:
        assert client.complete("one two") == alone("one two")

    def test_tokens(self, client: Client) -> None:
        tokens = talker()[1].encode("one two")
        assert client.complete(tokens) == client.complete([tokens]) == alone("one two")

    def test_chat(self, client: Client) -> None:
        messages = [{"role": "developer", "content": "s"}, *user("one"), {"role": "assistant", "content": None}]
        messages += [{"role": "user", "content": [{"type": "text", "text": "t"}, {"type": "text", "text": "wo"}]}]
        answer = client.chat(messages)
        text = "<role>SYSTEM</role>s<role>HUMAN</role>one<role>ASSISTANT</role>"
        text += "<role>HUMAN</role>two<role>ASSISTANT</role>"
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": alone(text)}
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["model"] == "talker"
        assert answer["usage"]["prompt_tokens"] == len(talker()[1].encode(text))
        assert answer["usage"]["completion_tokens"] == COUNT

    @pytest.mark.parametrize("prompt", ["one", "", "<|fim_hole|>"])
    def test_fills_in_the_middle(self, client: Client, prompt: str) -> None:
        expected = alone(fim_prompt(talker()[1], prompt, "two"))
        assert client.complete(prompt, suffix="two") == expected
        events = client.stream("/v1/completions", {"prompt": prompt, "suffix": "two", "max_tokens": COUNT})
        assert "".join(event["choices"][0]["text"] for event in events) == expected

    def test_an_empty_suffix_is_none(self, client: Client) -> None:
        assert client.complete("one", suffix="") == alone("one")
        assert client.complete([64, 65], suffix="") == alone([64, 65])

    def test_streams(self, client: Client) -> None:
        body = {"messages": user("one"), "max_tokens": COUNT, "stream_options": {"include_usage": True}}
        *events, usage = client.stream("/v1/chat/completions", body)
        deltas = [event["choices"][0]["delta"].get("content", "") for event in events]
        assert "".join(deltas) == alone(user("one"))
        assert len(events) >= COUNT
        assert usage["usage"]["completion_tokens"] == COUNT
        texts = client.stream("/v1/completions", {"prompt": "one", "max_tokens": COUNT})
        assert "".join(event["choices"][0]["text"] for event in texts) == alone("one")

    @pytest.mark.parametrize("streaming", [False, True])
    def test_stop_strings_whatever_their_tokens(self, client: Client, streaming: bool) -> None:
        whole = alone("one", 30)
        stop = whole[11:14]
        body = {"prompt": "one", "max_tokens": 30, "stop": [stop, "never"]}
        if streaming:
            events = client.stream("/v1/completions", body)
            text = "".join(event["choices"][0]["text"] for event in events)
            reason = events[-1]["choices"][0]["finish_reason"]
        else:
            choice = client.post("/v1/completions", body)[1]["choices"][0]
            text, reason = choice["text"], choice["finish_reason"]
        assert (text, reason) == (whole[: whole.index(stop)], "stop")

    def test_what_only_begins_a_stop_string_is_shown(self, client: Client) -> None:
        whole = alone("one", 12)
        assert client.complete("one", max_tokens=12, stop=whole[-2:] + "!") == whole

    def test_sampling(self, client: Client) -> None:
        seeded = {client.complete("one", temperature=2, seed=5, max_tokens=20) for _ in range(2)}
        free = {client.complete("one", temperature=2, max_tokens=20) for _ in range(3)}
        assert len(seeded) == 1
        assert len(free) == 3

    def test_edges_of_the_ranges(self, client: Client) -> None:
        for fields in ({"top_k": 262}, {"top_k": 10**30}, {"seed": -1}, {"xtc_probability": 1}, {"logit_bias": {}}):
            assert client.complete("one", temperature=1.0, **fields) != ""
        assert client.complete("one", logit_bias={"64": 100}) == "a" * COUNT
        assert client.complete("one", repetition_penalty=1.3, max_tokens=3) != ""
        assert client.complete("one", stop=[], user="me", metadata=None, n=1) == alone("one")

    def test_log_probabilities(self, client: Client) -> None:
        body = {"prompt": "one", "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
        content = client.post("/v1/completions", body)[1]["choices"][0]["logprobs"]["content"]
        assert len(content) == 3
        assert all(each["top_logprobs"][0]["logprob"] <= 0 for each in content)


class TestTogether:
    def test_batches_answer_as_alone(self, client: Client) -> None:
        prompts = [f"{'word ' * (i % 5)}number {i}" for i in range(24)]
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda i: client.complete(prompts[i], max_tokens=5 + i), range(24)))
        assert answers == [alone(prompt, 5 + i) for i, prompt in enumerate(prompts)]

    def test_seeds_and_batches_take_turns(self, client: Client) -> None:
        def ask(i: int) -> str:
            return client.complete(f"n {i}", **({"temperature": 1.0, "seed": 1} if i % 3 == 0 else {}))

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(12)))
        assert all(answers[i] == alone(f"n {i}") for i in range(12) if i % 3)


class TestWhatWasReadBefore:
    def test_turns_are_not_read_again(self, client: Client) -> None:
        messages = [{"role": "system", "content": "reuse " * 20}, *user("one")]
        first = client.chat(messages)
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        messages += [first["choices"][0]["message"], *user("two")]
        second = client.chat(messages)
        shared = tokens_of(messages[:2]) + COUNT
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == shared
        assert second["choices"][0]["message"]["content"] == alone(messages)
        other = [messages[0], *user("else")]
        assert client.chat(other)["usage"]["prompt_tokens_details"]["cached_tokens"] > 120
        assert client.chat(other)["choices"][0]["message"]["content"] == alone(other)

    def test_a_changed_last_question(self, client: Client) -> None:
        messages = [*user("first"), {"role": "assistant", "content": "yes"}, *user("second")]
        client.chat(messages)
        messages[-1] = user("another")[0]
        answer = client.chat(messages)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 30
        assert answer["choices"][0]["message"]["content"] == alone(messages)

    def test_a_prompt_that_is_a_whole_earlier_answer(self, client: Client) -> None:
        text = client.complete("exactly")
        assert client.complete("exactly" + text) == alone("exactly", 2 * COUNT)[COUNT:]
        assert client.complete("exactly") == text


class TestStates:
    def save(self, name: str, source: Source, **options: Any) -> None:
        model, tokenizer = talker()
        save_state(state_path(name), model, make_state(model, tokenizer, source, **options))

    def test_requests_go_on_from_them(self, client: Client, home: Path) -> None:
        self.save("kind", Source(), system="be kind")
        self.save("text", Source("once upon "))
        persona = [{"role": "system", "content": "be kind"}]
        for _ in range(2):  # the second time partly from what was kept of the first
            answer = client.chat(user("one"), state="kind")
            assert answer["choices"][0]["message"]["content"] == alone(persona + user("one"))
            assert answer["usage"]["prompt_tokens"] == tokens_of(user("one"))
            assert client.complete("a time", state="text") == alone("once upon a time")
            assert client.complete("a time") == alone("a time")
            assert client.complete("a time", state="kind") == alone("<role>SYSTEM</role>be kinda time")
        details = client.chat(user("one"), state="kind")["usage"]["prompt_tokens_details"]
        assert 0 < details["cached_tokens"] < answer["usage"]["prompt_tokens"]

    def test_penalties_do_not_see_them(self, client: Client, home: Path) -> None:
        self.save("text", Source("once upon "))
        assert client.complete("a", state="text", repetition_penalty=1.5, logit_bias={"64": 1}) != ""

    def test_with_seeds(self, client: Client, home: Path) -> None:
        self.save("text", Source("once upon "))
        found = [client.complete("a", state=state, temperature=1.0, seed=3) for state in ("text", "text", "")]
        assert found[0] == found[1] != found[2]

    def test_a_replaced_state_is_read_anew(self, client: Client, home: Path) -> None:
        for text in ("first ", "second "):
            self.save("changing", Source(text))
            assert client.complete("x", state="changing") == alone(text + "x")
        delete_state("changing")
        status, answer = client.post("/v1/completions", {"prompt": "x", "state": "changing"})
        assert (status, answer["error"]["code"]) == (404, "state_not_found")

    def test_many_states(self, client: Client, home: Path) -> None:
        for i in range(12):
            self.save(f"s{i}", Source(f"number {i} "))
        for i in [*range(12), *range(12)]:
            assert client.complete("x", state=f"s{i}") == alone(f"number {i} x")

    def test_by_default(self, serve: Any, home: Path) -> None:
        self.save("text", Source("once upon "))
        client = serve(default_state="text")
        assert client.complete("a time") == alone("once upon a time")
        assert client.complete("a time", state="") == alone("a time")

    def test_another_models(self, client: Client, home: Path) -> None:
        model, tokenizer = talker("rodimus")
        save_state(state_path("other"), model, make_state(model, tokenizer, Source("x")))
        status, answer = client.post("/v1/completions", {"prompt": "x", "state": "other"})
        assert status == 400
        assert answer["error"]["message"].startswith("the state other belongs to another model: its architecture is")
        self.save("ours", Source("x", name="a book"))
        listed = client.get("/v1/states")[1]["data"]
        assert listed == [{"id": "ours", "object": "state", "tokens": 1, "source": "a book"}]


def test_kept_prompts_stay_within_their_memory(serve: Any) -> None:
    client = serve(limits=replace(LIMITS, cache_bytes=200_000))
    for i in range(30):
        client.complete(f"{i} and more")
    gc.collect()
    assert 0 < client.server.generator.prompt_cache.nbytes <= 200_000
