from pathlib import Path

import numpy as np
import pytest
from synthetic import ARCHITECTURES, official_shapes


@pytest.fixture
def goldens() -> Path:
    return Path(__file__).parents[1] / "data" / "goldens"


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """A state dict of the architecture "miniature", without the redundant head."""
    rng = np.random.default_rng(1)
    shapes = official_shapes(ARCHITECTURES["miniature"])
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
