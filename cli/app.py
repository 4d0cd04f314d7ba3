"""Entry point: the list of commands, and how every error, warning and interrupt reaches the terminal.

A command is a module with ``run`` (its signature is the command line, its docstring the help) and ``EXAMPLE``; a
group of commands has ``COMMANDS``, functions with an example each, and its help is the module's ``HELP``.
Only Typer is imported here: whatever a command needs, it imports when it runs.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from typing import Annotated, Any

import typer

from ..errors import RodimusError
from ..version import __version__
from . import (
    EXIT_ERROR,
    EXIT_INTERRUPT,
    EXIT_USAGE,
    bench,
    chat,
    compare,
    convert,
    doctor,
    finetune,
    fuse,
    generate,
    init,
    inspect,
    perplexity,
    quantize,
    serve,
    state,
)

COMMANDS = (generate, chat, serve, doctor, convert, quantize, inspect, perplexity, compare, bench, finetune, fuse, init)
GROUPS = (state,)

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # what writing to a full or broken device ends in

app = typer.Typer(
    help="Run Rodimus and Rodimus+ language models with MLX.",
    epilog="\b\nExample:\n  rodimus-mlx generate 'def quicksort(a):' --max-tokens 100",
    add_completion=False,
    rich_markup_mode=None,  # plain help starts faster and fits any terminal
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)
for _module in COMMANDS:
    _name = _module.__name__.rpartition(".")[2]
    app.command(_name, epilog=f"\b\nExample:\n{_module.EXAMPLE}")(_module.run)
for _group in GROUPS:
    _name = _group.__name__.rpartition(".")[2]
    _epilog = f"\b\nExample:\n{next(iter(_group.COMMANDS.values()))}"
    _commands = typer.Typer(help=_group.HELP, epilog=_epilog, rich_markup_mode=None)
    _commands.callback(invoke_without_command=True)(_group.start)
    for _function, _example in _group.COMMANDS.items():
        _commands.command(_function.__name__, epilog=f"\b\nExample:\n{_example}")(_function)
    app.add_typer(_commands, name=_name)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rodimus-mlx {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0 success, 1 an error in the input, 2 a wrong option, 130 interrupted. Unexpected exceptions pass through.
    """
    _ready_streams()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            status = app(arguments, prog_name="rodimus-mlx", standalone_mode=False)
            sys.stdout.flush()
            return status if isinstance(status, int) else 0
        except BrokenPipeError:
            _forget_output()  # the reader (head, less) has gone: stop without a word
            return EXIT_ERROR
        except (KeyboardInterrupt, typer.Abort):
            return EXIT_INTERRUPT
        except RodimusError as error:
            return _fail(str(error), EXIT_ERROR)
        except OSError as error:
            if error.errno not in _FULL or error.filename is not None:
                raise
            _forget_output()
            return _fail(f"standard output cannot be written: {error.strerror}", EXIT_ERROR)
        except Exception as error:
            # Typer's usage errors have no public base class; they are known by these two attributes.
            if not hasattr(error, "format_message"):
                raise
            return _fail(error.format_message(), getattr(error, "exit_code", EXIT_USAGE))


def _fail(message: str, status: int) -> int:
    print(f"Error: {_one_line(message)}", file=sys.stderr)
    return status


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"Warning: {_one_line(str(message))}", file=sys.stderr)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _ready_streams() -> None:
    """Text is UTF-8 whatever the locale says; what a stream cannot hold (half a surrogate pair) becomes '?'.

    A stream that was closed (`<&-`, `>&-`) is empty, or takes what is written and forgets it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")


def _forget_output() -> None:
    """Let nothing complain of what was not written, as Python would at its last flush."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
