"""``rodimus-mlx finetune``: train an adapter, the initial states, or all weights."""

from __future__ import annotations

import sys
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RodimusError

if TYPE_CHECKING:
    from collections.abc import Callable

EXAMPLE = (
    "  rodimus-mlx finetune --model coder-1.6b --data my-style --out my-adapter \\\n      --iters 200 --mask-prompt"
)


class Method(StrEnum):
    """What is trained."""

    lora = "lora"
    dora = "dora"
    full = "full"
    state = "state"


class Optimizer(StrEnum):
    """MLX's optimizers."""

    adamw = "adamw"
    adam = "adam"
    muon = "muon"
    sgd = "sgd"
    adafactor = "adafactor"


class Schedule(StrEnum):
    """How the learning rate goes on after the warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Long(StrEnum):
    """What becomes of samples that are too long."""

    truncate = "truncate"
    split = "split"


class Dtype(StrEnum):
    """What is computed in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


Whole = int | None
Number = float | None


def run(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Folder or Hugging Face id.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder with train.jsonl and maybe valid.jsonl, or a data set's Hugging Face id.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder for the adapter.")] = None,
    config: Annotated[
        str | None, typer.Option("--config", "-c", metavar="FILE", help="YAML file with options; those given here win.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT's last checkpoint.")] = False,
    method: Annotated[Method | None, typer.Option(help="What to train.  [default: lora]")] = None,
    rank: Annotated[Whole, typer.Option(help="Rank of lora and dora.  [default: 8]")] = None,
    scale: Annotated[Number, typer.Option(help="Scale of lora and dora.  [default: 20]")] = None,
    dropout: Annotated[Number, typer.Option(help="Dropout of lora and dora.  [default: 0]")] = None,
    num_layers: Annotated[Whole, typer.Option(help="Last blocks to train; -1 for all.  [default: -1]")] = None,
    iters: Annotated[Whole, typer.Option(help="Steps.  [default: 1000]")] = None,
    epochs: Annotated[Number, typer.Option(help="Passes over the data, in place of --iters.")] = None,
    batch_size: Annotated[Whole, typer.Option(help="Rows in a batch, of each process.  [default: 4]")] = None,
    grad_accumulation: Annotated[Whole, typer.Option(help="Batches in a step.  [default: 1]")] = None,
    seq_len: Annotated[Whole, typer.Option(help="Tokens in a row at most.  [default: 2048]")] = None,
    segment: Annotated[
        Whole,
        typer.Option(help="Cut rows into so many tokens, which hand on their state; gradients end there."),
    ] = None,
    packing: Annotated[bool | None, typer.Option("--packing", help="Several samples a row, each as if alone.")] = None,
    long: Annotated[Long | None, typer.Option(help="For samples above --seq-len.  [default: truncate]")] = None,
    mask_prompt: Annotated[bool | None, typer.Option("--mask-prompt", help="Learn the answers alone.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Put prompts as a chat.  [default: by the model]"),
    ] = None,
    learning_rate: Annotated[Number, typer.Option(help="[default: 1e-4; full 1e-5; state 5e-2]")] = None,
    schedule: Annotated[Schedule | None, typer.Option(help="[default: constant]")] = None,
    final_learning_rate: Annotated[Number, typer.Option(help="Where linear and cosine end.  [default: 0]")] = None,
    warmup: Annotated[Whole, typer.Option(help="Steps of rising learning rate.  [default: 0]")] = None,
    optimizer: Annotated[Optimizer | None, typer.Option(help="[default: adamw]")] = None,
    weight_decay: Annotated[Number, typer.Option(help="Of matrices.  [default: 0]")] = None,
    max_grad_norm: Annotated[Number, typer.Option(help="Clip gradients; 0 for never.  [default: 1]")] = None,
    grad_checkpoint: Annotated[
        bool | None,
        typer.Option("--grad-checkpoint", help="Less memory, but slower: blocks are computed twice."),
    ] = None,
    memory_limit: Annotated[
        Number,
        typer.Option(
            metavar="GB", help="Wait for work in flight rather than hold more.  [default: a step's and a bit]"
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="What to compute in.  [default: the model's; float32 on a CPU]")
    ] = None,
    val_batches: Annotated[Whole, typer.Option(help="Batches of a validation; -1 for all.  [default: 25]")] = None,
    eval_every: Annotated[Whole, typer.Option(help="Steps between validations.  [default: 200]")] = None,
    early_stop: Annotated[Whole, typer.Option(help="Stop after so many validations without a better loss.")] = None,
    report_every: Annotated[Whole, typer.Option(help="Steps between reports.  [default: 10]")] = None,
    save_every: Annotated[Whole, typer.Option(help="Steps between checkpoints.  [default: 100]")] = None,
    seed: Annotated[Whole, typer.Option(help="Of the data's order, new weights and dropout.  [default: 0]")] = None,
    report_to: Annotated[str | None, typer.Option(help="wandb or swanlab.")] = None,
    project_name: Annotated[str | None, typer.Option(help="The project's name there.")] = None,
) -> None:
    """Finetune a model on text, on prompts and completions, or on chats.

    OUT gets the adapter (the best by validation), a checkpoint to --resume
    from, and metrics.jsonl. On several machines start it by mlx.launch.
    """
    options = {name: _plain(value) for name, value in locals().items() if name not in ("config", "resume")}

    from ..finetune.settings import from_options, read_config, split_places

    merged = {**(read_config(config) if config else {}), **{k: v for k, v in options.items() if v is not None}}
    places, choices = split_places(merged)
    for name in ("model", "data", "out"):
        if name not in places:
            raise RodimusError(f"--{name} is missing")
    settings = from_options(choices, where=config or "the command line")
    _refuse_zeros(merged, beside_a_file=config is not None)

    from ..finetune.run import finetune

    with _Progress() as progress:
        try:
            finetune(**places, settings=settings, resume=resume, observers=[progress])
        except KeyboardInterrupt:
            progress.note(f"interrupted; the same command with --resume goes on from step {progress.saved}")
            raise
    if progress.done:  # of several processes, the first
        print(f"{places['out']}: use it by rodimus-mlx generate --model {places['model']} --adapter {places['out']}")


def _refuse_zeros(given: dict[str, Any], beside_a_file: bool) -> None:
    """Refuse a 0 that Settings takes but nobody means.

    It is an option's absence there, and so may take back what a config file says; alone it would have no effect.
    """
    from ..finetune.settings import option

    unmeant = () if beside_a_file else ("segment", "early_stop")
    if not beside_a_file or not (given.get("iters") or given.get("epochs")):
        unmeant += ("iters", "epochs")
    for name in unmeant:
        if given.get(name) == 0:
            least = "above 0" if name == "epochs" else "1 or more"
            raise RodimusError(f"{option(name)} must be {least}, not 0")


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


class _Progress:
    """Lines on standard error, and on a terminal a bar below them."""

    def __init__(self) -> None:
        from tqdm import tqdm

        from ..finetune.report import describe

        self.describe: Callable[[dict[str, Any]], list[str]] = describe
        self.saved = 0
        self.done = False
        self.bar = tqdm(total=0, unit="step", disable=None, leave=False, file=sys.stderr, dynamic_ncols=True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "start":
            self.bar.total, self.bar.initial = event["iters"], event["step"]
            self.bar.n = self.saved = event["step"]
        elif event["event"] == "step":
            self.bar.update(1)
            self.bar.set_postfix(loss=f"{event['loss']:.4f}", refresh=False)
        elif event["event"] == "save":
            self.saved = event["step"]
        self.done = event["event"] == "end"
        for line in self.describe(event):
            self.note(line)

    def note(self, line: str) -> None:
        """A line above the bar."""
        if self.bar.disable:
            print(line, file=sys.stderr, flush=True)
        else:
            self.bar.write(line, file=sys.stderr)
