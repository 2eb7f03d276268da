"""The compiled loops against `eager`: the same results but for the last bit of torch's square root."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastopt import SGD, Lamb, Optimizer
from tests.fastopt.samples import Case, every_native

from .chains import FOREIGN, foreign, random_chains
from .compare import assert_near, side_by_side
from .test_changes import CHANGES, adam
from .test_foreach import with_engine

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llvmlite") is None, reason="needs llvmlite")


def near(a: Any, b: Any, where: str) -> None:
    assert_near(a, b, where, 8)


@every_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_optimizer(case: Case, dtype: torch.dtype) -> None:
    _, opt = side_by_side(with_engine(case), "llvm", dtype, steps=5, check=near)
    assert {choice.executor for choice in opt.engine} == {"llvm"}


def test_without_a_square_root_it_is_the_same_to_the_bit() -> None:
    def build(ps: Any, engine: str) -> Optimizer:
        return SGD([ps[:2], ps[2:]], lr=[0.1, 0.2], mom=0.9, wd=0.1, engine=engine)

    _, opt = side_by_side(build, "llvm", torch.float32, steps=5)
    assert {choice.executor for choice in opt.engine} == {"llvm"}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_chains(name: str) -> None:
    side_by_side(lambda ps, engine: foreign(name, ps, engine), "llvm", torch.float32, check=near)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes_between_steps(change: Any) -> None:
    side_by_side(adam, "llvm", torch.float32, 6, near, between=change)


@given(chain=random_chains(norms=True), lr=st.sampled_from((0.0, 0.1)), wd=st.sampled_from((0.0, 0.3)))
@settings(max_examples=6, deadline=None)
def test_random_chains(chain: Any, lr: float, wd: float) -> None:
    def build(ps: Any, engine: str) -> Optimizer:
        return Optimizer([ps[:2], ps[2:]], chain, engine=engine, lr=[lr, 0.2], wd=wd)

    def check(a: Any, b: Any, where: str) -> None:
        """Where a square root was off by a bit, that may have been magnified."""
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)
        else:
            assert a == b

    shapes = ((4, 5), (7,), (33, 4))
    try:
        side_by_side(build, "eager", torch.float64, steps=1, shapes=shapes)
    except (RuntimeError, TypeError, ZeroDivisionError):
        return
    side_by_side(build, "llvm", torch.float64, steps=1, shapes=shapes, check=check)


def test_a_parameter_of_several_chunks() -> None:
    shapes = ((300, 301), (40_000,), (3,))
    side_by_side(lambda ps, engine: Lamb(ps, lr=0.1, engine=engine), "llvm", torch.float32, 3, near, shapes=shapes)
