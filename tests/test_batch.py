"""Batch generation by mlx-lm's BatchGenerator gives each prompt what it gets alone."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from helpers import golden_model, largest_difference, random_model, random_tokens, run_in_steps, tiny_config
from mlx_lm.generate import BatchGenerator, PromptProcessingBatch

from rodimus_mlx.finetune.initial_state import add_initial_states

LOGPROBS = 1e-4  # float32 log probabilities of size 1 to 10: sums in another order, no more
# Tokens can be compared only where the best logit leads the second by more than noise; these prompts are chosen so.
MARGIN = 2e-3
# Around the window of 9 keys, the convolution's 4, the recurrence's chunks of 64; short and long side by side.
LENGTHS = [1, 130, 2, 3, 65, 4, 8, 9, 10, 17, 90, 31, 64, 5, 20, 40]
MAX_TOKENS = [30, 12, 25, 1, 40, 18, 2, 33, 27, 9, 14, 40, 5, 21, 36, 11]  # rows end early, at different steps
# The 16 prompts arrive over time: at each call to `next`, how many more.
ARRIVALS = [5, 0, 0, 1, 4, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 2, 1]


def make_prompts(model, seed):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, model.args.vocab_size, length).tolist() for length in LENGTHS]


def alone(model, prompt, max_tokens):
    """Greedy tokens, the log probabilities that each was chosen from, and the smallest lead of a choice."""
    cache, pending = model.make_cache(), prompt
    tokens, rows, lead = [], [], np.inf
    for _ in range(max_tokens):
        logits = model(mx.array([pending]), cache=cache)[0, -1]
        rows.append(np.array(logits - mx.logsumexp(logits)))
        best = np.sort(rows[-1])
        lead = min(lead, best[-1] - best[-2])
        tokens.append(int(rows[-1].argmax()))
        pending = tokens[-1:]
    return tokens, rows, lead


def generate(generator, prompts, arrivals=(), **insert):
    """Tokens, log probabilities and the finishing response of each prompt."""
    assert sum(arrivals) in (0, len(prompts))
    arrivals = list(arrivals) or [len(prompts)]
    waiting = list(range(len(prompts)))
    index, done = {}, {}
    tokens, rows = [[] for _ in prompts], [[] for _ in prompts]
    for step in itertools.count():
        if step < len(arrivals):
            new, waiting = waiting[: arrivals[step]], waiting[arrivals[step] :]
            if new:
                options = {key: [value[i] for i in new] for key, value in insert.items()}
                index.update(zip(generator.insert([prompts[i] for i in new], **options), new))
        for response in generator.next()[1]:
            i = index[response.uid]
            tokens[i].append(response.token)
            rows[i].append(np.array(response.logprobs))
            if response.finish_reason:
                done[i] = response
        if len(done) == len(prompts):
            generator.close()
            return tokens, rows, done
    raise AssertionError


@pytest.fixture(scope="module", params=["plus_bin", "rodimus", "plus_untied_sharded", "full_keys2", "learned"])
def expected(request):
    """A model, 16 prompts, and what each gives alone."""
    name = request.param
    if name == "full_keys2":
        changes = {"window_size": None, "num_heads_k": 2, "num_heads_v": 3}
        model = random_model(tiny_config(vocab_size=300, attn_cfg=changes), seed=1)
    elif name == "learned":  # states to start from, which rows that join late must find as well
        model = random_model(tiny_config(vocab_size=300), seed=1)
        for seed, mixer in enumerate(add_initial_states(model, -1)):
            mixer.initial_state = mx.random.normal(mixer.initial_state.shape, key=mx.random.key(seed))
    else:
        model = golden_model(name)
    prompts = make_prompts(model, SEEDS[name])
    results = [alone(model, prompt, count) for prompt, count in zip(prompts, MAX_TOKENS)]
    assert min(lead for _, _, lead in results) > MARGIN
    return model, prompts, results


SEEDS = {"plus_bin": 1, "rodimus": 5, "plus_untied_sharded": 0, "full_keys2": 4, "learned": 4}


def assert_same(tokens, rows, results):
    assert tokens == [row_tokens for row_tokens, _, _ in results]
    for actual, (_, reference, _) in zip(rows, results):
        assert largest_difference(np.stack(actual), np.stack(reference)) <= LOGPROBS


@pytest.mark.parametrize("prefill_step_size", [8, 33, 2048])
@pytest.mark.parametrize("arrivals", [[16], ARRIVALS], ids=["together", "late"])
def test_batch_is_alone(expected, prefill_step_size, arrivals):
    model, prompts, results = expected
    generator = BatchGenerator(model, prefill_step_size=prefill_step_size, prefill_batch_size=4)
    tokens, rows, _ = generate(generator, prompts, arrivals, max_tokens=MAX_TOKENS)
    assert_same(tokens, rows, results)


def test_small_batches(expected):
    """Fewer places than prompts: a row's place is taken by the next as soon as it ends."""
    model, prompts, results = expected
    generator = BatchGenerator(model, prefill_step_size=16, prefill_batch_size=2, completion_batch_size=3)
    tokens, rows, _ = generate(generator, prompts, max_tokens=MAX_TOKENS)
    assert_same(tokens, rows, results)


@pytest.mark.parametrize("prefill_step_size", [6, 16])
def test_rows_that_end_in_an_earlier_step(expected, prefill_step_size):
    """Ragged prompts padded on the right and cut into steps: rows that have ended go through steps of padding."""
    model, prompts, results = expected
    rows = [i for i, length in enumerate(LENGTHS) if 2 <= length <= 90]
    batch = PromptProcessingBatch(
        model, list(rows), [model.make_cache() for _ in rows], prefill_step_size=prefill_step_size
    )
    batch.prompt([prompts[i][:-1] for i in rows])
    generation = batch.generate([prompts[i][-1:] for i in rows])
    tokens = {i: [] for i in rows}
    for _ in range(10):
        for response in generation.next():
            tokens[response.uid].append(response.token)
    for i in rows:
        count = min(10, len(results[i][0]))
        assert tokens[i][:count] == results[i][0][:count]


def test_end_tokens(expected):
    """Rows that end at a stop token leave the others as they are."""
    model, prompts, results = expected
    stops = {tokens[len(tokens) // 2] for tokens, _, _ in results}
    generator = BatchGenerator(model, stop_tokens=[[stop] for stop in stops], prefill_step_size=8)
    tokens, _, done = generate(generator, prompts, ARRIVALS, max_tokens=MAX_TOKENS)
    for i, (reference, _, _) in enumerate(results):
        ends = [k + 1 for k, token in enumerate(reference) if token in stops]
        assert tokens[i] == reference[: ends[0] if ends else None]
        assert done[i].finish_reason == ("stop" if ends else "length")


@pytest.mark.parametrize("prefill_step_size", [8, 2048])
def test_finished_caches_go_on(expected, prefill_step_size):
    """What a finished row's cache holds goes on alone, and in another batch, as if never batched."""
    model, prompts, _ = expected
    generator = BatchGenerator(model, prefill_step_size=prefill_step_size)
    _, _, done = generate(generator, prompts, ARRIVALS, max_tokens=MAX_TOKENS)
    more = [random_tokens(model, 1, 1 + i, seed=i)[0].tolist() for i in range(len(prompts))]
    texts = [done[i].all_tokens + more[i] for i in range(len(prompts))]
    for i, text in enumerate(texts):
        assert text[: LENGTHS[i]] == prompts[i]

    results = [alone(model, text, 5) for text in texts]
    generator = BatchGenerator(model, prefill_step_size=prefill_step_size)
    caches = [done[i].prompt_cache for i in range(len(prompts))]
    tokens, rows, _ = generate(generator, more, ARRIVALS, max_tokens=[5] * len(prompts), caches=caches)
    clear = [i for i, (_, _, lead) in enumerate(results) if lead > MARGIN]
    assert len(clear) > len(results) // 2
    assert [tokens[i] for i in clear] == [results[i][0] for i in clear]
    for i, (_, reference_rows, _) in enumerate(results):
        assert largest_difference(rows[i][0], reference_rows[0]) <= LOGPROBS

    for i in range(len(prompts)):
        expected_logits = model(mx.array([texts[i]]))[:, -len(more[i]) :]
        actual = run_in_steps(model, mx.array([more[i]]), [len(more[i])], caches[i])
        assert largest_difference(actual, expected_logits) <= LOGPROBS


def test_removed_rows_give_their_caches(expected):
    """Rows taken out in the middle, of prompts and of answers, go on alone; the rest are not disturbed."""
    model, prompts, results = expected
    generator = BatchGenerator(model, prefill_step_size=16, prefill_batch_size=16)
    uids = generator.insert([list(prompt) for prompt in prompts], max_tokens=MAX_TOKENS)
    tokens = {uid: [] for uid in uids}
    removed = {}
    taken = [uids[1], uids[4], uids[8], uids[10]]  # 130, 65, 10 and 90 tokens long, at different stages by then
    for step in itertools.count():
        if step == 4:
            removed = generator.remove(taken, return_prompt_caches=True)
        prompt_responses, responses = generator.next()
        for response in responses:
            tokens[response.uid].append(response.token)
        if step > 4 and not prompt_responses and not responses:
            break
    generator.close()
    assert sorted(removed) == taken
    for i, (uid, (reference, _, _)) in enumerate(zip(uids, results)):
        assert tokens[uid] == (reference[: len(tokens[uid])] if uid in taken else reference)
        if uid in taken:
            cache, seen = removed[uid]
            text = prompts[i] + reference
            assert 0 < len(seen) < len(text)
            assert seen == text[: len(seen)]
            rest = mx.array([text[len(seen) :]])
            expected_logits = model(mx.array([text]))[:, len(seen) :]
            actual = run_in_steps(model, rest, [rest.shape[1]], cache)
            assert largest_difference(actual, expected_logits) <= LOGPROBS
