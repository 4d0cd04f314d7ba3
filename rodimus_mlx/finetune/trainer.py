"""The training loop: steps, validation, checkpoints, and what is reported of them.

A run is a function of the model, the samples and the settings: batches, dropout and the schedule follow from the
step's number, so that with the checkpoint's parameters and optimizer state a run goes on as if it had never stopped.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from ..errors import RodimusError
from . import checkpoint
from .adapters import WEIGHTS, adapter_config, write_adapter
from .batches import Plan, in_order
from .clock import Clock
from .data import Sample
from .dropout import keyed_dropouts
from .evaluate import evaluate
from .identity import identity, refuse_changes, same_validation
from .memory import limited, usual_limit
from .methods import prepare
from .optimizer import build_optimizer, learning_rate
from .outlook import outlook, refuse_small_disk
from .parameters import Parameters, count, named, nested, read, take
from .recompute import recomputed_layers
from .segments import empty_memory
from .settings import Settings
from .step import (
    compute_dtype,
    gradient_function,
    initial_optimizer_state,
    loss_function,
    on_device,
    pieces,
    update_function,
)

Event = dict[str, Any]
Observer = Callable[[Event], None]


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    steps: int
    loss: float  # of the last step
    best_loss: float | None  # of the validations
    best_step: int | None
    stopped_early: bool


def train(
    model: Any,
    samples: Sequence[Sample],
    settings: Settings,
    *,
    valid: Sequence[Sample] = (),
    out: str | Path | None = None,
    resume: bool = False,
    observers: Iterable[Observer] = (),
    places: dict[str, Any] | None = None,
) -> Result:
    """Train a model on samples; it holds the trained parameters afterwards, the best ones where there is validation.

    Where it ends by an exception, Ctrl-C included, the model holds the parameters of the last step. What is not trained
    has its own type again; where ``settings.dtype`` is a smaller one, its numbers stay rounded to that.

    Args:
        samples, valid: none longer than ``settings.seq_len``.
        out: folder for the adapter (adapters.safetensors: the best by validation, else the last) and for checkpoints;
            None: nothing is written.
        resume: go on from the last checkpoint in ``out``; from the start if there is none. Where the validation is not
            the one of before, the best is looked for anew, from the checkpoint's parameters on.
        observers: called with an event for the start, each step, report, validation and save.
        places: more entries for adapter_config.json, like the model's name.

    Raises:
        RodimusError: the settings do not fit the model or the data, the loss is not finite, or the disk is full.
    """
    run = _Run(model, samples, settings, valid, None if out is None else Path(out), list(observers), places or {})
    checkpoint_folder = run.find_checkpoint() if resume else None
    with run.changes:
        run.set_up()
        if resume:
            run.resume(checkpoint_folder)
        with limited(run.memory_limit()):
            return run.go()


class _Run:
    """What a run holds on to."""

    def __init__(
        self,
        model: Any,
        samples: Sequence[Sample],
        settings: Settings,
        valid: Sequence[Sample],
        out: Path | None,
        observers: list[Observer],
        places: dict[str, Any],
    ):
        self.model, self.settings, self.valid, self.out = model, settings, valid, out
        self.observers, self.places = observers, places
        self.world = mx.distributed.init()
        rows = settings.batch_size * self.world.size()
        shape: dict[str, Any] = {"rows_in_batch": rows, "seq_len": settings.seq_len, "packing": settings.packing}
        self.plan = Plan(samples, **shape, seed=settings.seed)
        if len(self.plan.rows) < rows:
            what = "rows of packed samples" if settings.packing else "samples"
            raise RodimusError(f"{len(self.plan.rows)} {what} do not fill a batch of {rows}; lower --batch-size")
        largest = max(int(each.tokens.max()) for each in (*samples, *valid))
        if largest >= model.args.vocab_size:
            raise RodimusError(
                f"the data has token {largest}, but the model's vocabulary has {model.args.vocab_size}: "
                "is this the model's tokenizer?"
            )
        self.valid_batches = lambda: in_order(valid, **shape)
        epoch = self.plan.batches_in_epoch / settings.grad_accumulation
        self.iters = settings.iters or max(1, round(settings.epochs * epoch))
        self.dtype = compute_dtype(model, settings.dtype)
        self.changes = ExitStack()  # to be undone in the model, however the run ends
        self.step = 0
        self.best: Parameters = {}  # where there is no folder to keep them in
        # Of the run so far, kept in checkpoints: the validations, and the losses since the last report.
        self.facts: dict[str, Any] = {"best_loss": None, "best_step": None, "stale": 0, "recent": []}
        self.anew = False  # the validation is another one than the checkpoint's
        self.rate = learning_rate(settings, self.iters)
        length = self.iters if callable(self.rate) else None
        self.identity = identity(settings, samples, valid, self.world.size(), length)

    def find_checkpoint(self) -> Path | None:
        """The last checkpoint, if there is one; it must be this run's."""
        folder = checkpoint.latest(self.out) if self.out and self.world.rank() == 0 else None
        if folder is not None:
            refuse_changes(folder, checkpoint.read_facts(folder)["identity"], self.identity)
        return folder

    def set_up(self) -> None:
        """Take what is trained out of the model, and make the rest ready; `changes` puts back and undoes it."""
        model, settings = self.model, self.settings
        own = prepare(model, settings)
        self.types = {name: p.dtype for name, p in named(model.parameters()).items()}
        self.parameters = {name: p.astype(mx.float32) for name, p in own.items()}
        del own
        mx.eval(self.parameters)
        self.changes.callback(self.give_back)
        take(model, nested(self.parameters))
        model.set_dtype(self.dtype)
        mx.eval(model.parameters())  # what compiled functions capture must be numbers, not yet to be computed
        keys = self.changes.enter_context(keyed_dropouts(model, settings.dropout))
        if settings.grad_checkpoint:
            self.changes.enter_context(recomputed_layers(model))
        optimizer = build_optimizer(settings, self.iters)
        self.optimizer_state = initial_optimizer_state(optimizer, self.parameters)
        self.gradient = gradient_function(model, self.dtype, keys)
        self.update = update_function(optimizer, settings.max_grad_norm)
        self.loss_of = loss_function(model, self.dtype)

    def give_back(self) -> None:
        """Put what is trained into the model again, and all of it in its own types."""
        self.model.update(nested(self.parameters))
        held = named(self.model.parameters())
        self.model.update(nested({name: p.astype(self.types[name]) for name, p in held.items()}))
        self.model.eval()

    def resume(self, folder: Path | None) -> None:
        """Take up a checkpoint, if there is one."""
        if folder is not None:
            state = checkpoint.load(folder, self.state())
            self.anew = not same_validation(state.facts.pop("identity"), self.identity)
            self.step, self.parameters, self.optimizer_state, self.facts = state
            if self.anew:
                self.facts |= {"best_loss": None, "best_step": None, "stale": 0}
        if self.world.size() > 1:
            self.follow_first()

    def follow_first(self) -> None:
        """Take over from process 0 what it read: the others may have another disk."""
        names = ("best_loss", "best_step", "stale")
        facts = [self.step, self.anew, *(math.nan if self.facts[name] is None else self.facts[name] for name in names)]
        mine = {"state": (self.parameters, self.optimizer_state), "facts": mx.array(facts, mx.float32)}
        if self.world.rank() != 0:
            mine = tree_map(mx.zeros_like, mine)
        shared = tree_map(mx.distributed.all_sum, mine)
        mx.eval(shared)
        self.parameters, self.optimizer_state = shared["state"]
        step, anew, *rest = shared["facts"].tolist()
        self.step, self.anew = int(step), bool(anew)
        self.facts |= {name: None if math.isnan(value) else value for name, value in zip(names, rest)}

    def go(self) -> Result:
        """Run to the end."""
        s = self.settings
        self.begin()
        if self.valid and (self.step == 0 or self.anew):
            self.validate()
        clock = Clock()
        waiting: list[tuple[int, mx.array, mx.array, int]] = []
        stopped = self.has_stalled()
        while self.step < self.iters and not stopped:
            waiting.append(self.one_step())
            clock.tokens += waiting[-1][-1]
            if not clock.short:
                mx.eval(self.parameters, self.optimizer_state)
            while len(waiting) > (1 if clock.short else 0):
                self.note(*waiting.pop(0))
            clock.step()
            done = self.step
            last = done == self.iters
            validating = bool(self.valid) and (last or done % s.eval_every == 0)
            saving = self.out is not None and (last or done % s.save_every == 0)
            if not (last or validating or saving or done % s.report_every == 0):
                continue
            while waiting:
                self.note(*waiting.pop(0))
            if last or done % s.report_every == 0:
                self.report(clock)
            if validating:
                stopped = self.validate()
            if saving or stopped:
                self.save()
            clock.restart()
        if self.facts["best_step"] is not None and self.world.rank() == 0:
            self.parameters = self.best if self.out is None else read(self.out / WEIGHTS)
        self.changes.close()
        best = self.facts["best_loss"], self.facts["best_step"]
        result = Result(self.step, self.facts.get("loss", math.nan), *best, stopped)
        self.tell("end", **vars(result))
        return result

    def memory_limit(self) -> int:
        """Bytes above which MLX waits for work in flight."""
        s = self.settings
        if s.memory_limit:
            return int(1e9 * s.memory_limit)
        own = [named(self.model.parameters()), self.parameters, named(self.optimizer_state)]
        others = mx.get_active_memory() - sum(x.nbytes for arrays in own for x in arrays.values())
        trainable = count(self.parameters)
        return max(others, 0) + usual_limit(self.model, trainable, s, self.dtype, self.plan.longest_row)

    def begin(self) -> None:
        """Say what is to come, while nothing is spent on it yet."""
        if self.out is not None and self.world.rank() == 0:
            arrays = [*self.parameters.values(), *self.adapter().values(), *named(self.optimizer_state).values()]
            refuse_small_disk(self.out, sum(x.nbytes for x in arrays))
        facts = outlook(self.model, self.parameters, self.plan, self.settings, self.dtype)
        run = {"step": self.step, "iters": self.iters, "processes": self.world.size()}
        self.tell("start", **run, **facts, valid_samples=len(self.valid), compares_anew=self.anew)
        mx.reset_peak_memory()

    def one_step(self) -> tuple[int, mx.array, mx.array, int]:
        """Start a step's computation; returns its number, loss, gradients' norm and how many tokens it takes."""
        s, world = self.settings, self.world
        first = self.step * s.grad_accumulation
        batches = [self.plan.rows_of(first + i) for i in range(s.grad_accumulation)]
        learned = sum(int(self.plan.learned[rows].sum()) for rows in batches)
        # Gradients are averaged over processes: each counts its share of all tokens `size` times.
        scale = mx.array(world.size() / learned, mx.float32)
        total, loss = None, mx.array(0.0)
        for i, rows in enumerate(batches):
            batch = self.plan.batch(rows[world.rank() :: world.size()])
            cut = 0 < s.segment < batch.tokens.shape[1]
            memory = empty_memory(self.model.args) if cut else None
            for j, piece in enumerate(pieces(batch, s.segment)):
                key = _key(s.seed, self.step, i, j, world.rank())
                value, memory, total = self.gradient(self.parameters, on_device(piece), memory, key, scale, total)
                loss = loss + value
                if cut or len(batches) > 1:
                    mx.eval(total, memory, loss)  # before the next piece takes its memory
        gradients, total = total, None
        self.parameters, self.optimizer_state, loss, norm = self.update(
            self.parameters, self.optimizer_state, gradients, loss
        )
        del gradients
        mx.async_eval(self.parameters, self.optimizer_state, loss, norm)
        self.step += 1
        return self.step, loss, norm, sum(int(self.plan.lengths[rows].sum()) for rows in batches)

    def note(self, step: int, loss: mx.array, norm: mx.array, tokens: int) -> None:
        """Wait for a step and record it; ends the run where it has gone wrong."""
        value, length = float(loss), float(norm)
        if not (math.isfinite(value) and math.isfinite(length)):
            what = f"the loss is {value}" if not math.isfinite(value) else f"the gradients' norm is {length}"
            self.fail(step, what)
        self.facts["loss"] = value
        self.facts["recent"].append(value)
        self.tell("step", step=step, loss=value, grad_norm=length, tokens=tokens)

    def fail(self, step: int, what: str) -> NoReturn:
        """End the run where its numbers are none any more."""
        last = checkpoint.latest(self.out) if self.out else None
        rest = f"; the last good checkpoint is {last}" if last else ""
        raise RodimusError(f"step {step}: {what}; lower --learning-rate or --max-grad-norm{rest}")

    def report(self, clock: Clock) -> None:
        recent = self.facts["recent"]
        seconds = clock.seconds()
        rate = self.rate(mx.array(self.step - 1)) if callable(self.rate) else self.rate
        self.tell(
            "report",
            step=self.step,
            loss=sum(recent) / len(recent),
            learning_rate=float(rate),
            tokens_per_second=clock.tokens / max(seconds, 1e-9),
            peak_memory=mx.get_peak_memory(),
            seconds_left=(self.iters - self.step) * seconds / max(clock.steps, 1),
        )
        recent.clear()

    def validate(self) -> bool:
        """Take the validation loss, keep the best; returns whether it is time to stop."""
        start = time.perf_counter()
        most = self.settings.val_batches
        shown = itertools.islice(self.valid_batches(), None if most < 0 else most)
        loss = evaluate(self.loss_of, self.parameters, shown, self.model.args, self.settings.segment, self.world)
        if not math.isfinite(loss):
            self.fail(self.step, f"the validation loss is {loss}")
        facts = self.facts
        better = self.step > 0 and (facts["best_loss"] is None or loss < facts["best_loss"])
        if better:
            facts["best_loss"], facts["best_step"], facts["stale"] = loss, self.step, 0
            if self.out is None:
                self.best = dict(self.parameters)
            self.publish()
        elif self.step:
            facts["stale"] += 1
        self.tell("valid", step=self.step, loss=loss, better=better, seconds=time.perf_counter() - start)
        return self.has_stalled()

    def has_stalled(self) -> bool:
        return 0 < self.settings.early_stop <= self.facts["stale"]

    def publish(self) -> None:
        """Write the parameters as the run's adapter."""
        if self.out is None or self.world.rank() != 0:
            return
        try:
            write_adapter(self.out, self.config(), self.adapter())
        except (OSError, RuntimeError) as error:
            raise RodimusError(f"the adapter in {self.out} cannot be written: {error}") from error

    def save(self) -> None:
        """Write a checkpoint, and the adapter where no validation chooses one."""
        if self.out is None or self.world.rank() != 0:
            return
        folder = checkpoint.save(self.out, self.state(), self.config(), self.adapter())
        if not self.valid:
            self.publish()
        self.tell("save", step=self.step, folder=str(folder))

    def state(self) -> checkpoint.State:
        facts = {**self.facts, "identity": self.identity}
        return checkpoint.State(self.step, self.parameters, self.optimizer_state, facts)

    def config(self) -> dict[str, Any]:
        return adapter_config(self.settings, self.places)

    def adapter(self) -> Parameters:
        """What is trained, in the types that the model has it in."""
        return {name: p.astype(self.types[name]) for name, p in self.parameters.items()}

    def tell(self, kind: str, **facts: Any) -> None:
        if self.world.rank() == 0:
            for observer in self.observers:
                observer({"event": kind, **facts})


def _key(*numbers: int) -> mx.array:
    """A random key [2] uint32 for each step, batch, segment and process."""
    return mx.array(np.random.SeedSequence(numbers).generate_state(2))
