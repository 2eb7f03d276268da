"""Parameters, gradients and reference runs that the tests of sharding share.

Gradients are small multiples of 1/16: sums over up to four ranks are exact in float32 and in bfloat16, so that averages
do not depend on the order of summation and a single process can be given the very same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastopt

Shape = tuple[int, ...]

SHAPES: tuple[tuple[Shape, ...], ...] = (
    ((3, 5), (7,), ()),
    ((13, 3), (1,), (0, 4), (2, 2, 3)),
    ((5,), (4, 6)),
)
"""Three groups: uneven sizes, a 0-d parameter, one without elements, one of one element."""

Groups = list[dict[str, Any]]
Build = Callable[[Groups], fastopt.Optimizer]

ELEMENTWISE: dict[str, Build] = {
    "sgd": lambda g: fastopt.SGD(g, lr=0.1, wd=0.01),
    "sgd+mom": lambda g: fastopt.SGD(g, lr=0.1, mom=0.9, wd=0.01, decouple_wd=False),
    "rmsprop": lambda g: fastopt.RMSProp(g, lr=0.1, mom=0.9, wd=0.01),
    "adam": lambda g: fastopt.Adam(g, lr=0.1, wd=0.01),
    "radam": lambda g: fastopt.RAdam(g, lr=0.1, wd=0.01),
    "qhadam": lambda g: fastopt.QHAdam(g, lr=0.1, wd=0.01),
    "lookahead": lambda g: fastopt.Lookahead(fastopt.SGD(g, lr=0.1, mom=0.9), k=3),
    "ranger": lambda g: fastopt.ranger(g, lr=0.1, k=2),
    # Steps whole parameters on their owners: the same arithmetic on the same numbers.
    "adamw": lambda g: fastopt.OptimWrapper(torch.optim.AdamW(g, lr=0.1, foreach=False)),
}
NORM: dict[str, Build] = {
    "larc": lambda g: fastopt.Larc(g, lr=0.1, mom=0.9, wd=0.01),
    "lamb": lambda g: fastopt.Lamb(g, lr=0.1, wd=0.01),
}
EVERY = ELEMENTWISE | NORM


class Model(nn.Module):
    """Parameters of the given shapes (a list per group) with reproducible values and the names `g0.0`, `g0.1`, ..."""

    def __init__(self, shapes: Sequence[Sequence[Shape]] = SHAPES, dtypes: Sequence[torch.dtype] = ()) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.groups = []
        for i, group in enumerate(shapes):
            members = nn.ParameterList()
            for j, shape in enumerate(group):
                dtype = dtypes[j % len(dtypes)] if dtypes else torch.float32
                members.append(nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
            self.add_module(f"g{i}", members)
            self.groups.append(members)

    def param_groups(self, split: bool = True) -> Groups:
        """One group per list of shapes with its own lr, or all parameters in one."""
        if not split:
            return [{"params": [p for members in self.groups for p in members]}]
        return [{"params": list(members), "lr": 0.1 / (i + 1)} for i, members in enumerate(self.groups)]


def gradient(step: int, index: int, rank: int, like: Tensor) -> Tensor:
    """The gradient of parameter `index` on `rank` at `step`: multiples of 1/16 between -1/2 and 1/2."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * index + rank)
    return (torch.randint(-8, 9, like.shape, generator=generator) / 16).to(like)


def average(step: int, index: int, ranks: Sequence[int], world_size: int, like: Tensor) -> Tensor:
    """The gradient averaged over `world_size` ranks of which only `ranks` have one."""
    total = torch.zeros_like(like)
    for rank in ranks:
        total += gradient(step, index, rank, like)
    return total / world_size


def members(opt: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters of an optimizer, in order."""
    return [p for group in opt.param_groups for p in group["params"]]


def set_average(opt: torch.optim.Optimizer, step: int, world_size: int) -> None:
    """Give every parameter the average of all ranks' gradients, as DistributedDataParallel would."""
    for i, p in enumerate(members(opt)):
        p.grad = average(step, i, range(world_size), world_size, p.detach())


def set_own(opt: torch.optim.Optimizer, step: int, rank: int) -> None:
    """Give every parameter this rank's gradient."""
    for i, p in enumerate(members(opt)):
        p.grad = gradient(step, i, rank, p.detach())


def feed(opt: torch.optim.Optimizer, stage: int, step: int, rank: int, world_size: int) -> None:
    """What stands in `p.grad` when a sharded optimizer of `stage` steps."""
    if stage == 1:
        set_average(opt, step, world_size)
    else:
        set_own(opt, step, rank)


def assert_same(got: Any, want: Any, what: str, exact: bool = True) -> None:
    """Compare tensors (bit for bit, or within some units in the last place) or plain values."""
    if not isinstance(want, Tensor):
        assert got == want, f"{what}: {got} instead of {want}"
        return
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{what}: {got.dtype} instead of {want.dtype}"
    if exact:
        assert torch.equal(got, want), f"{what}: off by {(got - want).abs().max()}"
    else:
        torch.testing.assert_close(got, want, rtol=3e-6, atol=1e-6, msg=lambda text: f"{what}: {text}")


def assert_same_run(sharded: Any, plain: torch.optim.Optimizer, what: str, exact: bool = True) -> None:
    """Parameters on every rank, and the consolidated state on rank 0, are those of the single process. Collective."""
    sharded.synchronize()
    for i, (p, q) in enumerate(zip(members(sharded), members(plain), strict=True)):
        assert_same(p.detach(), q.detach(), f"{what}: parameter {i}", exact)
    sharded.consolidate_state_dict(to=0)
    if sharded.rank or sharded._ranks.copy:
        return
    got, want = sharded.state_dict(), plain.state_dict()
    # A sharded optimizer knows the names in the model, and shows them beside all that one process shows.
    unnamed = [{key: value for key, value in group.items() if key != "param_names"} for group in got["param_groups"]]
    assert unnamed == want["param_groups"], what
    assert got["state"].keys() == want["state"].keys(), what
    for i, entry in want["state"].items():
        assert got["state"][i].keys() == entry.keys(), f"{what}: state of parameter {i}"
        for key, value in entry.items():
            assert_same(got["state"][i][key], value, f"{what}: {key} of parameter {i}", exact)
