"""What is remembered does not grow with the length of prompt or answer."""

import mlx.core as mx
import pytest
from bench_memory import peak_memory
from helpers import golden_model, random_tokens

# MLX starts operations before others have ended, so peaks vary by some percent. A cache of every token's keys and
# values would add 50 % here, scores of all pairs of tokens far more.
GROWTH = 1.15


def test_peak_memory_does_not_grow():
    model = golden_model("plus_bin")
    short = peak_memory(model, prompt=1000, answer=250, prefill_step_size=256)
    long = peak_memory(model, prompt=4000, answer=1000, prefill_step_size=256)
    assert long <= GROWTH * short


@pytest.mark.parametrize("name", ["plus_bin", "rodimus"])
def test_prefill_leaves_only_what_is_remembered(name):
    """After a prompt the cache is as large as after a token: 4000 tokens leave no 4000 keys, values or inputs."""
    model = golden_model(name)
    held = []
    for length in (10, 4000):
        tokens, cache = random_tokens(model, 1, length), model.make_cache()
        mx.eval(tokens)
        mx.synchronize()
        before = mx.get_active_memory()
        model(tokens, cache=cache)
        mx.eval([layer.state for layer in cache])
        mx.synchronize()
        held.append(mx.get_active_memory() - before)
    assert held[1] <= GROWTH * held[0]
