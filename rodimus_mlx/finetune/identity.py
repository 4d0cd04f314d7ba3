"""What must be the same for a run to go on from its checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import RodimusError
from .data import Sample
from .settings import Settings

# Settings that change what is reported or how long a run is, but not what a step does. `val_batches` is compared with
# the validation's data.
_FREE = (
    "val_batches",
    "report_every",
    "save_every",
    "early_stop",
    "report_to",
    "project_name",
    "epochs",
    "iters",
    "memory_limit",
)


def identity(
    settings: Settings, samples: Sequence[Sample], valid: Sequence[Sample], processes: int, iters: int | None
) -> dict[str, Any]:
    """JSON; ``iters`` is None where the learning rate does not depend on the number of steps."""
    chosen = {name: value for name, value in settings.to_dict().items() if name not in _FREE}
    return {
        "settings": {**chosen, "iters": iters},
        "processes": processes,
        "data": _digest(samples),
        "validation": {"data": _digest(valid), "val_batches": settings.val_batches},
    }


def same_validation(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether losses of the two can be compared; older checkpoints do not say, and are taken to be the same."""
    return then.get("validation", now["validation"]) == now["validation"]


def refuse_changes(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Let only the run that was saved in ``folder`` go on.

    Raises:
        RodimusError: naming the first thing that changed.
    """
    for name, value in now["settings"].items():
        before = then["settings"].get(name)
        if before != value:
            option = "--" + name.replace("_", "-")
            raise RodimusError(f"--resume: {option} is {value!r}, but was {before!r} in {folder}; give the old one")
    if then["processes"] != now["processes"]:
        raise RodimusError(f"--resume: the run had {then['processes']} processes, now there are {now['processes']}")
    if then["data"] != now["data"]:
        raise RodimusError(f"--resume: the training data is not what {folder} was trained on")


def _digest(samples: Sequence[Sample]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for each in samples:
        digest.update(each.tokens.tobytes())
        digest.update(each.learn.tobytes())
        if each.others is not None:
            digest.update(each.others.tobytes())
    return digest.hexdigest()
