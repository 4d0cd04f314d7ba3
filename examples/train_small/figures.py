"""The pictures of this example, as SVG, from what the measuring scripts wrote. Needs matplotlib.

python figures.py context context.json OUT.svg          # of context.py
python figures.py positions positions.json OUT.svg      # of loss_by_position.py --json
python figures.py training MODEL [MODEL ...] OUT.svg    # folders of train.py, their metrics.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NAMES = {"plus": "Rodimus+", "rodimus": "Rodimus", "transformer": "Transformer"}
# Okabe and Ito's colours, told apart by all eyes; the names beside the lines say it again.
COLOURS = {"Rodimus+": "#0072b2", "Rodimus": "#009e73", "Transformer": "#d55e00"}
OTHER = "#666666"
TEXT, FAINT = "#222222", "#bbbbbb"
WIDTH, HEIGHT = 800, 330  # at 100 dots an inch
TRAINED = 2048  # tokens of a sequence in training
SMOOTH = 5  # reports of training in a point of its curve
SHOWN = 2.5  # nats of the training's curve above its end
LINE_OF_TEXT = 0.085  # of the height of a picture's axes


def main() -> None:
    """Draw one picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, what in (("context", "JSON of context.py"), ("positions", "JSON of loss_by_position.py")):
        each = kinds.add_parser(kind)
        each.add_argument("file", type=Path, help=what)
        each.add_argument("out", type=Path, help="SVG to write")
    each = kinds.add_parser("training")
    each.add_argument("model", type=Path, nargs="+", help="folders that train.py wrote")
    each.add_argument("out", type=Path, help="SVG to write")
    args = parser.parse_args()
    if args.kind == "training":
        reports = {title(folder.name): read_lines(folder / "metrics.jsonl") for folder in args.model}
        picture(args.out, lambda figure: training(figure, reports))
    else:
        draw = {"context": context, "positions": positions}[args.kind]
        result = json.loads(args.file.read_text())
        picture(args.out, lambda figure: draw(figure, result))


def context(figure: Any, result: dict[str, Any]) -> None:
    """Memory and time of a token against the context, side by side."""
    memory, speed = figure.subplots(1, 2)
    contexts = [n / 1024 for n in result["contexts"]]
    for axes, key, scale, heading in (
        (memory, "bytes", 1e-6, "Memory of the text so far, MB"),
        (speed, "ms", 1.0, "Time of the next token, ms"),
    ):
        lines = {name: (contexts, [scale * y for y in found[key]]) for name, found in result["models"].items()}
        frame(axes, heading, "tokens read, thousands")
        axes.set(xlim=(0, contexts[-1]), ylim=(0, 1.05 * max(y for _, ys in lines.values() for y in ys)))
        named_lines(axes, lines, lambda y: f"{y:,.0f}" if y >= 10 else f"{y:.1f}")
        axes.set_xticks([n for n in contexts if n >= contexts[-1] / 8])


def positions(figure: Any, result: dict[str, Any]) -> None:
    """Loss against the position, each bucket drawn at its end, and where training ended."""
    axes = figure.subplots()
    ends = [math.log2(n) for n in result["to"]]
    lines = {title(name): (ends, values) for name, values in result.items() if name not in ("from", "to", "sequences")}
    frame(axes, "Loss by position in the text, nats a token", "tokens before, up to")
    named_lines(axes, lines, lambda y: f"{y:.2f}")
    if result["to"][0] < TRAINED < result["to"][-1]:
        axes.axvline(math.log2(TRAINED), color=FAINT, linewidth=1, zorder=0)
        top = axes.get_ylim()[1]
        axes.annotate("trained up to here ", (math.log2(TRAINED), top), color=OTHER, ha="right", va="top")
    axes.set_xticks(ends, [f"{n:,}" for n in result["to"]])
    axes.set_xlim(ends[0], ends[-1])


def training(figure: Any, reports: dict[str, list[dict[str, Any]]]) -> None:
    """The training loss, smoothed, and the validation loss as points, against the tokens seen."""
    axes = figure.subplots()
    curves, steps = {}, []
    for name, events in reports.items():
        found = [(event["step"], event["loss"]) for event in events if event["event"] == "report"]
        if not found:
            raise SystemExit(f"Error: {name}: metrics.jsonl has no report")
        pieces = [found[max(0, i - SMOOTH + 1) : i + 1] for i in range(len(found))]
        curves[name] = [step for step, _ in found], [sum(loss for _, loss in part) / len(part) for part in pieces]
        steps.append(found[-1][0])
    frame(axes, "Loss in training (lines) and on held-back modules (dots), nats a token", "steps")
    low = min(min(losses) for _, losses in curves.values())
    axes.set(xlim=(0, max(steps)), ylim=(low - 0.2, low + SHOWN))  # the first steps' losses, far above, are cut off
    named_lines(axes, curves, lambda y: f"{y:.2f}")
    for name, events in reports.items():
        found = [(event["step"], event["loss"]) for event in events if event["event"] == "valid" and event["step"]]
        if found:
            axes.plot(*zip(*found), "o", markersize=4, color=COLOURS.get(name, OTHER))


def named_lines(
    axes: Any, lines: dict[str, tuple[Sequence[float], Sequence[float]]], number: Callable[[float], str]
) -> None:
    """Lines (x, y), each with its name and last value beside its end; the names are kept apart."""
    for name, (x, y) in lines.items():
        axes.plot(x, y, color=COLOURS.get(name, OTHER), linewidth=2, solid_capstyle="round")
    low, high = axes.get_ylim()
    place = -math.inf
    for name, (x, y) in sorted(lines.items(), key=lambda item: item[1][1][-1]):
        place = max(place + LINE_OF_TEXT * (high - low), y[-1])
        axes.annotate(
            f"{name} {number(y[-1])}",
            (x[-1], place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=COLOURS.get(name, OTHER),
            annotation_clip=False,
        )


def frame(axes: Any, heading: str, below: str) -> None:
    """Heading, horizontal rules, no box."""
    axes.set_title(heading, loc="left", fontsize=11, color=TEXT, pad=12)
    axes.set_xlabel(below, color=TEXT)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=TEXT)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def picture(out: Path, draw: Callable[[Any], None]) -> None:
    """Write an SVG with a white ground, so that it reads on a dark page too; the same input gives the same bytes."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit("Error: pictures need matplotlib: pip install 'rodimus-mlx[plot]'")
    if out.suffix not in (".svg", ".png"):
        sys.exit(f"Error: {out}: a picture's name must end in .svg or .png")
    style = {"svg.fonttype": "none", "svg.hashsalt": "rodimus-mlx", "font.family": "sans-serif", "font.size": 10}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def title(name: str) -> str:
    """What a model is called in a picture, by its folder's name."""
    return NAMES.get(name, name)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """A .jsonl file's objects."""
    try:
        return [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise SystemExit(f"Error: {file} cannot be read: {error}") from error


if __name__ == "__main__":
    main()
