"""What a run tells: lines for people, metrics.jsonl, a plot, and mlx-lm's reports to wandb and swanlab."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import RodimusError

Event = dict[str, Any]
METRICS, PLOT = "metrics.jsonl", "loss.png"
_MEASURED = ("step", "report", "valid")


def describe(event: Event) -> list[str]:
    """Lines for a person; none for events that are only counted."""
    kind = event["event"]
    if kind == "start":
        return _start(event)
    if kind == "report":
        return [
            f"step {event['step']}: loss {event['loss']:.4f}, learning rate {event['learning_rate']:.2e}, "
            f"{event['tokens_per_second']:,.0f} tokens/s, peak memory {_gigabytes(event['peak_memory'])}, "
            f"{_duration(event['seconds_left'])} left"
        ]
    if kind == "valid":
        best = ", the best so far" if event["better"] else ""
        return [f"step {event['step']}: validation loss {event['loss']:.4f}{best} ({event['seconds']:.1f} s)"]
    if kind == "save":
        return [f"step {event['step']}: saved {event['folder']}"]
    if kind == "end":
        early = ", early: no better validation loss" if event["stopped_early"] else ""
        best = ""
        if event["best_step"]:
            best = f"; best validation loss {event['best_loss']:.4f} at step {event['best_step']}"
        return [f"done after {event['steps']} steps{early}{best}"]
    return []


def metrics_writer(file: Path) -> Callable[[Event], None]:
    """An observer that appends measurements to a JSON-lines file, made when the run starts.

    What a run that was cut off wrote there after its last checkpoint is dropped then: it will come again.
    """

    def write(event: Event) -> None:
        if event["event"] == "start":
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(_lines_until(event["step"], file)), encoding="utf-8")
        elif event["event"] in _MEASURED:
            with open(file, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(event) + "\n")

    return write


def _lines_until(step: int, file: Path) -> list[str]:
    """The lines of a run's first ``step`` steps; none of a run that starts."""
    if step == 0 or not file.exists():
        return []
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(f"{line}\n")
        except (ValueError, KeyError, TypeError):  # the line that was being written when the run was cut off
            continue
    return kept


def plot(metrics: Path, image: Path) -> bool:
    """Draw the losses; returns whether matplotlib, which is optional, was there to do it."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    events = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for kind, label, style in (("step", "training", {"alpha": 0.6}), ("valid", "validation", {"marker": "o"})):
        points = [(e["step"], e["loss"]) for e in events if e["event"] == kind]
        if points:
            axes.plot(*zip(*points), label=label, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.legend()
    figure.savefig(image, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return True


def service(names: str, project: str | None, out: Path, config: dict[str, Any]) -> Callable[[Event], None]:
    """An observer that hands reports to mlx-lm's callbacks ("wandb", "swanlab").

    Raises:
        RodimusError: an unknown name, or its package is not installed.
    """
    from mlx_lm.tuner.callbacks import get_reporting_callbacks

    try:
        callback = get_reporting_callbacks(names, project_name=project, log_dir=str(out), config=config)  # type: ignore[arg-type]
    except (ImportError, ValueError) as error:
        raise RodimusError(f"--report-to {names}: {error}") from error

    def tell(event: Event) -> None:
        facts = {"iteration": event.get("step"), **event}
        if event["event"] == "report":
            callback.on_train_loss_report({**facts, "train_loss": event["loss"]})
        elif event["event"] == "valid":
            callback.on_val_loss_report({**facts, "val_loss": event["loss"]})

    return tell


def _start(e: Event) -> list[str]:
    share = 100 * e["trainable"] / e["parameters"]
    packed = f", packed into {e['rows']:,} rows" if e["packed"] else ""
    processes = f" by {e['processes']} processes" if e["processes"] > 1 else ""
    epochs = e["iters"] / e["steps_in_epoch"]
    fits = "it fits" if e["advice"] is None else f"it may not fit: {e['advice']}"
    lines = [
        f"trains {e['trainable']:,} of {e['parameters']:,} parameters ({share:.2f}%) by {e['method']}, "
        f"computed in {e['dtype']}",
        f"{e['samples']:,} samples{packed}, {e['tokens_in_epoch']:,} tokens an epoch, the longest {e['longest']:,}; "
        f"{e['valid_samples']:,} to validate",
        f"{e['iters']:,} steps of {e['rows_in_step']} rows{processes}: {epochs:.2f} epochs of "
        f"{e['steps_in_epoch']:,.1f} steps",
        f"about {_gigabytes(e['peak_memory'])} of memory at the peak, of {_gigabytes(e['available_memory'])}: {fits}",
    ]
    if e["step"]:
        lines.append(f"goes on after step {e['step']}")
    if e["compares_anew"]:
        lines.append("the validation is not the one of before: the best loss is looked for anew")
    return lines


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
