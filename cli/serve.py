"""``rodimus-mlx serve``: an OpenAI-compatible server, and a page to chat in."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Annotated

import typer

from ..errors import RodimusError, RodimusWarning
from . import options

EXAMPLE = "  rodimus-mlx serve --model coder-1.6b --api-key mine"


def run(
    model: options.Model = None,
    adapter: options.Adapter = None,
    host: Annotated[str, typer.Option("--host", metavar="HOST", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", "-p", metavar="N", callback=options.between(0, 65535), help="0 for a free one.")
    ] = 8080,
    api_key: Annotated[
        str | None, typer.Option("--api-key", metavar="KEY", envvar="RODIMUS_API_KEY", help="What requests must bring.")
    ] = None,
    state: Annotated[
        str | None, typer.Option("--state", metavar="NAME", help="State that requests go on from, if they name none.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="What requests call the model.  [default: MODEL]")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option("--allow-origin", metavar="URL", help="Site whose pages may use the server; '*' for all."),
    ] = None,
    max_requests: Annotated[
        int, typer.Option(metavar="N", callback=options.between(1, 4096), help="Requests at once.")
    ] = 64,
    max_body: Annotated[
        float, typer.Option(metavar="MB", callback=options.between(0.001, 1024), help="Size of a request.")
    ] = 4,
    max_prompt: Annotated[int, typer.Option(metavar="N", callback=options.between(1), help="Tokens of a prompt.")] = 1
    << 17,
    max_new: Annotated[
        int, typer.Option(metavar="N", callback=options.between(1), help="Tokens that a request may ask for.")
    ] = 1 << 15,
    cache: Annotated[
        float, typer.Option(metavar="GB", callback=options.between(0), help="Memory for prompts that may come again.")
    ] = 2,
    max_tokens: options.MaxTokens = 512,
    temp: options.Temp = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every request.")] = False,
) -> None:
    """Serve a model to OpenAI clients and browsers.

    Completions, chat completions, models and health under /v1, a page to chat
    in at /. A request's "state" names a state to go on from. Ctrl-C ends it
    when what runs is done; twice, at once.
    """
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(message)s")

    from ..loading import load
    from ..serve.server import Limits, Server
    from ..states import load_state
    from ..states.store import state_path

    loaded, tokenizer = load(options.model_or_bundled(model), adapter_path=adapter)
    if state:
        if not state_path(state).is_file():
            raise RodimusError(f"there is no state {state}: rodimus-mlx state list shows them")
        load_state(state_path(state), loaded, f"the state {state}")  # refuses what does not fit, now
    server = Server(
        loaded,
        tokenizer,
        model_name=name or model or "demo",
        host=host,
        port=port,
        api_key=api_key,
        default_state=state,
        allowed_origins=allow_origin or (),
        limits=Limits(max_requests, int(max_body * 1e6), max_prompt, max_new, int(cache * 1e9)),
        sampling={"temp": temp, "top_p": top_p, "top_k": top_k, "min_p": min_p, "max_tokens": max_tokens},
    )
    if not server.is_loopback and not api_key:
        warnings.warn(f"anyone who reaches {host} may use this server: give --api-key", RodimusWarning, stacklevel=2)
    print(f"Serving {server.model_name} at {server.url} (Ctrl-C ends)", file=sys.stderr, flush=True)
    server.serve_until_signal()
