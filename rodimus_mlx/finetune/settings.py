"""Every choice of a finetuning run, its default, and the config file's names for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import RodimusError

METHODS = ("lora", "dora", "full", "state")
OPTIMIZERS = ("adamw", "adam", "muon", "sgd", "adafactor")
SCHEDULES = ("constant", "linear", "cosine")
LONG = ("truncate", "split")
DTYPES = ("auto", "float32", "bfloat16")
LEARNING_RATES = {"lora": 1e-4, "dora": 1e-4, "full": 1e-5, "state": 5e-2}
ITERS = 1000  # where neither steps nor epochs are given
MOST_GIGABYTES = 100_000  # above which --memory-limit was meant in bytes
# Beyond these nobody trains, but numbers of any size would reach the arrays.
_MOST = {"rank": 4096, "iters": 10**9, "epochs": 100_000, "warmup": 10**9, "seed": 2**64 - 1}

# mlx-lm's names in a config file for ours.
_ALIASES = {
    "fine_tune_type": "method",
    "steps_per_report": "report_every",
    "steps_per_eval": "eval_every",
    "max_seq_length": "seq_len",
    "grad_accumulation_steps": "grad_accumulation",
    "adapter_path": "out",
}
_PLACES = ("model", "data", "out")  # options of the command that are not settings
_NO_EFFECT = ("train", "test", "test_batches", "trust_remote_code", "clear_cache_threshold", "resume_adapter_file")


@dataclass(frozen=True)
class Settings:
    """A run's choices; checked when made."""

    method: str = "lora"
    rank: int = 8  # of lora and dora; scale, dropout and keys too
    scale: float = 20.0
    dropout: float = 0.0
    keys: tuple[str, ...] | None = None  # layers by their names in a block ("mixer.fc"); None: every linear one
    num_layers: int = -1  # blocks trained, counted from the last; -1: all, and for `full` everything else too
    optimizer: str = "adamw"
    optimizer_config: Mapping[str, Any] = field(default_factory=dict)  # more arguments of MLX's optimizer
    learning_rate: float = 0.0  # 0: the method's own default
    schedule: str = "constant"  # after the warm-up, to the last step
    final_learning_rate: float = 0.0  # where linear and cosine end
    lr_schedule: Mapping[str, Any] | None = None  # mlx-lm's form of a schedule, in place of these
    warmup: int = 0  # steps
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: gradients are not clipped
    batch_size: int = 4  # rows in a batch of one process
    grad_accumulation: int = 1  # batches in a step
    iters: int = 0  # steps; 0: by epochs
    epochs: float = 0.0
    seq_len: int = 2048  # tokens in a row
    segment: int = 0  # tokens whose gradients are taken together; 0: the whole row
    packing: bool = False  # several documents in a row
    long: str = "truncate"  # what becomes of samples longer than seq_len
    mask_prompt: bool = False  # learn the answer alone
    chat: bool | None = None  # put prompt and completion as a chat; None: if the model is a chat model
    grad_checkpoint: bool = False
    memory_limit: float = 0.0  # GB, above which MLX waits for work in flight before it starts more; 0: `usual_limit`
    dtype: str = "auto"  # of the computation; what is trained is float32
    seed: int = 0
    val_batches: int = 25  # -1: all
    eval_every: int = 200
    early_stop: int = 0  # validations without a better loss; 0: never
    report_every: int = 10
    save_every: int = 100
    report_to: str | None = None  # "wandb" or "swanlab"
    project_name: str | None = None

    def __post_init__(self) -> None:
        _check(self)
        if self.learning_rate == 0:
            object.__setattr__(self, "learning_rate", LEARNING_RATES[self.method])
        if self.iters == 0 and self.epochs == 0:
            object.__setattr__(self, "iters", ITERS)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "keys": None if self.keys is None else list(self.keys)}


def from_options(options: Mapping[str, Any], where: str = "the settings") -> Settings:
    """Settings from names and values; a None is left at its default.

    Raises:
        RodimusError: an unknown name, or a value that does not fit it.
    """
    known = {f.name for f in fields(Settings)}
    if unknown := sorted(set(options) - known):
        raise RodimusError(f"{where}: unknown option {unknown[0]!r}; known are {', '.join(sorted(known))}")
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(given.get("keys"), list):
        given["keys"] = tuple(given["keys"])
    try:
        return Settings(**given)
    except TypeError as error:
        raise RodimusError(f"{where}: {error}") from error


def read_config(file: str | Path) -> dict[str, Any]:
    """A YAML file's options, under our names; mlx-lm's names and files are understood.

    Raises:
        RodimusError: it cannot be read, or is not a table.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RodimusError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RodimusError(f"{file} must hold options, one a line, like 'batch_size: 4'")
    options: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in _NO_EFFECT or value is None:
            continue
        if name == "lora_parameters":
            options |= value
        elif name == "optimizer_config" and content.get("optimizer", Settings.optimizer) in value:
            options[name] = value[content.get("optimizer", Settings.optimizer)]  # mlx-lm has one table an optimizer
        else:
            options[_ALIASES.get(name, name)] = value
    return {name: _number(value) for name, value in options.items()}


def split_places(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model, data and output folder, and the rest."""
    places = {name: options[name] for name in _PLACES if name in options}
    return places, {name: value for name, value in options.items() if name not in _PLACES}


def _number(value: Any) -> Any:
    """YAML takes 1e-5, without a dot, for text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _check(s: Settings) -> None:
    for name, choices in (
        ("method", METHODS),
        ("optimizer", OPTIMIZERS),
        ("schedule", SCHEDULES),
        ("long", LONG),
        ("dtype", DTYPES),
    ):
        if getattr(s, name) not in choices:
            raise RodimusError(f"{option(name)} must be one of {', '.join(choices)}, not {getattr(s, name)!r}")
    whole = {"rank": 1, "num_layers": -1, "warmup": 0, "batch_size": 1, "grad_accumulation": 1, "iters": 0}
    whole |= {"seq_len": 1, "segment": 0, "seed": 0, "val_batches": -1, "eval_every": 1, "early_stop": 0}
    whole |= {"report_every": 1, "save_every": 1}
    for name, least in whole.items():
        value = getattr(s, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise RodimusError(f"{option(name)} must be a whole number from {least} on, not {value!r}")
    floats = (
        "scale",
        "learning_rate",
        "final_learning_rate",
        "weight_decay",
        "max_grad_norm",
        "epochs",
        "memory_limit",
    )
    for name in floats:
        value = getattr(s, name)
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise RodimusError(f"{option(name)} must be a number from 0 on, not {value!r}")
    for name, most in _MOST.items():
        if (value := getattr(s, name)) > most:
            raise RodimusError(f"{option(name)} must be at most {most}, not {value}")
    if s.memory_limit > MOST_GIGABYTES:
        raise RodimusError(f"--memory-limit is in GB: {s.memory_limit:g} of them is more than any machine has")
    if not isinstance(s.dropout, (int, float)) or not 0 <= s.dropout < 1:
        raise RodimusError(f"--dropout must be from 0 to below 1, not {s.dropout!r}")
    if s.num_layers == 0:
        raise RodimusError("--num-layers must be -1 for all layers, or 1 or more")
    if s.val_batches == 0:
        raise RodimusError("--val-batches must be -1 for all, or 1 or more")
    if s.iters and s.epochs:
        raise RodimusError("give --iters or --epochs, not both")
    if s.packing and s.method == "state":
        raise RodimusError("--packing does not go with --method state: packed documents start from an empty state")
    if s.packing and s.segment and s.segment < s.seq_len:
        raise RodimusError("--packing does not go with --segment: packed documents would lose their borders")


def option(name: str) -> str:
    """A setting's name as the command line has it."""
    return "--" + name.replace("_", "-")
