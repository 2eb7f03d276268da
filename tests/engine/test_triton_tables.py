"""What kernels would be launched with, without Triton: every parameter of a step, once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastopt import Adam, Optimizer, RAdam, Ranger
from fastopt.engine import run
from fastopt.engine.executors import triton_run
from fastopt.engine.executors.triton_source import Layout
from fastopt.engine.recording.chain import PARAM
from fastopt.engine.recording.program import Program


class Noting:
    """Stands for the kernels of a program, and notes which parameters they are launched for."""

    def __init__(self, launched: Counter[int], program: Program) -> None:
        self.program, self.layout = program, Layout(program)
        self.functions = self
        self.compiled: set[tuple[Any, ...]] = set()
        self._launched = launched

    def __getitem__(self, name: str) -> dict[tuple[int], Callable[..., None]]:
        return _AnyGrid(partial(self._note, name))

    def _note(self, name: str, addresses: Tensor, *arguments: Any, **options: Any) -> None:
        if name == "pass_0":
            self._launched.update(addresses[self.layout.places.index(PARAM)].tolist())


class _AnyGrid(dict[tuple[int], Callable[..., None]]):
    def __init__(self, launcher: Callable[..., None]) -> None:
        super().__init__()
        self._launcher = launcher

    def __missing__(self, grid: tuple[int]) -> Callable[..., None]:
        return self._launcher


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    found: Counter[int] = Counter()
    kernels: dict[Program, Noting] = {}

    def kernels_of(program: Program) -> Noting:
        return kernels.setdefault(program, Noting(found, program))

    monkeypatch.setattr(triton_run, "kernels_of", kernels_of)
    monkeypatch.setattr(triton_run, "interpreted", lambda: True)
    monkeypatch.setattr(run, "triton_is_there", lambda: True)
    monkeypatch.setattr(run, "interpreted", lambda: True)
    return found


@pytest.mark.parametrize("late", [1, 2, 3])
@pytest.mark.parametrize("build", [RAdam, partial(Ranger, k=3)], ids=["radam", "ranger"])
def test_cohorts_that_come_to_step_by_the_same_program(
    launched: Counter[int], build: Callable[..., Optimizer], late: int
) -> None:
    """Unfrozen later, when their numbers have led them the same way, they still have tables of their own."""
    ps = [torch.nn.Parameter(torch.ones(n)) for n in (4, 3000, 8, 5)]
    opt = build([[p] for p in ps], lr=0.1, sqr_mom=0.9, engine="triton")
    for step in range(20):
        stepping = ps[late:] if step < 7 else ps
        for p in stepping:
            p.grad = torch.ones_like(p)
        launched.clear()
        opt.step()
        assert launched == Counter(p.data_ptr() for p in stepping), step
    assert {choice.executor for choice in opt.engine} == {"triton"}


def test_a_graph_goes_on_with_the_tables_that_it_has_captured(
    launched: Counter[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where fewer tensors step, nor afterwards: tables are elsewhere then, and the graph reads the old ones."""
    ps = [torch.nn.Parameter(torch.ones(n)) for n in (4, 3000, 8)]
    for p in ps:
        p.grad = torch.ones_like(p)
    opt = Adam(ps, lr=0.1, engine="triton")
    for _ in range(3):
        opt.step()
    with monkeypatch.context() as patch:
        patch.setattr(triton_run, "_capturing", lambda device: True)
        opt.step()
    for lr in (0.2, 0.3):
        opt.set_hyper("lr", lr)
        opt.prepare_replay()
    ps[1].grad, left_out = None, ps[1].grad
    for _ in range(2):
        with pytest.raises(RuntimeError, match="capture it anew"):
            opt.prepare_replay()
    ps[1].grad = left_out
    with pytest.raises(RuntimeError, match="capture it anew"):
        opt.prepare_replay()
