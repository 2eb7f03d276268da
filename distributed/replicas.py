"""Are the replicas of a model still equal? Ranks that have diverged train on, and nothing else says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..spread import is_spread, part_of
from .checks.diverged import DIVERGED, refuse_diverged, state_numbers
from .parameters.gathering import synchronize_model
from .parameters.members import model_names
from .sharded import ShardedOptimizer

_MEMBERS = ("params", "param_names")


def check_replicas(
    model: nn.Module,
    opt: torch.optim.Optimizer | None = None,
    group: dist.ProcessGroup | None = None,
    *,
    buffers: bool = False,
) -> None:
    """Check that all ranks have the same parameters, bit for bit, and the same settings of the optimizer. Collective.

    Parameters differ after a rank alone has written to some, has loaded another checkpoint or was seeded otherwise, or
    after a fault of memory. Each rank makes a checksum of each on its device, and the ranks exchange one small message:
    cheap enough for every few hundred steps. Without an initialised process group there is nothing to compare.

    Args:
        model: on every rank; DistributedDataParallel around it does not matter. Parameters that are spread over these
            ranks (`fully_shard`) are left out.
        opt: its groups' settings and numbers of steps are compared too, and its state where that is not sharded.
        group: the ranks to compare, by default those over which `shard` has spread `opt`, without it all.
        buffers: whether to compare buffers. Running statistics of batch normalisation are each rank's own.

    Raises:
        RanksDiffer: on all ranks; names what differs, and between which ranks.
        ValueError: every parameter is spread over the ranks.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    synchronize_model(model)
    opt = _unwrapped(opt)
    ranks = opt._ranks if isinstance(opt, ShardedOptimizer) and group is None else None
    if ranks is not None and ranks.alone:
        return
    members = dist.get_process_group_ranks(group if ranks is None else ranks.control)

    def gather(thing: Any) -> list[Any]:
        if ranks is not None:
            return ranks.gather_everywhere(thing)
        things: list[Any] = [None] * len(members)
        dist.all_gather_object(things, thing, group=group)
        return things

    names = model_names(model)
    tensors = dict(_parameters(model, names, buffers, members))
    settings: dict[str, Any] = {f"requires_grad of {names[id(p)]!r}": p.requires_grad for p in model.parameters()}
    if opt is not None:
        settings.update(_settings(opt, names))
        tensors.update(_states(opt, names, members))
    refuse_diverged(gather, settings, tensors, DIVERGED, members)


def _unwrapped(opt: Any) -> Any:
    """The optimizer inside of Accelerate's and Lightning's."""
    while isinstance(inner := getattr(opt, "optimizer", None), torch.optim.Optimizer):
        opt = inner
    return opt


def _parameters(
    model: nn.Module, names: Mapping[int, str], buffers: bool, members: Sequence[int]
) -> Iterator[tuple[str, Tensor]]:
    """What all ranks have of the model."""
    found: list[tuple[str, Tensor]] = [(f"parameter {names[id(p)]!r}", p) for p in model.parameters()]
    held = [(what, p) for what, p in found if is_lazy(p) or _is_copied(p, members)]
    if found and not held:
        raise ValueError(
            "every parameter of the model is spread over these ranks, and none has a copy: pass group=, ranks that "
            "hold the same parts, such as mesh['replicate'].get_group()"
        )
    if buffers:
        held += [(f"buffer {name!r}", b) for name, b in model.named_buffers() if _is_copied(b, members)]
    yield from ((what, part_of(x).detach()) for what, x in held if not is_lazy(x) and x.device.type != "meta")


def _is_copied(x: Any, members: Sequence[int]) -> bool:
    """Whether all `members` hold the same part of `x`. Ranks that are not in its mesh have one like it."""
    if not is_spread(x):
        return True
    mesh = x.device_mesh.mesh
    places = torch.isin(mesh, torch.tensor(members, device=mesh.device)).nonzero()
    apart = (places.amax(0) != places.amin(0)).tolist()
    return all(placement.is_replicate() for placement, differ in zip(x.placements, apart, strict=True) if differ)


def _settings(opt: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """What the groups say, and numbers in the state such as that of the steps."""
    told: dict[str, Any] = {}
    for i, group in enumerate(opt.param_groups):
        told[f"parameters of group {i}"] = len(group["params"])
        told.update({f"{key!r} of group {i}": _plain(group[key]) for key in sorted(group) if key not in _MEMBERS})
    if isinstance(opt, ShardedOptimizer) and opt.layout.kind == "whole":
        return told  # others have other states
    return told | state_numbers(opt.state, names)


def _plain(value: Any) -> str:
    return repr(value.tolist() if isinstance(value, Tensor) else value)


def _states(
    opt: torch.optim.Optimizer, names: Mapping[int, str], members: Sequence[int]
) -> Iterator[tuple[str, Tensor]]:
    """Tensors in the state, where it is not sharded."""
    if isinstance(opt, ShardedOptimizer):
        return
    for p, entry in opt.state.items():
        for key, value in entry.items():
            if isinstance(value, Tensor) and id(p) in names and _is_copied(p, members):
                yield f"state {key!r} of {names[id(p)]!r}", part_of(value).detach()
