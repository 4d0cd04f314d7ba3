"""How far a long command is, and how many bytes that is."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class ByteProgress:
    """A bar on standard error: share, amount, rate and time left; nothing where nobody looks.

    To be called with (done, in all or None), in bytes or another unit; appears at the first call, so that warnings
    before it stay whole.
    """

    def __init__(self, title: str, unit: str = "B") -> None:
        self._title = title
        self._unit = unit
        self._bar: Any = None

    def __call__(self, done: int, total: int | None) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                desc=self._title,
                total=total,
                unit=self._unit,
                unit_scale=True,
                disable=None,
                leave=False,
                file=sys.stderr,
            )
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def size(count: float) -> str:
    """Bytes for people: 3.21 GB, or 1.2 MB where that would be 0.00 GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
