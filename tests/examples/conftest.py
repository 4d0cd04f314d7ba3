"""The examples are scripts in folders of their own: their modules are found as they find one another."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"

for folder in ("train_small", "mqar", "ablations"):
    sys.path.insert(0, str(EXAMPLES / folder))
