"""The executor `foreach` against `eager`: the same bits for whatever is recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastopt import Adam, Lamb, Optimizer
from fastopt.engine.executors import blocks
from tests.fastopt.samples import Case, every_native

from .chains import FOREIGN, foreign, random_chains
from .compare import assert_near, side_by_side

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def with_engine(case: Case) -> Any:
    """Build a case with an executor, also where the optimizer is wrapped and takes none."""

    def build(ps: Any, engine: str) -> Optimizer:
        opt = case(ps)
        opt._engine = engine
        return opt

    return build


@every_native
@each_dtype
def test_every_optimizer_gives_the_same_bits(case: Case, dtype: torch.dtype) -> None:
    _, opt = side_by_side(with_engine(case), "foreach", dtype, steps=8)
    assert {choice.executor for choice in opt.engine} == {"foreach"}


@pytest.mark.parametrize("name", FOREIGN)
@each_dtype
def test_foreign_chains_are_recorded_without_help(name: str, dtype: torch.dtype) -> None:
    exact = name != "centered"  # a mean is summed in float64
    check = {} if exact else {"check": lambda a, b, where: assert_near(a, b, where, 4)}
    _, opt = side_by_side(lambda ps, engine: foreign(name, ps, engine), "foreach", dtype, **check)
    assert {choice.executor for choice in opt.engine} == {"foreach"}


@given(
    chain=random_chains(norms=True),
    dtype=st.sampled_from(DTYPES),
    grad_dtype=st.sampled_from((None, None, torch.float32)),
    lr=st.sampled_from((0.0, 0.1, 1)),
    wd=st.sampled_from((0.0, 0.3)),
    masters=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_random_chains(chain: Any, dtype: torch.dtype, grad_dtype: Any, lr: Any, wd: float, masters: bool) -> None:
    def build(ps: Any, engine: str) -> Optimizer:
        return Optimizer([ps[:2], ps[2:]], chain, engine=engine, master_weights=masters, lr=[lr, 0.2], wd=wd)

    try:
        side_by_side(build, "eager", dtype, steps=3, grad_dtype=grad_dtype, shapes=((4, 5), (7,), (33, 4)))
    except (RuntimeError, TypeError, ZeroDivisionError):
        return  # torch itself refuses the chain
    side_by_side(build, "foreach", dtype, steps=3, grad_dtype=grad_dtype, shapes=((4, 5), (7,), (33, 4)))


@pytest.mark.parametrize("build", [Adam, Lamb])
def test_blocks_of_a_large_parameter(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 256)
    blocks.compiled.cache_clear()
    try:
        check = {} if build is Adam else {"check": lambda a, b, where: assert_near(a, b, where, 4)}
        side_by_side(lambda ps, engine: build(ps, engine=engine), "foreach", torch.float32, steps=4, **check)
    finally:
        blocks.compiled.cache_clear()
