"""What a terminal is shown of a text that somebody else wrote, as a model's is."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what could change the terminal rather than be read


def printable(text: str) -> str:
    """The text without control characters, but for tabs and line ends."""
    return _CONTROL.sub("", text)
