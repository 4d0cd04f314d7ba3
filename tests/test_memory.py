"""What is remembered does not grow with the length of prompt or answer."""

from bench_memory import peak_memory
from helpers import golden_model

# MLX starts operations before others have ended, so peaks vary by some percent. A cache of every token's keys and
# values would add 50 % here, scores of all pairs of tokens far more.
GROWTH = 1.15


def test_peak_memory_does_not_grow():
    model = golden_model("plus_bin")
    short = peak_memory(model, prompt=1000, answer=250, prefill_step_size=256)
    long = peak_memory(model, prompt=4000, answer=1000, prefill_step_size=256)
    assert long <= GROWTH * short
