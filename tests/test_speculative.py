"""Speculative decoding gives the model's own text and distribution, whatever is guessed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import TINY_FOLDER, largest_difference, random_model, tiny_config
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors, make_sampler

import rodimus_mlx
from rodimus_mlx.errors import RodimusError
from rodimus_mlx.generation import stream_generate
from rodimus_mlx.speculative import DraftModel, PromptLookup, SpeculativeStats, load_draft_model, speculative_steps

LENGTH = 40  # several windows of the small models
MODELS = {
    "rodimus": tiny_config("rodimus"),
    "plus": tiny_config(),
    "full": tiny_config(attn_cfg={"window_size": None}),
}


class Oracle:
    """Knows the right text, and is wrong where it is told to be."""

    def __init__(self, text: list[int], wrong: Any) -> None:
        self.text, self.wrong = text, wrong

    def guess(self, tokens: Sequence[int], count: int, choose: Any) -> list[int]:
        guesses = self.text[len(tokens) : len(tokens) + count]
        return [(token + 1) % 61 if self.wrong(len(tokens) + i) else token for i, token in enumerate(guesses)]


def plain(model: Any, prompt: list[int], count: int = LENGTH, **options: Any) -> list[int]:
    return [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=count, **options)]


def guessed(model: Any, prompt: list[int], guesser: Any, count: int = LENGTH, **options: Any) -> list[int]:
    return [token for token, _, _ in speculative_steps(prompt, model, guesser, max_tokens=count, **options)]


def prompts(count: int, length: int = 13) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 61, length).tolist() for _ in range(count)]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return random_model(MODELS[request.param])


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return rodimus_mlx.load(TINY_FOLDER)


class TestGreedy:
    @pytest.mark.parametrize(
        "wrong",
        [lambda _: False, lambda _: True, lambda i: i % 3 == 0, lambda i: i % 7 in (0, 1), lambda i: i > 30],
        ids=["right", "wrong", "third", "two of seven", "late"],
    )
    @pytest.mark.parametrize("count", [1, 4, 7], ids="guess {}".format)
    def test_whatever_is_guessed(self, model: Any, wrong: Any, count: int) -> None:
        prompt = prompts(1)[0]
        expected = plain(model, prompt)
        assert guessed(model, prompt, Oracle(prompt + expected, wrong), num_draft_tokens=count) == expected

    def test_real_guessers(self, model: Any) -> None:
        smaller = random_model(model.args, seed=1)
        for prompt in prompts(3):
            expected = plain(model, prompt)
            for guesser in (PromptLookup(), DraftModel(smaller), DraftModel(model)):
                assert guessed(model, prompt, guesser) == expected

    def test_goes_on_from_a_cache_and_leaves_it(self, model: Any) -> None:
        first, second = prompts(2)
        cache = model.make_cache()
        model(mx.array([first]), cache=cache)
        expected = plain(model, first + second)
        for _ in range(2):
            assert guessed(model, second, DraftModel(model), prompt_cache=cache) == expected

    def test_with_processors(self, model: Any) -> None:
        prompt = prompts(1)[0]
        options = {"logits_processors": make_logits_processors({3: 2.0}, repetition_penalty=1.5)}
        expected = plain(model, prompt, **options)
        assert expected != plain(model, prompt)
        oracle = Oracle(prompt + expected, lambda i: i % 4 == 0)
        assert guessed(model, prompt, oracle, **options) == expected
        stats = SpeculativeStats()
        assert guessed(model, prompt, DraftModel(model), stats=stats, **options) == expected
        assert stats.accepted == stats.guessed  # the draft model minds the processors too

    def test_log_probabilities_are_the_models(self, model: Any) -> None:
        prompt = prompts(1)[0]
        expected = [logprobs for _, logprobs in generate_step(mx.array(prompt), model, max_tokens=LENGTH)]
        oracle = Oracle(prompt + plain(model, prompt), lambda i: i % 5 == 0)
        found = [row for _, row, _ in speculative_steps(prompt, model, oracle, max_tokens=LENGTH)]
        # float32 sums in another order, through a few layers
        assert largest_difference(mx.stack(found), mx.stack(expected)) < 1e-3

    def test_accounts(self, model: Any) -> None:
        prompt = prompts(1)[0]
        stats = SpeculativeStats()
        steps = speculative_steps(prompt, model, DraftModel(model), max_tokens=23, stats=stats)
        flags = [flag for *_, flag in steps]
        assert flags == [True, True, True, True, False] * 4 + [True, True, False]
        assert (stats.steps, stats.guessed, stats.accepted) == (5, 18, 18)
        assert stats.tokens_per_step == 23 / 5

    @pytest.mark.parametrize("count", [1, 2, 5, 6])
    def test_stops_at_the_limit(self, model: Any, count: int) -> None:
        prompt = prompts(1)[0]
        assert guessed(model, prompt, DraftModel(model), count) == plain(model, prompt, count)

    def test_without_a_limit(self, model: Any) -> None:
        prompt = prompts(1)[0]
        steps = speculative_steps(prompt, model, PromptLookup(), max_tokens=-1)
        assert [token for token, *_ in itertools.islice(steps, LENGTH)] == plain(model, prompt)


class TestSampling:
    # chi-square of 24 degrees of freedom passes this once in 1000; the seeds are fixed
    CHI_SQUARE = 51.2

    @pytest.mark.parametrize("kind", ["oracle", "draft", "lookup"])
    def test_distribution_of_two_tokens(self, kind: str) -> None:
        model, draft = (random_model(tiny_config("rodimus", vocab_size=5, n_layer=1), seed) for seed in (0, 1))
        prompt, runs = [1, 2, 1, 2], 1500
        expected = self.exact(model, prompt)
        counts = np.zeros((5, 5))
        mx.random.seed(0)
        for _ in range(runs):
            guesser = {"oracle": Oracle([*prompt, 4, 0], lambda _: False), "draft": DraftModel(draft)}.get(
                kind, PromptLookup()
            )
            counts[tuple(guessed(model, prompt, guesser, 2, sampler=make_sampler(1.5)))] += 1
        chi_square = ((counts - runs * expected) ** 2 / (runs * expected)).sum()
        assert chi_square < self.CHI_SQUARE

    def exact(self, model: Any, prompt: list[int]) -> np.ndarray:
        first = mx.softmax(model(mx.array([prompt]))[0, -1] / 1.5)
        rows = [mx.softmax(model(mx.array([[*prompt, token]]))[0, -1] / 1.5) for token in range(5)]
        return np.array(first)[:, None] * np.array(mx.stack(rows))

    @pytest.mark.parametrize("temp", [0.3, 1.0, 3.0])
    def test_guesses_change_nothing_at_all(self, model: Any, temp: float) -> None:
        class Nothing:
            def guess(self, tokens: Sequence[int], count: int, choose: Any) -> list[int]:
                return []

        found = []
        for guesser in (Nothing(), DraftModel(model), DraftModel(random_model(model.args, seed=1)), PromptLookup()):
            mx.random.seed(5)
            found.append(guessed(model, prompts(1)[0], guesser, sampler=make_sampler(temp, top_p=0.95)))
        assert all(each == found[0] for each in found)

    def test_runs_differ(self, model: Any) -> None:
        mx.random.seed(0)
        sampler = make_sampler(1.0)
        found = {tuple(guessed(model, prompts(1)[0], PromptLookup(), 12, sampler=sampler)) for _ in range(5)}
        assert len(found) == 5

    def test_models_that_nearly_agree_draw_alike(self, model: Any) -> None:
        near = random_model(model.args)
        near.set_dtype(mx.bfloat16)
        stats = SpeculativeStats()
        mx.random.seed(0)
        guessed(model, prompts(1)[0], DraftModel(near), sampler=make_sampler(2.0), stats=stats)
        assert stats.accepted > 0.7 * stats.guessed


class TestPromptLookup:
    def test_what_followed_the_longest_match(self) -> None:
        lookup = PromptLookup()
        assert lookup.guess([1, 2, 3, 7, 8, 9, 2, 3, 5, 1, 2, 3], 3, None) == [7, 8, 9]  # type: ignore[arg-type]
        assert lookup.guess([1, 2, 3, 7, 8, 9, 2, 3, 5, 1, 2, 3, 7], 2, None) == [8, 9]  # type: ignore[arg-type]

    def test_the_latest_of_equal_matches(self) -> None:
        assert PromptLookup().guess([1, 2, 5, 1, 2, 6, 1, 2], 1, None) == [6]  # type: ignore[arg-type]

    @pytest.mark.parametrize("tokens", [[1], [1, 1], [1, 2, 3], [2, 1, 3, 1]], ids=str)
    def test_nothing_to_go_by(self, tokens: list[int]) -> None:
        assert PromptLookup().guess(tokens, 4, None) == []  # type: ignore[arg-type]

    def test_may_run_into_the_end(self) -> None:
        assert PromptLookup().guess([1, 2, 1, 2], 4, None) == [1, 2]  # type: ignore[arg-type]


class TestText:
    def test_same_text_ends_and_counts(self, tiny: tuple[Any, Any]) -> None:
        for stop in ([], ["T", "q"]):
            options: dict[str, Any] = {"max_tokens": 30, "stop": stop}
            expected = list(stream_generate(*tiny, "def f(x):", **options))
            found = list(stream_generate(*tiny, "def f(x):", guesser=DraftModel(tiny[0]), **options))
            assert "".join(r.text for r in found) == "".join(r.text for r in expected)
            assert found[-1].finish_reason == expected[-1].finish_reason
            assert found[-1].generation_tokens == expected[-1].generation_tokens
            assert found[0].prompt_tokens == 9

    def test_end_token(self, tiny: tuple[Any, Any]) -> None:
        model, tokenizer = tiny
        bias = make_logits_processors({tokenizer.eos_token_id: 1e9})
        found = list(
            stream_generate(model, tokenizer, "x", max_tokens=9, guesser=PromptLookup(), logits_processors=bias)
        )
        assert [(r.text, r.finish_reason) for r in found] == [("", "stop")]

    def test_another_vocabulary(self, tiny: tuple[Any, Any]) -> None:
        with pytest.raises(RodimusError, match="cannot guess for this model: its vocab_size is 262, not 61"):
            load_draft_model(str(TINY_FOLDER), random_model(tiny_config()))
