"""``rodimus-mlx state``: what a model has read, kept in a file of constant size."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import RodimusError
from . import options
from .progress import ByteProgress, size

if TYPE_CHECKING:
    from ..states import StateInfo

HELP = """Read something once, and keep the model's state as a file.

generate, chat and serve take --state NAME. A state is of constant size,
and fits the model, quantization and adapter that made it."""

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a state, or path of its file.")]


def start(context: typer.Context) -> None:
    """Shows the help where no command is given."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def make(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to call the state.")],
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="SRC", help="Files, folders, a JSON conversation, or '-' for standard input."),
    ] = None,
    model: options.Model = None,
    adapter: options.Adapter = None,
    state: options.State = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system message before it.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Read text as a system message or as it is; the default fits the model.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a state of this name.")] = False,
) -> None:
    """Read files, folders or a conversation into a state.

    With --state, goes on from that one, which stays as it is.
    """
    from ..states.store import state_path

    path = state_path(name)
    if path.exists() and not force:
        raise RodimusError(f"there is a state {name}; --force replaces it")

    from ..loading import DEMO_FOLDER, load
    from ..states import load_state, save_state
    from ..states.make import make_state
    from ..states.sources import Source, read_sources
    from ..states.store import find_state
    from ..tokenizer import is_chat_model

    loaded, tokenizer = load(model or DEMO_FOLDER, adapter_path=adapter)
    start_from = load_state(find_state(state), loaded, f"the state {state}") if state else None
    source = read_sources(sources, tokenizer) if sources else Source()
    with ByteProgress("Reading", unit=" tokens") as progress:
        made = make_state(
            loaded,
            tokenizer,
            source,
            chat=is_chat_model(tokenizer) if chat is None else chat,
            system=system,
            start=start_from,
            model_name=model or str(DEMO_FOLDER),
            progress=progress,
        )
    info = save_state(path, loaded, made)
    print(f"{name}: {info.tokens:,} tokens, {size(path.stat().st_size)}")


def list_states() -> None:
    """List the named states."""
    from ..states import read_info
    from ..states.store import state_names, state_path

    names = state_names()
    if not names:
        print("No states yet: rodimus-mlx state make NAME FILE", file=sys.stderr)
    width = max(map(len, names), default=0)
    for name in names:
        path = state_path(name)
        try:
            info = read_info(path)
            about = f"{info.tokens:>12,} tokens  {size(path.stat().st_size):>9}  {_shorten(info.source, 40)}"
        except RodimusError as error:
            about = str(error)
        print(f"{name:{width}}  {about}")


list_states.__name__ = "list"


def show(name: Name) -> None:
    """Show what a state has read, and which model it fits."""
    from ..states import read_info
    from ..states.store import find_state

    path = find_state(name)
    info = read_info(path)
    print(f"file      {path}")
    print(f"size      {size(path.stat().st_size)}")
    print(f"tokens    {info.tokens:,}")
    print(f"read      {info.source}")
    print(f"created   {info.created}")
    print(f"model     {info.model}")
    for key, value in info.fingerprint.items():
        print(f"  {key:12}  {value}")
    for message in info.messages:
        print(f"{message['role']:9} {_shorten(message['content'], 70)}")


def diff(
    first: Name, second: Annotated[str, typer.Argument(metavar="NAME2", help="The state to compare with.")]
) -> None:
    """Compare two states: what they have read, and how far apart they are.

    Distances are |a - b| / |b|, layer by layer.
    """
    from ..states import State, read_info
    from ..states.compare import compare_states
    from ..states.file import load_cache
    from ..states.store import find_state

    paths = find_state(first), find_state(second)
    infos = read_info(paths[0]), read_info(paths[1])
    for line in _describe_differences(*infos):
        print(line)
    print("layer       state      window")
    for each in compare_states(*(State(load_cache(path), info) for path, info in zip(paths, infos))):
        window = "" if each.window is None else f"{each.window:12.3e}"
        print(f"{each.layer:5}{each.state:12.3e}{window}")


def delete(names: Annotated[list[str], typer.Argument(metavar="NAME", help="States to delete.")]) -> None:
    """Delete named states."""
    from ..states.store import delete_state, named_state

    names = list(dict.fromkeys(names))
    for name in names:
        named_state(name)  # a name that is wrong is told before any state is gone
    for name in names:
        delete_state(name)
        print(f"{name}: deleted")


COMMANDS = {
    make: "  rodimus-mlx state make manual docs/ notes.txt --model coder-1.6b",
    list_states: "  rodimus-mlx state list",
    show: "  rodimus-mlx state show manual",
    diff: "  rodimus-mlx state diff manual manual-v2",
    delete: "  rodimus-mlx state delete manual",
}


def _describe_differences(a: StateInfo, b: StateInfo) -> list[str]:
    lines = [f"tokens    {a.tokens:,} and {b.tokens:,}", f"read      {a.source} and {b.source}"]
    for key in a.fingerprint:
        if a.fingerprint[key] != b.fingerprint.get(key):
            lines.append(f"{key:9} {a.fingerprint[key]} and {b.fingerprint.get(key)}")
    if a.messages or b.messages:
        shared = next((i for i, (x, y) in enumerate(zip(a.messages, b.messages)) if x != y), None)
        if shared is None:
            shared = min(len(a.messages), len(b.messages))
        lines.append(f"messages  {len(a.messages)} and {len(b.messages)}, the first {shared} the same")
    return lines


def _shorten(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."
