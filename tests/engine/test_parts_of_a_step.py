"""A step that is made in several parts is the same as one that is made at once, whatever the parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastopt
from fastopt.engine import GroupWork

BUILD: dict[str, Callable[..., Any]] = {
    "adam": lambda params, engine: fastopt.Adam(params, lr=0.1, wd=0.01, engine=engine),
    "ranger": lambda params, engine: fastopt.ranger(params, lr=0.1, k=2, engine=engine),
}


def make(build: Callable[..., Any], engine: str) -> tuple[list[torch.nn.Parameter], Any]:
    params = [torch.nn.Parameter(torch.linspace(-1, 1, 3 + i)) for i in range(6)]
    return params, build([params[:2], params[2:]], engine)


def work_on(opt: Any, chosen: list[torch.nn.Parameter]) -> list[GroupWork]:
    """The work on some of the parameters."""
    found = []
    for i, group in enumerate(opt.param_groups):
        params = [p for p in group["params"] if any(p is q for q in chosen)]
        if params:
            found.append(opt.group_work(i, params, [opt.state[p] for p in params]))
    return found


@pytest.mark.parametrize("engine", ["foreach", "eager"])
@pytest.mark.parametrize("name", BUILD)
def test_parts_make_the_step_that_the_whole_makes(name: str, engine: str) -> None:
    """Parts of changing size, and steps at once between them: what one has found out does not serve another."""
    ours, opt = make(BUILD[name], engine)
    theirs, plain = make(BUILD[name], engine)
    cuts = [(6,), (2, 4, 6), (2, 4, 6), (2, 4, 6), (6,), (6,), (3, 6), (2, 4, 6), (3, 6), (3, 6)]
    for step, ends in enumerate(cuts):
        for p, q in zip(ours, theirs, strict=True):
            p.grad, q.grad = (torch.full_like(p, (step + 1) / 8) for _ in range(2))
        for each in (opt, plain):
            each.set_hyper("lr", 0.1 / (1 + step // 3))
        start = 0
        for number, end in enumerate(ends):
            opt.run(work_on(opt, ours[start:end]), part=number)
            start = end
        plain.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q), f"step {step}"
            a, b = dict(opt.state[p]), dict(plain.state[q])
            assert a.keys() == b.keys()
            same = [torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a]
            assert all(same), f"step {step}: {a} {b}"


def test_parts_are_found_again() -> None:
    """From the second step on each part is like its last one: nothing is sorted anew."""
    params, opt = make(BUILD["adam"], "foreach")
    kept: list[Any] = []
    for _ in range(4):
        for p in params:
            p.grad = torch.ones_like(p)
        for number, end in enumerate((2, 4, 6)):
            opt.run(work_on(opt, params[end - 2 : end]), part=number)
        kept.append(dict(opt.runner._steady))
    assert kept[2].keys() == {0, 1, 2}
    assert all(kept[2][part] is kept[3][part] for part in kept[2])
