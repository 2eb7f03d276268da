"""`shard`: from an optimizer and a model to the same optimizer with its state spread over the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..engine import cb_name
from ..optimizer import Optimizer
from ..wrapper import TorchStep, evaluates_closure
from .buckets import shared_memory
from .collectives import Ranks
from .consistency import agree_fully
from .layout import BUCKET_BYTES, Kind, Layout, ParamSpec
from .sharded import ShardedOptimizer

# What wrappers put before the names of a model's parameters.
_WRAPPERS = ("module.", "_orig_mod.")


def shard(
    opt: Optimizer,
    model: nn.Module,
    stage: int = 2,
    group: dist.ProcessGroup | None = None,
    *,
    bucket_bytes: int = BUCKET_BYTES,
) -> ShardedOptimizer:
    """The optimizer `opt` of `model`, with its state (and in stage 2 its gradients) spread over the ranks. Collective.

    Parameters and buffers of the model take the values of rank 0. The parameters become views of flat buffers: move the
    model to its device and dtype before. Parameters of the model that `opt` does not have are never updated.
    Without an initialised process group, or with one rank, the result works without communication.

    Args:
        opt: an optimizer of this library; its chain decides how parameters are cut (`opt.needs`).
        model: the module that has the parameters. In stage 1 it may be wrapped in DistributedDataParallel.
        stage: 1: gradients are averaged already when `step` is called, by DistributedDataParallel or by hand.
            2: the model is not wrapped; gradients are summed over the ranks as backward makes them, each rank keeps its
            part of the average, and `p.grad` is gone. Every rank must make equally many synchronised backward passes.
        group: the ranks that take part, all by default.
        bucket_bytes: size of the flat buffers in bytes.

    Raises:
        RanksDiffer: on all ranks, naming what differs: names, shapes, dtypes, groups, hyper-parameters, chain, stage.
        TypeError, ValueError: on all ranks, something that cannot be sharded.
    """
    ranks = Ranks.of(group)
    params: list[Tensor] = []
    specs: list[ParamSpec] = []
    problem: Exception | None = None
    try:
        _check(opt, model, stage)
        params = [p for each in opt.param_groups for p in each["params"]]
        specs = _specs(opt.param_groups, model, ranks)
        report = {**_about(opt, stage, bucket_bytes), **_about_groups(opt, specs)}
    except (TypeError, ValueError) as error:
        problem, report = error, {"problem": str(error)}
    agree_fully(ranks, report)
    if problem:
        raise problem
    kind: Kind = "whole" if opt.needs == "whole" else "even"
    layout = Layout.make(kind, specs, ranks.world_size, bucket_bytes)

    sharded = ShardedOptimizer(opt, model, ranks, layout, params, cast(Literal[1, 2], stage))
    _broadcast_rest(model, params, ranks)
    return sharded


def extend(opt: ShardedOptimizer, param_group: dict[str, Any]) -> None:
    """Add a group to a sharded optimizer, on all ranks or on none."""
    ranks, index = opt._ranks, len(opt.param_groups)
    params: list[Tensor] = []
    specs: list[ParamSpec] = []
    problem: Exception | None = None
    try:
        opt.opt.add_param_group(param_group)
        params = list(opt.param_groups[index]["params"])
        specs = [spec for spec in _specs(opt.param_groups, opt.model, ranks) if spec.group == index]
        report = _about_groups(opt.opt, specs)
    except Exception as error:
        problem, report = error, {"problem": str(error)}
    try:
        agree_fully(ranks, report)
        if problem:
            raise problem
    except Exception:
        del opt.param_groups[index:]
        raise
    opt._extend(opt.layout.extended(specs), params)


def _check(opt: Any, model: Any, stage: Any) -> None:
    """Refuse what is no optimizer, no model or no stage."""
    if isinstance(opt, ShardedOptimizer):
        raise TypeError("this optimizer is sharded already")
    if not isinstance(opt, Optimizer):
        hint = ": wrap it in fastopt.OptimWrapper" if isinstance(opt, torch.optim.Optimizer) else ""
        raise TypeError(f"shard() takes an optimizer of fastopt, got a {type(opt).__name__}{hint}")
    for cb in opt.cbs:
        if isinstance(cb, TorchStep) and evaluates_closure(cb.opt):
            raise TypeError(
                f"{type(cb.opt).__name__} couples all parameters and evaluates the loss itself: not shardable"
            )
    if not isinstance(model, nn.Module):
        raise TypeError(f"shard() takes the model as an nn.Module, got a {type(model).__name__}")
    if stage not in (1, 2):
        hint = ", stage 3 is torch.distributed.fsdp.fully_shard(model)" if stage == 3 else ""
        raise ValueError(f"stage is 1 or 2{hint}; got {stage!r}")
    if stage == 2 and isinstance(model, DistributedDataParallel):
        raise ValueError("stage 2 averages gradients itself: pass model.module and train that, or use stage=1")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ValueError(f"{name!r} makes sparse gradients, which have no slices: build it with sparse=False")


def model_names(model: nn.Module) -> dict[int, str]:
    """Fully-qualified names by the id of the parameter, without wrappers' prefixes; a tied one has its first name."""
    names = {}
    for name, p in model.named_parameters():
        while name.startswith(_WRAPPERS):
            name = name.removeprefix(next(w for w in _WRAPPERS if name.startswith(w)))
        names[id(p)] = name.replace("._orig_mod.", ".")
    return names


def _specs(groups: Iterable[dict[str, Any]], model: nn.Module, ranks: Ranks) -> list[ParamSpec]:
    """What the layout needs of every parameter of `groups`; a ValueError names those that cannot be sharded."""
    names = model_names(model)
    specs, named = [], []
    for i, group in enumerate(groups):
        for j, p in enumerate(group["params"]):
            if id(p) not in names:
                own = [repr(group["param_names"][j])] if "param_names" in group else []
                known = ", ".join([*own, f"shape {tuple(getattr(p, 'shape', ()))}"])
                raise ValueError(
                    f"params[{j}] of group {i} ({known}) is not a parameter of the model: build the optimizer from "
                    f"the parameters of the model that is sharded"
                )
            name = names[id(p)]
            _check_param(name, p, ranks)
            specs.append(ParamSpec(name, tuple(p.shape), p.dtype, i, str(p.device)))
            named.append((name, p))
    others = [(names[id(p)], p) for p in model.parameters() if all(p is not q for _, q in named)]
    shared = shared_memory([(name, p) for name, p in named + others if p.device.type != "meta"])
    if shared:
        raise ValueError(
            f"{shared[0]!r} and {shared[1]!r} are different parameters in the same memory: tie them by assigning the "
            f"same Parameter to both modules"
        )
    return specs


def _check_param(name: str, p: Tensor, ranks: Ranks) -> None:
    """Refuse a parameter that has no flat memory to be cut or that the process group cannot move."""
    if p.device.type == "meta":
        raise ValueError(f"{name!r} is on the meta device: materialise the model before sharding")
    if hasattr(p, "placements") or p.layout != torch.strided:
        raise ValueError(f"{name!r} is a {type(p).__name__} of layout {p.layout}: shard() takes plain dense parameters")
    if p.is_complex():
        raise ValueError(f"{name!r} is complex: keep its real view (torch.view_as_real) as the parameter")
    if not ranks.reaches(p.device):
        raise ValueError(f"{name!r} is on {p.device}, which the process group has no backend for")


def _about(opt: Optimizer, stage: int, bucket_bytes: int) -> dict[str, Any]:
    """What must be equal on all ranks, apart from the groups."""
    return {
        "optimizer": type(opt).__name__,
        "chain": ", ".join(cb_name(cb) for cb in opt.cbs),
        "stage": stage,
        "bucket_bytes": bucket_bytes,
        "number of groups": len(opt.param_groups),
    }


def _about_groups(opt: Optimizer, specs: Sequence[ParamSpec]) -> dict[str, Any]:
    """Parameters and hypers of every group, by the place that they have on every rank."""
    report: dict[str, Any] = {}
    place: dict[int, int] = {}
    for spec in specs:
        j = place[spec.group] = place.get(spec.group, -1) + 1
        device = spec.device.partition(":")[0]
        report[f"params[{j}] of group {spec.group}"] = f"{spec.name!r} {spec.shape} {spec.dtype} on {device}"
    for i, group in enumerate(opt.param_groups):
        report[f"group {i}"] = f"{len(group['params'])} parameters{', frozen' if opt.is_frozen(i) else ''}"
        for name, value in sorted(opt.hypers_of(i).items()):
            report[f"hyper {name!r} of group {i}"] = value.tolist() if isinstance(value, Tensor) else value
    return report


def _broadcast_rest(model: nn.Module, sharded: Sequence[Tensor], ranks: Ranks) -> None:
    """Give buffers, and parameters that the optimizer does not have, the values of rank 0."""
    done = {id(p) for p in sharded}
    rest: list[Tensor] = [p for p in model.parameters() if id(p) not in done]
    for tensor in [*rest, *model.buffers()]:
        if tensor.device.type != "meta":
            ranks.broadcast(tensor)
