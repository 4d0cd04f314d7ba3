"""What `compare` found, as a picture. Needs matplotlib, an optional extra."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RodimusError


def check_plot(file: str | Path) -> None:
    """Refuse, before a long run, a plot that could not be made after it.

    Raises:
        RodimusError: matplotlib is missing, it cannot write such a file, or the folder is not there.
    """
    figure = _new_figure()
    known = figure.canvas.get_supported_filetypes()
    file = Path(file)
    if file.suffix.lstrip(".").lower() not in known:
        raise RodimusError(f"{file}: a plot's name must end in one of .{', .'.join(sorted(known))}")
    if not file.absolute().parent.is_dir():
        raise RodimusError(f"{file}: there is no folder {file.parent}")


def plot(result: Mapping[str, Any], file: str | Path, names: tuple[str, str]) -> None:
    """Perplexity, divergence and drift by position, side by side.

    Args:
        result: of `compare`.
        names: of its models a and b.
    """
    figure = _new_figure()
    perplexity, divergence, drift = figure.subplots(1, 3)
    buckets = result["buckets"]
    ticks = range(len(buckets))
    labels = [label(bucket) for bucket in buckets]
    for key, name, style in zip("ab", names, ("o-", "s--")):
        perplexity.plot(ticks, [bucket[key]["perplexity"] for bucket in buckets], style, label=name)
    perplexity.set_title("perplexity")
    perplexity.legend()
    divergence.bar(ticks, [bucket["kl"] for bucket in buckets])
    divergence.set_title("KL divergence (nats)")
    for axes in (perplexity, divergence):
        axes.set_xticks(ticks, labels, rotation=30)
        axes.set_xlabel("tokens seen before")
    if result["drift"] is not None:
        positions, layers = result["drift"]["positions"], result["drift"]["layers"]
        for i, errors in enumerate(layers):
            shade = 0.85 - 0.85 * i / max(len(layers) - 1, 1)
            drift.plot(
                positions, errors, ".-", color=str(shade), label=f"layer {i}" if i in (0, len(layers) - 1) else ""
            )
        drift.set_xscale("log", base=2)
        drift.set_xlabel("tokens read")
        drift.legend()
    drift.set_title("drift of the states, relative")
    figure.savefig(file, dpi=150)


def label(bucket: Mapping[str, Any]) -> str:
    """A bucket's positions for people: 0-256, 256-1k, from 256k."""
    start, end = (
        None if n is None else f"{n // 1024}k" if n >= 1024 else str(n) for n in (bucket["from"], bucket["to"])
    )
    return f"from {start}" if end is None else f"{start}-{end}"


def _new_figure() -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RodimusError("a plot needs matplotlib: pip install 'rodimus-mlx[plot]'") from error
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
