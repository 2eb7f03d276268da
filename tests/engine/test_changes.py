"""Whatever changes between two steps is right on the very next one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastopt import Adam, Larc, Optimizer, RAdam, Ranger

from .compare import side_by_side

ENGINES = ["foreach"]
each_engine = pytest.mark.parametrize("engine", ENGINES)


def _groups(ps: list[Tensor]) -> list[list[Tensor]]:
    return [ps[:2], ps[2:4], ps[4:]]


def adam(ps: list[Tensor], engine: str) -> Optimizer:
    return Adam(_groups(ps), lr=slice(1e-3, 1e-2), wd=[0.0, 0.1, 0.2], engine=engine)


def freeze(opt: Any, ps: list[Tensor], i: int) -> None:
    opt.freeze_to((0, 1, 3, 0, 2)[i] if i < 5 else 0)


def some_without_gradient(opt: Any, ps: list[Tensor], i: int) -> None:
    ps[i % len(ps)].grad = None


def clear(opt: Any, ps: list[Tensor], i: int) -> None:
    if i == 2:
        opt.clear_state()


def load(opt: Any, ps: list[Tensor], i: int) -> None:
    if i == 3:
        saved = {k: v for k, v in opt.state_dict().items()}
        saved["state"] = {
            n: {k: v.clone() * 2 if isinstance(v, Tensor) else v + 3 for k, v in e.items()}
            for n, e in saved["state"].items()
        }
        opt.load_state_dict(saved)


def move_data(opt: Any, ps: list[Tensor], i: int) -> None:
    ps[i % 3].data = ps[i % 3].data.clone() + 1


def replace_state(opt: Any, ps: list[Tensor], i: int) -> None:
    if i:
        opt.state[ps[0]]["grad_avg"] = torch.ones_like(ps[0])
        opt.state[ps[4]]["step"] = 7
        opt.state[ps[5]].clear()


def marks(opt: Any, ps: list[Tensor], i: int) -> None:
    opt.state[ps[i]]["do_wd"] = bool(i % 2)


def hypers(opt: Any, ps: list[Tensor], i: int) -> None:
    opt.set_hyper("lr", 0.01 / (i + 1))
    opt.hypers[1]["wd"] = 0.1 * (i % 2)
    opt.param_groups[2]["betas"] = (0.5, 0.9 - 0.1 * i)


WRITES: list[Callable[[Any], Any]] = [
    lambda groups: [group.__setitem__("lr", 0.01 * (k + 1)) for k, group in enumerate(groups)],
    lambda groups: groups[1].__setitem__("weight_decay", 0.3),
    lambda groups: groups[0].__setitem__("betas", (0.7, 0.8)),
    lambda groups: [group.update(lr=0.02, eps=1e-3) for group in groups],
    lambda groups: groups[2].__setitem__("initial_lr", 1.0),
    lambda groups: groups[0].__setitem__("lr", 1),
    lambda groups: groups[1].__setitem__("wd", 0.4),  # hides what the entry `weight_decay` says
    lambda groups: groups[1].__setitem__("weight_decay", 0.5),
    lambda groups: groups[1].pop("wd"),
    lambda groups: [group.__setitem__("eps", 1e-2 * (k + 1)) for k, group in enumerate(groups)],
]


def entries_of_groups(opt: Any, ps: list[Tensor], i: int) -> None:
    """Another sort of write before every second step, and one number before the others."""
    if i >= 2 and i % 2 == 0:
        WRITES[i // 2 - 1](opt.param_groups)
    elif i >= 2:
        opt.param_groups[i % 3]["lr"] *= 0.9


def add_group(opt: Any, ps: list[Tensor], i: int) -> None:
    if i == 2:
        extra = torch.full((3, 3), 0.5, requires_grad=True)
        opt.add_param_group({"params": [extra], "lr": 0.5})
    if i >= 2:
        opt.param_groups[-1]["params"][0].grad = torch.full((3, 3), float(i))


def other_layout(opt: Any, ps: list[Tensor], i: int) -> None:
    if i == 1:
        ps[4].data = ps[4].data.t().contiguous().t()
    if i == 2:
        ps[0].grad = ps[0].grad.t().contiguous().t()


def betas_in_place(opt: Any, ps: list[Tensor], i: int) -> None:
    if i == 3:
        opt.param_groups[0]["betas"] = [0.8, 0.9]  # as a configuration file has it
    if i == 5:
        opt.param_groups[0]["betas"][0] = 0.2


CHANGES = [
    betas_in_place,
    freeze,
    some_without_gradient,
    clear,
    load,
    move_data,
    replace_state,
    marks,
    hypers,
    add_group,
    other_layout,
]


@each_engine
def test_entries_that_are_written_to_groups(engine: str) -> None:
    side_by_side(adam, engine, torch.float32, steps=2 + 2 * len(WRITES), between=entries_of_groups)


@each_engine
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes_between_steps(engine: str, change: Any) -> None:
    _, opt = side_by_side(adam, engine, torch.float32, steps=6, between=change)
    assert "eager" not in {choice.executor for choice in opt.engine}


@each_engine
def test_the_branches_of_radam_and_ranger(engine: str) -> None:
    side_by_side(lambda ps, e: RAdam(ps, sqr_mom=0.9, engine=e), engine, torch.float32, steps=9)
    side_by_side(lambda ps, e: Ranger(_groups(ps), k=[2, 3, 4], engine=e), engine, torch.float32, steps=9)


@each_engine
def test_an_lr_that_is_a_tensor(engine: str) -> None:
    def build(ps: list[Tensor], e: str) -> Optimizer:
        return Larc(ps, lr=torch.tensor(0.1), wd=0.1, engine=e)

    def fill(opt: Any, ps: list[Tensor], i: int) -> None:
        opt.param_groups[0]["lr"].fill_(0.1 / (i + 1))

    side_by_side(build, engine, torch.float32, between=fill)


@each_engine
def test_one_recording_serves_all_groups_and_steps(engine: str) -> None:
    _, opt = side_by_side(adam, engine, torch.float32, steps=6)
    assert len(opt.program()) == 4  # with and without decay (wd=0), the first step and the others


def test_an_optimizer_is_copied_and_pickled_without_its_engine() -> None:
    import copy
    import pickle

    p = torch.ones(3, requires_grad=True)
    opt = Adam([p], engine="foreach")
    p.grad = torch.ones(3)
    opt.step()
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        (q,) = twin.param_groups[0]["params"]
        q.grad = torch.ones(3)
        twin.step()
        assert twin.state[q]["step"] == 2
        assert twin.engine[0].executor == "foreach"


@pytest.mark.parametrize("groups", [1, 3])
def test_ways_that_were_recorded_before_cost_no_new_look_at_everything(
    groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third step of this Lookahead is another program; after two rounds both are known."""
    from fastopt.engine import run

    sorted_out = []
    original = run.make_cohorts
    monkeypatch.setattr(run, "make_cohorts", lambda *args: sorted_out.append(1) or original(*args))

    def build(ps: list[Tensor], engine: str) -> Optimizer:
        return Ranger(ps if groups == 1 else _groups(ps), lr=0.1, k=3, engine=engine)

    def between(opt: Any, ps: list[Tensor], i: int) -> None:
        if i == 16:
            sorted_out.clear()

    side_by_side(build, "foreach", torch.float32, steps=30, between=between)
    assert not sorted_out


@pytest.fixture
def by_columns(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let `foreach` take scalars by columns, as kernels on GPUs do; counts the steps that came so."""
    from fastopt.engine import run
    from fastopt.engine.recording.chain import Row

    came: list[int] = []
    steady, blocks = run.Steady, run.run_blocks

    def run_blocks(cohorts: Any, reduce: Any) -> None:
        for cohort in cohorts:
            if cohort.table is not None:
                came.append(len(cohort.rows))
                before, cohort.rows = cohort.rows, [Row(scalars) for scalars in cohort.table.T.tolist()]
                for old, new in zip(before, cohort.rows, strict=True):
                    new.recorded, new.kind, new.states = old.recorded, old.kind, old.states
        blocks(cohorts, reduce)

    monkeypatch.setattr(run, "Steady", lambda work, cohorts, chain, _: steady(work, cohorts, chain, True))
    monkeypatch.setattr(run, "run_blocks", run_blocks)
    return came


def test_scalars_by_columns_follow_every_way_of_the_chain(by_columns: list[int]) -> None:
    """Every third step of this Lookahead is another program, and the learning rates change before every second."""

    def build(ps: list[Tensor], engine: str) -> Optimizer:
        return Ranger([[p] for p in ps], lr=slice(1e-3, 1e-1), k=3, engine=engine)

    def between(opt: Any, ps: list[Tensor], i: int) -> None:
        if i % 2:
            opt.set_hyper("lr", [0.1 / (i + j + 1) for j in range(len(ps))])

    shapes = ((4, 5), (7,), (3, 0), (33, 40))
    side_by_side(build, "foreach", torch.float32, steps=16, between=between, shapes=shapes)
    assert len(by_columns) >= 10
    assert set(by_columns) == {len(shapes)}


def test_columns_follow_entries_that_are_written_to_groups(by_columns: list[int]) -> None:
    def build(ps: list[Tensor], engine: str) -> Optimizer:
        return Adam(_groups(ps), lr=slice(1e-3, 1e-2), wd=0.1, engine=engine)

    steps = 2 + 2 * len(WRITES)
    shapes = ((4, 5), (7,), (3, 0), (33, 40), (5,))
    side_by_side(build, "foreach", torch.float32, steps=steps, between=entries_of_groups, shapes=shapes)
    assert len(by_columns) >= 4


def test_only_what_was_written_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule that writes one entry of each of many groups does not have all of their hypers collected anew."""
    ps = [torch.ones(2, requires_grad=True) for _ in range(20)]
    opt = Adam([[p] for p in ps], engine="foreach")
    for p in ps:
        p.grad = torch.ones(2)
    opt.step()
    opt.step()
    monkeypatch.setattr(type(opt), "hypers_of", lambda self, i: pytest.fail(f"group {i} was looked at"))
    for group in opt.param_groups:
        group["lr"] *= 0.5
    opt.step()
    before = [p.detach().clone() for p in ps]
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.step()
    assert all(torch.equal(p, was) for p, was in zip(ps, before, strict=True))
