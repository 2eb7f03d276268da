"""What the job is told: a dataclass whose fields are the command-line flags and whose field docstrings are the help."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import math
import os
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from .errors import JobError
from .recipes import RECIPES
from .unfreezing import Unfreezing, parse_unfreezing

SCHEDULES = ("constant", "linear", "cosine", "one-cycle")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of one run. Lengths are in bytes (tokens), rates per optimizer step."""

    data: tuple[str, ...] = ()
    """Text to learn: files, folders, globs or fsspec URLs; none means the source of Python's standard library."""
    data_limit: int = 8 << 20
    """Most bytes of text to read, train and validation together."""
    batch: int = 24
    """Rows of the global batch, shared out over all ranks; the same on any number of ranks."""
    context: int = 128
    """Bytes per row."""
    seed: int = 1
    """Seed of the initial weights and of the order of the data."""
    layers: int = 4
    """Transformer blocks."""
    width: int = 128
    """Channels of the residual stream."""
    heads: int = 4
    """Attention heads; they divide the width into even parts."""
    opt: str = "adam"
    """The optimizer."""
    lr: str = ""
    """Peak learning rate: a number, or a:b from the embedding's group to the head's (default: fits the optimizer)."""
    wd: float = 0.01
    """Weight decay; the scales of the norms are left out."""
    mom: float | None = None
    """Momentum (default: the optimizer's own)."""
    stage: int = 2
    """0: every rank steps everything; 1: sharded states; 2: sharded states and gradients (ZeRO's stages)."""
    freeze_to: int = 0
    """Freeze the layer groups before this one; negative counts from the end."""
    unfreeze_at: int | None = None
    """Step from which everything is trained (short for --unfreeze STEP:0)."""
    unfreeze: str = ""
    """Freeze levels by step: 100:1,200:0 freezes to group 1 from step 100 and nothing from step 200."""
    schedule: str = "cosine"
    """How the learning rate moves over the run."""
    warmup: int = 20
    """Steps of linear warm-up; for one-cycle the rising part (0: a quarter of the run)."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""
    accumulate: int = 1
    """Micro-batches per step; the global batch stays the same."""
    dtype: str = "float32"
    """Arithmetic of the forward and backward pass; weights and states stay float32."""
    steps: int = 300
    """Optimizer steps of the whole run, resumed parts included."""
    val_every: int = 50
    """Steps between validations; 0 validates at the end only."""
    val_rows: int = 128
    """Rows of validation text, spread evenly over all of it."""
    checkpoint: str = ""
    """Folder or fsspec URL of the checkpoints; empty saves none."""
    every: int = 50
    """Steps between checkpoints; 0 saves at the end only."""
    keep: int = 3
    """Complete checkpoints to keep; 0 keeps all."""
    resume: bool = False
    """Go on from the newest complete checkpoint, or start if there is none."""
    metrics: str = "runs/metrics.jsonl"
    """File that metrics are appended to, a JSON object per line; empty writes none."""
    plot: str = "runs/curves.png"
    """PNG that the curves are drawn to at the end; empty draws none."""
    log_every: int = 10
    """Steps between lines of progress where there is no terminal for a bar."""
    threads: int = 0
    """CPU threads per rank; 0 shares the cores out."""
    check: bool = False
    """Only check the arguments, the text and the places that are written to, then exit."""

    @property
    def rate(self) -> float | slice | None:
        """`lr` as `build_optimizer` takes it."""
        return parse_rate(self.lr) if self.lr else None

    @property
    def groups(self) -> int:
        """Number of layer groups: the embedding, each block, the head."""
        return self.layers + 2

    @property
    def unfreezing(self) -> Unfreezing:
        """The freeze level of each step."""
        return parse_unfreezing(self.freeze_to, self.unfreeze, self.unfreeze_at, self.groups)

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON can hold them."""
        return {**dataclasses.asdict(self), "data": list(self.data)}


def parse_rate(text: str) -> float | slice:
    """`0.1` is a number, `1e-4:1e-2` a slice; both positive and finite (a plain rate may be 0)."""
    try:
        values = [float(part) for part in text.split(":")]
    except ValueError:
        values = []
    if len(values) == 1 and math.isfinite(values[0]) and values[0] >= 0:
        return values[0]
    if len(values) == 2 and all(math.isfinite(v) and v > 0 for v in values):
        return slice(*values)
    raise JobError(f"--lr takes a number such as 0.003, or two as in 0.0003:0.003 for first:last group, got {text!r}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _field_docs(cls: type) -> dict[str, str]:
    """The string literal under each field of a dataclass, by field name."""
    body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(cls)).body[0]).body
    docs = {}
    for node, below in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[typing.cast(ast.Name, node.target).id] = str(below.value.value)
    return docs


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises its complaint as a JobError."""

    def error(self, message: str) -> NoReturn:
        raise JobError(f"{message}; --help lists the flags")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="train.py", description="Train a small GPT on bytes of text.", allow_abbrev=False)
    docs, hints = _field_docs(Config), typing.get_type_hints(Config)
    choices = {"opt": tuple(RECIPES), "stage": (0, 1, 2), "schedule": SCHEDULES, "dtype": DTYPES}
    for spec in dataclasses.fields(Config):
        kind, text = hints[spec.name], docs[spec.name].replace("%", "%%")
        shown = f"{text} [{spec.default}]" if spec.default not in ("", None, (), False) else text
        options: dict[str, Any] = {"help": shown, "default": spec.default, "dest": spec.name}
        if kind is bool:
            options["action"] = "store_true"
        elif spec.name == "data":
            options.update(nargs="+", metavar="PATH")
        else:
            options["type"] = kind.__args__[0] if isinstance(kind, types.UnionType) else kind
            if spec.name in choices:
                options["choices"] = choices[spec.name]
            else:
                options["metavar"] = options["type"].__name__.upper()
        parser.add_argument(_flag(spec.name), **options)
    return parser


def parse(arguments: Sequence[str]) -> Config:
    """The configuration that the command line describes, checked; a JobError names the flag that is wrong."""
    values = vars(_parser().parse_args(arguments))
    config = Config(**{**values, "data": tuple(values["data"])})
    check(config)
    return config


def check(config: Config) -> None:
    """Raise a JobError for the first value that cannot work."""
    at_least = {
        1: ("batch", "context", "layers", "width", "heads", "accumulate", "steps", "val_rows", "log_every"),
        0: ("warmup", "val_every", "every", "keep", "seed", "threads"),
    }
    for least, names in at_least.items():
        for name in names:
            if getattr(config, name) < least:
                raise JobError(f"{_flag(name)} must be at least {least}, got {getattr(config, name)}")
    for name in ("wd", "clip"):
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= 0):
            raise JobError(f"{_flag(name)} must be a finite number of at least 0, got {value}")
    if config.mom is not None and not 0 <= config.mom < 1:
        raise JobError(f"--mom must be at least 0 and below 1, got {config.mom}")
    if config.width % (2 * config.heads):
        raise JobError(f"--width must be a multiple of twice --heads, got {config.width} for {config.heads} heads")
    check_shares(config.batch, int(os.environ.get("WORLD_SIZE", "1")), config.accumulate)
    if config.resume and not config.checkpoint:
        raise JobError("--resume needs --checkpoint URL, the place to resume from")
    if config.lr:
        parse_rate(config.lr)
    _ = config.unfreezing


def check_shares(batch: int, world: int, accumulate: int) -> None:
    """Raise a JobError if some rank would have no row in some micro-batch."""
    if batch < world * accumulate:
        raise JobError(
            f"--batch {batch} cannot be shared by {world} rank{'s' * (world != 1)} with --accumulate {accumulate}: "
            f"it must be at least {world * accumulate}"
        )


FIXED = ("data_limit", "batch", "context", "seed", "layers", "width", "heads", "opt")
"""Settings that a resumed run shares with the run that wrote the checkpoint: they make the model or the data order."""

REBUILDS = ("lr", "wd", "mom", "schedule", "warmup", "steps")
"""Settings whose change at a resume sets the hyper-parameters and the schedule anew, at the step reached."""


def check_resumable(config: Config, saved: dict[str, Any]) -> None:
    """Raise a JobError naming the flag if `config` would change the model, its states or the data of a saved run."""
    now = config.to_json()
    for name in FIXED:
        if name in saved and saved[name] != now[name]:
            raise JobError(
                f"cannot resume with {_flag(name)} {now[name]}: the checkpoint was made with {saved[name]}; "
                f"pass {_flag(name)} {saved[name]}, or start in another --checkpoint folder"
            )


def rebuilds(config: Config, saved: dict[str, Any]) -> list[str]:
    """The flags in `REBUILDS` that differ from those of the saved run."""
    now = config.to_json()
    return [_flag(name) for name in REBUILDS if name in saved and saved[name] != now[name]]
