"""Lines from the terminal, through Python's readline where there is one."""

from __future__ import annotations

import atexit
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def set_up(history: Path) -> None:
    """Line editing, history and paste as one message, where Python has readline."""
    try:
        import readline
    except ImportError:
        return
    if not sys.stdin.isatty():
        return
    if not _is_libedit():
        readline.parse_and_bind("set enable-bracketed-paste on")
    try:
        history.parent.mkdir(parents=True, exist_ok=True)
        history.touch(mode=0o600)
        readline.read_history_file(history)
    except OSError:
        return
    readline.set_history_length(1000)
    atexit.register(readline.write_history_file, history)


def ask_line(prompt: str, text: str = "") -> str:
    """A line from the terminal, to be edited if it starts with ``text``."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")
    if not text:
        return input(prompt)
    try:
        import readline
    except ImportError:
        return input(f"{prompt}(instead of: {text}) ")
    readline.set_startup_hook(lambda: readline.insert_text(text))
    try:
        return input(prompt)
    finally:
        readline.set_startup_hook(None)


def is_pasted_on() -> bool:
    """Whether more lines wait already, where the line editor does not tell a paste from typing (libedit, none)."""
    if not sys.stdin.isatty() or not _is_libedit():
        return False
    import select

    return bool(select.select([sys.stdin], [], [], 0.05)[0])


def _is_libedit() -> bool:
    try:
        import readline
    except ImportError:
        return True
    return "libedit" in (readline.__doc__ or "")
