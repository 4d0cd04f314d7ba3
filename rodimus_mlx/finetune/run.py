"""Finetuning from folders to a folder: load, read, train, and leave an adapter."""

from __future__ import annotations

import fcntl
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import RodimusError, RodimusWarning
from ..loading import load
from ..tokenizer import is_chat_model
from . import report
from .data import Record, Sample, fit, load_data, tokenize
from .settings import Settings
from .trainer import Result, train


def finetune(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    settings: Settings,
    *,
    resume: bool = False,
    observers: Iterable[Callable[[dict[str, Any]], None]] = (),
) -> Result:
    """Finetune a checkpoint on data and write the adapter to ``out``.

    ``out`` gets adapter_config.json and adapters.safetensors (the best by validation, else the last), checkpoints/
    (the last one, for ``resume``), metrics.jsonl, and loss.png where matplotlib is installed.

    Args:
        model: a folder or a hub id, as `load` takes it; quantized ones too, unless all weights are trained.
        data: a folder with train.jsonl and maybe valid.jsonl, a file, or the hub id of a data set.
        resume: go on from the last checkpoint in ``out``, exactly.
        observers: called with every event of the run.

    Raises:
        RodimusError: one line that names the file, line or option that is wrong.
    """
    out = Path(out)
    first = mx.distributed.init().rank() == 0
    if first:
        _check_folder(out, resume)
    train_records, valid_records = load_data(data)  # before the model: it is faster, and more often wrong
    loaded, tokenizer = load(model)
    if tokenizer is None:
        raise RodimusError(f"{model} has no tokenizer: its data cannot be read")
    chat = is_chat_model(tokenizer) if settings.chat is None else settings.chat

    def samples(records: list[Record]) -> list[Sample]:
        found = tokenize(records, tokenizer, mask_prompt=settings.mask_prompt, chat=chat)
        return fit(found, settings.seq_len, settings.long)

    if not first:
        warnings.simplefilter("ignore", RodimusWarning)  # the first process says it for all
    training = samples(train_records)
    if not training:
        raise RodimusError(f"{data}: the training data has no sample to learn from")
    told = list(observers)
    if first:
        told.append(report.metrics_writer(out / report.METRICS))
        if settings.report_to:
            told.append(report.service(settings.report_to, settings.project_name, out, settings.to_dict()))
    with _alone(out) if first else nullcontext():
        result = train(
            loaded,
            training,
            settings,
            valid=samples(valid_records),
            out=out,
            resume=resume,
            observers=told,
            places={"model": str(model), "data": str(data)},
        )
    if first:
        report.plot(out / report.METRICS, out / report.PLOT)
    return result


def _check_folder(out: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise RodimusError(f"{out} is a file; --out must be a folder")
    if not resume and out.is_dir() and any(out.iterdir()):
        raise RodimusError(f"{out} is not empty; --resume goes on with its run, or choose another --out")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold a folder that no other run writes into; one that stays empty is not left behind."""
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise RodimusError(f"{out} cannot be written: {error.strerror}") from error
    try:
        _lock(descriptor, out)
        yield
    finally:
        os.close(descriptor)
        if made:
            with suppress(OSError):
                out.rmdir()


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RodimusError(f"another run writes into {out}: wait for its end, or choose another --out") from error
    except OSError:
        pass  # a file system without locks
