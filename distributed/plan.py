"""What will sharding cost, and who will own what? `python -m fastopt.distributed.plan --help`.

`plan(model, ranks)` computes the same from a model of your own, also on the meta device.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import fastopt

from ..optimizer import Optimizer
from ..wrapper import OptimWrapper
from .decoder import Decoder, decoder
from .drawing import owners_text, plot, size
from .planning import Memory, Plan, Stage, StagePlan, plan, plan_specs

__all__ = ["Memory", "Plan", "StagePlan", "main", "plan", "plan_specs", "report"]

_EXAMPLE = """examples:
  # a 70-billion-parameter decoder in bfloat16 on 1024 ranks
  python -m fastopt.distributed.plan --params 70e9 --ranks 1024 --dtype bfloat16 --master-weights
  # a model of your own: a function of yours that builds it
  python -m fastopt.distributed.plan --model my_package.models:build --ranks 8 --optimizer Lamb --plot owners.png

Stages 1 and 2 are those of shard(); stage 3 is PyTorch's fully_shard, one unit per block.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    began = time.perf_counter()
    try:
        found = _plan(given)
    except (ValueError, ImportError, AttributeError) as error:
        parser.error(str(error))
    if given.json:
        print(json.dumps(found.summary(), indent=2))
    else:
        print("\n".join(report(found)))
        print(f"computed in {time.perf_counter() - began:.1f} s")
    if given.plot is not None:
        try:
            plot(found, given.plot)
        except ModuleNotFoundError as error:
            parser.error(f"{error}: --plot needs pip install fastopt[plot]")
        print(f"wrote {given.plot}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastopt.distributed.plan",
        description="Memory, bytes on the wire, buckets and owners of sharding a model, computed without processes.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--params", type=float, help="number of parameters of a LLaMA-like decoder, such as 7e9")
    what.add_argument("--model", help="module:function that returns a model (called with the meta device as default)")
    parser.add_argument("--ranks", type=int, required=True, help="number of ranks")
    parser.add_argument("--optimizer", default="Adam", help="a class of fastopt, or of torch.optim (default: Adam)")
    parser.add_argument("--dtype", default="float32", help="of the parameters (default: float32; not with --model)")
    parser.add_argument(
        "--master-weights", action="store_true", help="keep a float32 copy of parameters of low precision in the state"
    )
    parser.add_argument("--groups", type=int, default=1, help="parameter groups, by layers (default: 1; with --params)")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), action="append", help="only this one; may be repeated")
    parser.add_argument("--layout", choices=("even", "whole"), help="default: what the optimizer needs")
    parser.add_argument("--bucket-mb", type=float, help="size of a bucket in MiB (default: as `shard` chooses)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw it (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    return parser


def _plan(given: argparse.Namespace) -> Plan:
    model = _model(given)

    def make(params: Any) -> Optimizer:
        if isinstance(model, Decoder) and given.groups > 1:
            params = model.groups(given.groups)
        opt = _optimizer(given.optimizer)(params)
        opt.master_weights = given.master_weights
        return opt

    if given.groups > 1 and given.model:
        raise ValueError("--groups goes with --params; the groups of a model of your own are in plan(model, make=...)")
    stages = cast(list[Stage], given.stage or [1, 2, 3])
    size = None if given.bucket_mb is None else int(given.bucket_mb * 2**20)
    return plan(model, given.ranks, make, stages=stages, bucket_bytes=size, layout=given.layout)


def _model(given: argparse.Namespace) -> nn.Module:
    if given.params is not None:
        dtype = getattr(torch, given.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"--dtype {given.dtype} is no dtype of torch")
        return decoder(given.params, dtype)
    module, _, name = given.model.partition(":")
    if not name:
        raise ValueError(f"--model {given.model}: expected module:function")
    sys.path.insert(0, "")
    with torch.device("meta"):
        build = getattr(importlib.import_module(module), name)
        try:
            model = build()
        except TypeError as error:
            raise ValueError(f"--model {given.model}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {given.model} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def _optimizer(name: str) -> Callable[[Any], Optimizer]:
    """What makes the optimizer of that name from parameters."""
    own: Any = getattr(fastopt, name, None)
    if name == "Lookahead":
        return lambda params: own(fastopt.Adam(params))
    if isinstance(own, type) and issubclass(own, Optimizer) and own not in (Optimizer, OptimWrapper):
        return own
    foreign = getattr(torch.optim, name, None)
    if isinstance(foreign, type) and issubclass(foreign, torch.optim.Optimizer):
        return lambda params: OptimWrapper(params, opt=foreign)
    raise ValueError(f"--optimizer {name} is no optimizer of fastopt or torch.optim")


# ---- text


def report(found: Plan) -> Iterator[str]:
    """The plan as lines of text."""
    dtypes = sorted({str(spec.dtype).removeprefix("torch.") for spec in found.params})
    state = sum(b * spec.numel for b, spec in zip(found.state_bytes, found.params, strict=True)) / found.elements
    groups = len({spec.group for spec in found.params})
    yield (
        f"{found.elements:,} parameters in {len(found.params)} tensors ({', '.join(dtypes)}), "
        f"{groups} group{'s' * (groups != 1)}, on {found.ranks:,} ranks"
    )
    yield f"{found.optimizer} keeps {state:g} bytes of state per parameter"
    yield ""
    heads = ("stage", "layout", "params", "gradients", "state", "passing", "memory", "sent", "collectives", "imbalance")
    rows = [heads, *(_row(stage) for stage in found.stages)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    yield "memory: on the rank that holds most, without activations; passing: whole for a moment while it is moved;"
    yield "sent: by each rank in a step; imbalance: elements stepped by the rank with most, over the mean"
    yield ""
    for stage in found.stages:
        kind = "units" if stage.stage == 3 else "buckets"
        low, high = size(min(stage.sizes)), size(max(stage.sizes))
        idle = f"; {stage.idle:,} ranks own nothing" if stage.idle else ""
        yield f"stage {stage.stage}: {len(stage.sizes)} {kind} of {low} to {high}{idle}"
    yield ""
    yield from owners_text(found)


def _row(stage: StagePlan) -> tuple[str, ...]:
    memory = stage.memory
    parts = (memory.parameters, memory.gradients, memory.state, memory.passing, memory.total, stage.sent)
    return (str(stage.stage), stage.kind, *map(size, parts), str(stage.collectives), f"{stage.imbalance:.3f}")


if __name__ == "__main__":
    sys.exit(main())
