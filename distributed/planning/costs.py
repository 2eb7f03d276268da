"""What sharding a model over some ranks will cost, computed with the layouts that `shard` uses, in one process.

`plan(model, ranks)` takes a model on the meta device as well, which has shapes and no memory. All numbers are of one
training step: bytes on the rank that holds most, and bytes that a rank sends (as much as it receives). Activations,
what the collectives' library keeps, and the control messages of a few bytes are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...engine import run_eager
from ...engine.master import add_masters
from ...optimizer import Optimizer
from ...optimizers import Adam
from ...wrapper import OptimWrapper
from ..gradients.reductions import IN_FLIGHT
from ..ownership.fully_shard_rows import REST, Rows, Unit, loads_of_rows, units_of
from ..ownership.layout import Kind, Layout
from ..ownership.places import ParamSpec
from ..parameters.members import model_names

Stage = Literal[1, 2, 3]
Make = Callable[[Any], Optimizer]


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that holds most.

    Attributes:
        parameters: whole in stages 1 and 2, this rank's rows in stage 3.
        gradients: whole in stage 1, this rank's part in stages 2 and 3.
        state: of the optimizer.
        passing: what is whole for a moment: the gradients that backward has made for a bucket and the buffer in which
            one is sent (stage 2), parameters of two units and gradients of two (stage 3).
    """

    parameters: int
    gradients: int
    state: int
    passing: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.state + self.passing


@dataclass(frozen=True)
class StagePlan:
    """One stage of one plan.

    Attributes:
        stage: 1, 2, or 3 for `fully_shard`.
        kind: of the layout; `rows` in stage 3.
        memory: on the rank that holds most.
        sent: bytes that each rank sends in a step (the mean over the ranks in a `whole` layout).
        collectives: how many move parameters or gradients in a step.
        sizes: bytes of each bucket (of each unit in stage 3), padding included.
        elements: how many elements of parameters each rank steps.
    """

    stage: Stage
    kind: str
    memory: Memory
    sent: int
    collectives: int
    sizes: tuple[int, ...]
    elements: tuple[int, ...]

    @property
    def imbalance(self) -> float:
        """Elements of the rank that steps most, over the mean: 1 is even."""
        return max(self.elements) * len(self.elements) / max(sum(self.elements), 1)

    @property
    def idle(self) -> int:
        """How many ranks own nothing."""
        return sum(not n for n in self.elements)

    def summary(self) -> dict[str, Any]:
        """The numbers, as JSON takes them."""
        memory = {**vars(self.memory), "total": self.memory.total}
        return {
            "stage": self.stage,
            "layout": self.kind,
            "memory": memory,
            "sent": self.sent,
            "collectives": self.collectives,
            "sizes": {"count": len(self.sizes), "smallest": min(self.sizes), "largest": max(self.sizes)},
            "imbalance": round(self.imbalance, 4),
            "idle_ranks": self.idle,
        }


@dataclass(frozen=True)
class Plan:
    """What sharding will cost.

    Attributes:
        layout: who owns what in stages 1 and 2.
        units: what is gathered together in stage 3.
        state_bytes: bytes of optimizer state per element of each parameter.
        optimizer: its name.
        stages: one entry per stage that was asked for.
    """

    layout: Layout
    units: tuple[Unit, ...]
    state_bytes: tuple[float, ...]
    optimizer: str
    stages: tuple[StagePlan, ...]

    @property
    def params(self) -> tuple[ParamSpec, ...]:
        """The parameters."""
        return self.layout.params

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return self.layout.world_size

    @cached_property
    def elements(self) -> int:
        """Elements of all parameters."""
        return sum(spec.numel for spec in self.params)

    def summary(self) -> dict[str, Any]:
        """The numbers, as JSON takes them; all sizes in bytes."""
        return {
            "parameters": self.elements,
            "tensors": len(self.params),
            "groups": len({spec.group for spec in self.params}),
            "ranks": self.ranks,
            "optimizer": self.optimizer,
            "bucket_bytes": self.layout.bucket_bytes,
            "stages": [stage.summary() for stage in self.stages],
        }


def plan(
    model: nn.Module,
    ranks: int,
    make: Make = Adam,
    *,
    stages: Sequence[Stage] = (1, 2, 3),
    bucket_bytes: int | None = None,
    layout: Kind | None = None,
) -> Plan:
    """What sharding `model` over `ranks` ranks will cost.

    Args:
        model: on the meta device or any other; it is only looked at.
        ranks: how many there will be.
        make: makes the optimizer from `model.parameters()`, or from what it likes: its groups, chain and states count.
        stages: which ones to plan.
        bucket_bytes: as for `shard`.
        layout: 'even' or 'whole'; by default what the chain needs.

    Raises:
        TypeError: `model` is no module, or `make` makes no optimizer of this library.
        ValueError: numbers that make no sense, or an optimizer that reads values of tensors in its first step.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"plan() takes the model as an nn.Module, got a {type(model).__name__}")
    if not callable(make):
        raise TypeError(
            f"make is a function from parameters to an optimizer, as fastopt.Adam is; got an object of "
            f"{type(make).__name__}"
        )
    opt = make(model.parameters())
    if not isinstance(opt, Optimizer):
        raise TypeError(
            f"make gave a {type(opt).__name__}, expected an optimizer of fastopt (OptimWrapper for torch's)"
        )
    names = model_names(model)
    places = {key: place for place, key in enumerate(names)}
    specs = [
        ParamSpec(names.get(id(p), f"group {i}, parameter {j}"), tuple(p.shape), p.dtype, i, place=places.get(id(p), 0))
        for i, group in enumerate(opt.param_groups)
        for j, p in enumerate(group["params"])
    ]
    kind: Kind = layout or ("whole" if opt.needs == "whole" else "even")
    return plan_specs(
        specs, ranks, _state_bytes(opt), _name(opt), stages=stages, bucket_bytes=bucket_bytes, layout=kind
    )


def _name(opt: Optimizer) -> str:
    return type(opt.opt if isinstance(opt, OptimWrapper) else opt).__name__


def plan_specs(
    params: Iterable[ParamSpec],
    ranks: int,
    state_bytes: Sequence[float],
    optimizer: str = "the optimizer",
    *,
    stages: Sequence[Stage] = (1, 2, 3),
    bucket_bytes: int | None = None,
    layout: Kind = "even",
) -> Plan:
    """The same without a model: `state_bytes[i]` bytes of state per element of `params[i]`."""
    specs = tuple(params)
    if not set(stages) <= {1, 2, 3}:
        raise ValueError(f"stages are 1, 2 and 3, got {stages!r}")
    if not specs:
        raise ValueError("there are no parameters to plan for")
    if not any(spec.numel for spec in specs):
        raise ValueError("the parameters to plan for have no elements")
    made = Layout.make(layout, specs, ranks, bucket_bytes)
    units = units_of(specs)
    plans = tuple(
        _rows_plan(specs, ranks, units, state_bytes) if stage == 3 else _bucket_plan(stage, made, state_bytes)
        for stage in stages
    )
    return Plan(made, units, tuple(state_bytes), optimizer, plans)


def _state_bytes(opt: Optimizer) -> list[float]:
    """Bytes of state per element of every parameter after one step, which is made on tensors without memory."""
    work = []
    for i, group in enumerate(opt.param_groups):
        params = [torch.empty_like(p, device="meta", requires_grad=False) for p in group["params"]]
        for p in params:
            p.grad = torch.empty_like(p)
        work.append(opt.group_work(i, params, [{} for _ in params]))
    try:
        with torch.no_grad():
            if opt.master_weights:
                add_masters(work)
            run_eager(opt.cbs, work)
    except (RuntimeError, TypeError) as error:
        if isinstance(error, TypeError) and not isinstance(opt, OptimWrapper):
            raise  # a mistake in a callback
        raise ValueError(
            f"a step of {_name(opt)} cannot be made without numbers ({error}): give plan_specs() the bytes "
            f"of state per element"
        ) from error
    return [
        sum(value.nbytes for value in state.values() if isinstance(value, Tensor)) / max(p.numel(), 1)
        for each in work
        for p, state in zip(each.params, each.states, strict=True)
    ]


# Weights of elements are integers, so that sums over ranks are exact.
_PARTS = 1 << 10


def _weighed(loads: Sequence[int]) -> int:
    """The largest of loads that were counted in parts of bytes."""
    return math.ceil(max(loads) / _PARTS)


def _weights(state_bytes: Sequence[float]) -> list[int]:
    return [round(each * _PARTS) for each in state_bytes]


def _bucket_plan(stage: Stage, layout: Layout, state_bytes: Sequence[float]) -> StagePlan:
    """Stage 1 or 2: parameters are whole everywhere."""
    sizes = [bucket.numel * bucket.dtype.itemsize for bucket in layout.buckets]
    whole = sum(sizes)
    own = _regions(layout)
    n = layout.world_size
    memory = Memory(
        parameters=whole,
        gradients=own if stage == 2 else sum(spec.numel * spec.dtype.itemsize for spec in layout.params),
        state=_weighed(layout.loads(_weights(state_bytes))),
        passing=IN_FLIGHT * max(sizes, default=0) if stage == 2 else 0,
    )
    # Stage 1: somebody averages whole gradients, which is a reduce-scatter and an all-gather in one.
    once = whole * (n - 1) // n
    return StagePlan(
        stage,
        layout.kind,
        memory,
        sent=(3 if stage == 1 else 2) * once,
        collectives=2 * len(layout.buckets),
        sizes=tuple(sizes),
        elements=tuple(layout.loads()),
    )


def _regions(layout: Layout) -> int:
    """Bytes of the regions of the rank that has most."""
    if layout.kind == "even":
        return sum(bucket.numel * bucket.dtype.itemsize for bucket in layout.buckets) // layout.world_size
    own = [0] * layout.world_size
    for bucket in layout.buckets:
        for region in bucket.owned or ():
            own[region.rank] += region.numel * bucket.dtype.itemsize
    return max(own)


def _rows_plan(
    params: Sequence[ParamSpec], ranks: int, units: Sequence[Unit], state_bytes: Sequence[float]
) -> StagePlan:
    """Stage 3: every rank has rows of every parameter; the rest stays gathered between forward and backward."""
    padded = [Rows.of(spec, ranks).padded * spec.dtype.itemsize for spec in params]
    sizes = [ranks * sum(padded[i] for i in unit.params) for unit in units]
    resting = units[-1].name == REST
    again = sum(sizes) - (sizes[-1] if resting else 0)
    largest = sorted(sizes)[-2:]
    memory = Memory(
        parameters=sum(padded),
        gradients=max(loads_of_rows(params, ranks, [spec.dtype.itemsize for spec in params])),
        state=_weighed(loads_of_rows(params, ranks, _weights(state_bytes))),
        passing=2 * sum(largest),
    )
    return StagePlan(
        3,
        "rows",
        memory,
        sent=(2 * sum(sizes) + again) * (ranks - 1) // ranks,
        collectives=3 * len(units) - resting,
        sizes=tuple(sizes),
        elements=tuple(loads_of_rows(params, ranks)),
    )
