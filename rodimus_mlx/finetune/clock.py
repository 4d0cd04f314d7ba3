"""Time, steps and tokens between two reports."""

from __future__ import annotations

import time

SHORT_STEP = 0.1  # seconds: shorter ones are queued while the last one still runs, at the price of some memory


class Clock:
    """Time, steps and tokens since the last report, without validations and saves."""

    def __init__(self) -> None:
        self.short = False
        self.restart()

    def restart(self) -> None:
        self.start = time.perf_counter()
        self.steps = self.tokens = 0

    def step(self) -> None:
        self.steps += 1
        self.short = self.seconds() / self.steps < SHORT_STEP

    def seconds(self) -> float:
        return time.perf_counter() - self.start
