"""What the parameters of an optimizer are to a layout, and what must be equal of them on all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...bare import bare_model
from ...base import _BaseOptimizer
from ...optimizer import Optimizer
from ...spread import is_spread, part_of
from ..communication.collectives import Ranks
from ..ownership.places import ParamSpec
from ..ownership.tensor_parallel import meshes_of, part_in_whole, why_not
from .buckets import shared_memory


def model_names(model: nn.Module) -> dict[int, str]:
    """Fully-qualified names by the id of the parameter, without wrappers' prefixes; a tied one has its first name."""
    names = {}
    for name, p in bare_model(model).named_parameters():
        names[id(p)] = name.removeprefix("_orig_mod.").replace("._orig_mod.", ".")
    return names


Cost = Callable[[Tensor], float]


def specs_of(opt: _BaseOptimizer, model: nn.Module, ranks: Ranks, cost: Cost | None = None) -> list[ParamSpec]:
    """What the layout needs of every parameter of `opt`; a ValueError names those that cannot be sharded."""
    names = model_names(model)
    meshes = meshes_of(model.parameters())
    places = {key: place for place, key in enumerate(names)}
    specs, named = [], []
    for i, group in enumerate(opt.param_groups):
        for j, p in enumerate(group["params"]):
            if id(p) not in names:
                own = [repr(group["param_names"][j])] if "param_names" in group else []
                shown = ", ".join([*own, f"shape {tuple(getattr(p, 'shape', ()))}"])
                raise ValueError(
                    f"params[{j}] of group {i} ({shown}) is not a parameter of the model: build the optimizer from "
                    f"the parameters of the model that is sharded"
                )
            name = names[id(p)]
            _check_param(name, p, ranks)
            forced = bool(opt.state.get(p, {}).get("force_train", False))
            known = (name, tuple(part_of(p).shape), p.dtype, i, str(p.device), places[id(p)], forced)
            specs.append(ParamSpec(*known, cost=_cost(name, p, cost), part=part_in_whole(p, meshes)))
            named.append((name, p))
    known_ids = {id(p) for _, p in named}
    others = [(names[id(p)], p) for p in model.parameters() if id(p) not in known_ids]
    shared = shared_memory([(name, p) for name, p in named + others if p.device.type != "meta"])
    if shared:
        raise ValueError(
            f"{shared[0]!r} and {shared[1]!r} are different parameters in the same memory: tie them by assigning the "
            f"same Parameter to both modules"
        )
    return specs


def _cost(name: str, p: Tensor, cost: Cost | None) -> float | None:
    """What a step on `p` costs."""
    try:
        found = None if cost is None else float(cost(p))
    except (TypeError, ValueError) as error:
        raise TypeError(f"the cost of {name!r} is no number: {error}") from error
    if found is not None and not 0 <= found < math.inf:
        raise ValueError(f"the cost of {name!r} is {found}, expected a number that is not negative")
    return found


def _check_param(name: str, p: Tensor, ranks: Ranks) -> None:
    """Refuse a parameter that has no flat memory to be cut or that the process group cannot move."""
    if p.device.type == "meta":
        raise ValueError(f"{name!r} is on the meta device: materialise the model before sharding")
    if is_spread(p) and (why := why_not(p, ranks.group)):
        raise ValueError(f"{name!r} {why}")
    if p.layout != torch.strided:
        raise ValueError(f"{name!r} is a {type(p).__name__} of layout {p.layout}: shard() takes plain dense parameters")
    if p.is_complex():
        raise ValueError(f"{name!r} is complex: keep its real view (torch.view_as_real) as the parameter")
    if not ranks.reaches(p.device):
        raise ValueError(f"{name!r} is on {p.device}, which the process group has no backend for")


def about_groups(opt: Optimizer, specs: Sequence[ParamSpec]) -> dict[str, Any]:
    """Parameters and hypers of every group, by the place that they have on every rank."""
    report: dict[str, Any] = {}
    place: dict[int, int] = {}
    for spec in specs:
        j = place[spec.group] = place.get(spec.group, -1) + 1
        device = spec.device.partition(":")[0]
        more = ", force_train" if spec.forced else ""
        more += "" if spec.cost is None else f", cost {spec.cost}"
        report[f"params[{j}] of group {spec.group}"] = f"{spec.name!r} {spec.whole} {spec.dtype} on {device}{more}"
    report["order in the model"] = ", ".join(spec.name for spec in sorted(specs, key=lambda spec: spec.place))
    for i, group in enumerate(opt.param_groups):
        report[f"group {i}"] = f"{len(group['params'])} parameters{', frozen' if opt.is_frozen(i) else ''}"
        for name, value in sorted(opt.hypers_of(i).items()):
            report[f"hyper {name!r} of group {i}"] = value.tolist() if isinstance(value, Tensor) else value
    return report
