from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import random_tokens
from synthetic import ARCHITECTURES, official_shapes, random_tensors, write_checkpoint

# The quantized architecture: its FFN, 176 wide, has to be padded; every other width is a multiple of 64.
SMALL = {**ARCHITECTURES["tiny"], "d_model": 128, "vocab_size": 150}
PLAIN = {**SMALL, "block_type": "rodimus", "attn_cfg": {}, "tie_word_embeddings": False}


@pytest.fixture
def goldens() -> Path:
    return Path(__file__).parents[1] / "data" / "goldens"


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """A state dict of the architecture "miniature", without the redundant head."""
    rng = np.random.default_rng(1)
    shapes = official_shapes(ARCHITECTURES["miniature"])
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


@pytest.fixture
def source(tmp_path):
    """Write a checkpoint of an architecture."""

    def write(config=SMALL, dtype="float32", format="safetensors"):
        write_checkpoint(tmp_path / "source", config, random_tensors(config, dtype, seed=3), format, dtype)
        return tmp_path / "source"

    return write


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def logits(model):
    result = model(random_tokens(model, 2, 20))
    mx.eval(result)
    return result
