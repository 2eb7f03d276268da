"""`fastopt plan`: what sharding a model will cost, and who will own what."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import click
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from .. import api
from ..command.answers import Failed, Number, as_json
from ..command.printing import print_json
from ..optimizer import Optimizer
from ..wrapper import OptimWrapper
from .ownership.layout import Kind
from .plan import report
from .planning.costs import Plan, Stage
from .planning.costs import plan as make_plan
from .planning.decoder import Decoder, decoder
from .planning.drawing import plot as draw


@click.command()
@click.option(
    "--params", type=Number(1e4, 1e13), metavar="N", help="Number of parameters of a LLaMA-like decoder, such as 7e9."
)
@click.option(
    "--model", metavar="MODULE:FUNCTION", help="What returns a model; called with the meta device as the default."
)
@click.option("--ranks", type=click.IntRange(1, 100_000), required=True, help="Number of ranks.")
@click.option("--optimizer", default="Adam", show_default=True, help="A class of fastopt, or of torch.optim.")
@click.option("--dtype", help="Of the parameters, by default float32; with --params.")
@click.option("--master-weights", is_flag=True, help="Keep float32 copies of parameters of low precision.")
@click.option(
    "--groups", type=click.IntRange(min=1), default=1, show_default=True, help="Groups, by layers; with --params."
)
@click.option("--stage", "stages", type=click.Choice(["1", "2", "3"]), multiple=True, help="Only this; repeatable.")
@click.option("--layout", type=click.Choice(["even", "whole"]), help="By default what the optimizer needs.")
@click.option("--bucket-mb", type=Number(0.001, 1e9), metavar="MIB", help="Of a bucket; by default as shard() chooses.")
@click.option("--plot", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Draw it into this file.")
@as_json
def plan(
    params: float | None,
    model: str | None,
    ranks: int,
    optimizer: str,
    dtype: str | None,
    master_weights: bool,
    groups: int,
    stages: tuple[str, ...],
    layout: Kind | None,
    bucket_mb: float | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Memory, bytes on the wire, buckets and owners of sharding a model, computed without ranks or memory for tensors.

    Stages 1 and 2 are those of shard(); stage 3 is PyTorch's fully_shard, one unit per block.

    \b
    Examples:
      a decoder of 70 billion parameters in bfloat16 on 1024 ranks
        fastopt plan --params 70e9 --ranks 1024 --dtype bfloat16 --master-weights
      a model of your own: a function of yours that returns it
        fastopt plan --model my_package.models:build --ranks 8 --optimizer Lamb --plot owners.png
    """
    try:
        built = _model(params, model, dtype, groups)
        found = make_plan(
            built,
            ranks,
            _maker(built, optimizer, groups, master_weights),
            stages=[cast(Stage, int(stage)) for stage in stages or "123"],
            bucket_bytes=None if bucket_mb is None else int(bucket_mb * 2**20),
            layout=layout,
        )
    except ValueError as error:
        raise click.UsageError(" ".join(str(error).split())) from error
    if plot is not None:
        _draw(found, plot)
    if as_json:
        print_json(found.summary())
    else:
        click.echo("\n".join(report(found)))


def _model(params: float | None, place: str | None, dtype: str | None, groups: int) -> nn.Module:
    """The model to plan for.

    Raises:
        ValueError: the options do not say which.
    """
    if (params is None) == (place is None):
        raise ValueError("say what to plan for: --params or --model")
    if place is not None:
        if dtype is not None:
            raise ValueError("--dtype goes with --params; a model of your own has its dtypes already")
        if groups > 1:
            raise ValueError("--groups goes with --params; for groups of a model of your own use plan(model, make=...)")
        return _your_model(place)
    kind = getattr(torch, (dtype or "float32").removeprefix("torch."), None)
    if not isinstance(kind, torch.dtype) or not (kind.is_floating_point or kind.is_complex):
        raise ValueError(f"--dtype {dtype} is no dtype that parameters have, such as float32 or bfloat16")
    return decoder(cast(float, params), kind)


def _your_model(place: str) -> nn.Module:
    module, _, name = place.partition(":")
    if not name:
        raise ValueError(f"--model {place}: expected MODULE:FUNCTION")
    sys.path.insert(0, "")
    try:
        with torch.device("meta"):
            model = getattr(importlib.import_module(module), name)()
    except Exception as error:
        raise ValueError(f"--model {place}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove("")
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {place} returned a {type(model).__name__}, not a torch.nn.Module")
    lazy = [name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise ValueError(f"--model {place}: {lazy[0]!r} has no shape yet: it is of a lazy module")
    return model


def _maker(model: nn.Module, optimizer: str, groups: int, masters: bool) -> Callable[[Any], Optimizer]:
    """What makes the optimizer from the model's parameters."""
    make_optimizer = _optimizer(optimizer)

    def make(params: Any) -> Optimizer:
        opt = make_optimizer(model.groups(groups) if isinstance(model, Decoder) and groups > 1 else params)
        opt.master_weights = masters
        return opt

    return make


def _optimizer(name: str) -> Callable[[Any], Optimizer]:
    """What makes the optimizer of that name from parameters."""
    own: Any = getattr(api, name, None)
    if name == "Lookahead":
        return lambda params: own(api.Adam(params))
    if isinstance(own, type) and issubclass(own, Optimizer) and own not in (Optimizer, OptimWrapper):
        return own
    foreign = getattr(torch.optim, name, None)
    base = torch.optim.Optimizer
    if isinstance(foreign, type) and issubclass(foreign, base) and foreign is not base:
        return lambda params: OptimWrapper(params, opt=foreign)
    raise ValueError(f"--optimizer {name} is no optimizer of fastopt or torch.optim")


def _draw(found: Plan, path: Path) -> None:
    path = path if path.suffix else path.with_suffix(".png")
    try:
        draw(found, path)
    except ModuleNotFoundError as error:
        raise Failed(f"{error}: --plot needs pip install fastopt[plot]") from error
    except (OSError, ValueError) as error:
        raise Failed(f"cannot draw {path}: {error}") from error
    click.echo(f"wrote {path}", err=True)
