"""The generated kernels against `eager`: on a GPU, else with TRITON_INTERPRET=1 in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastopt import SGD, Adam, Lamb, Larc, Optimizer, RAdam, Ranger
from tests.engine.chains import FOREIGN, foreign, random_chains
from tests.engine.compare import assert_near, gradients, params, side_by_side
from tests.engine.test_changes import CHANGES, adam
from tests.engine.test_foreach import with_engine
from tests.fastopt.samples import Case, every_native

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if CUDA else "cpu"

pytestmark = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs a GPU, or triton and TRITON_INTERPRET=1")
on_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")


def near(ulps: float) -> Callable[[Any, Any, str], None]:
    return lambda a, b, where: assert_near(a, b, where, ulps)


def used(opt: Optimizer) -> set[str]:
    return {choice.executor for choice in opt.engine}


@every_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_optimizer(case: Case, dtype: torch.dtype) -> None:
    shapes = ((4, 5), (7,), (3, 0), (33, 40), (1024,), (5000,))
    _, opt = side_by_side(with_engine(case), "triton", dtype, 8, near(16), device=DEVICE, shapes=shapes)
    assert used(opt) == {"triton"}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_chains(name: str) -> None:
    _, opt = side_by_side(lambda ps, e: foreign(name, ps, e), "triton", torch.float32, 4, near(16), device=DEVICE)
    assert used(opt) == {"triton"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.skipif(not CUDA, reason="the interpreter cuts bfloat16 off")
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    ps = params(dtype, ((33, 40), (5000,)), DEVICE)
    exact = [p.detach().double().requires_grad_() for p in ps]
    ours, theirs = Adam(ps, lr=0.1, engine="triton"), Adam(exact, lr=0.1, engine="eager")
    for p, q, g in zip(ps, exact, gradients(ps, 0), strict=True):
        p.grad, q.grad = g, g.double()
    ours.step()
    theirs.step()
    for p, q in zip(ps, exact, strict=True):
        rounding = torch.finfo(dtype).eps * q.abs() * 0.51 + 1e-7
        assert ((p.double() - q).abs() <= rounding).all()
        assert torch.equal(ours.state[p]["grad_avg"], theirs.state[q]["grad_avg"].to(dtype))


@given(chain=random_chains(norms=False), lr=st.sampled_from((0.0, 0.1)), wd=st.sampled_from((0.0, 0.3)))
@settings(max_examples=40 if CUDA else 15, deadline=None)
def test_random_chains(chain: Any, lr: float, wd: float) -> None:
    """In float64, so that what is not smooth (a sign, a comparison) is decided alike."""

    def build(ps: list[Tensor], engine: str) -> Optimizer:
        return Optimizer([ps[:2], ps[2:]], chain, engine=engine, lr=[lr, 0.2], wd=wd)

    def check(a: Any, b: Any, where: str) -> None:
        if isinstance(a, Tensor):
            bad = ~((a - b).abs() <= 1e-9 * (a.abs() + 1)) & (a != b) & ~(a.isnan() & b.isnan())
            wild = (a.abs() > 1e8) | ~a.isfinite() | (b.abs() > 1e8) | ~b.isfinite()
            assert not (bad & ~wild).any(), (where, a, b)
        else:
            assert a == b

    shapes = ((4, 5), (7,), (33, 4))
    try:
        side_by_side(build, "eager", torch.float64, 2, lambda *x: None, shapes=shapes, device=DEVICE)
    except (RuntimeError, TypeError, ZeroDivisionError):
        return
    _, opt = side_by_side(build, "triton", torch.float64, 1, check, shapes=shapes, device=DEVICE)
    assert used(opt) == {"triton"}


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes_between_steps(change: Any) -> None:
    if DEVICE == "cuda" and change.__name__ == "add_group":
        pytest.skip("adds a parameter on the CPU")
    side_by_side(adam, "triton", torch.float32, 6, near(16), between=change, device=DEVICE)


def test_mixed_dtypes_groups_and_missing_gradients() -> None:
    def build(ps: list[Tensor], engine: str) -> Optimizer:
        more = params(torch.float64, ((9, 9), (2000,)), DEVICE)
        return RAdam([*[[p] for p in ps], more], lr=slice(1e-4, 1e-1), sqr_mom=0.9, engine=engine)

    def between(opt: Any, ps: list[Tensor], i: int) -> None:
        extra = opt.param_groups[-1]["params"]
        for p, g in zip(extra, gradients(extra, i), strict=True):
            p.grad = g
        ps[i % 4].grad = None

    side_by_side(build, "triton", torch.float32, 8, near(16), between=between, device=DEVICE)


@pytest.mark.parametrize("late", [1, 3])
@pytest.mark.parametrize("build", [RAdam, partial(Ranger, k=3)], ids=["radam", "ranger"])
def test_parameters_whose_numbers_come_to_lead_the_same_way(build: Any, late: int) -> None:
    """Cohorts that stepped by different programs come to step by the same one."""

    def made(ps: list[Tensor], engine: str) -> Optimizer:
        return build([[p] for p in ps], lr=0.1, sqr_mom=0.9, engine=engine)

    def between(opt: Any, ps: list[Tensor], i: int) -> None:
        if i < 7:
            for p in ps[:late]:
                p.grad = None

    side_by_side(made, "triton", torch.float32, 18, near(16), between=between, device=DEVICE)


def test_unaligned_views_and_other_layouts() -> None:
    def build(ps: list[Tensor], engine: str) -> Optimizer:
        return Adam(ps, lr=0.1, engine=engine)

    def between(opt: Any, ps: list[Tensor], i: int) -> None:
        if i == 0:
            ps[0].data = torch.zeros(4 * 5 + 1, device=DEVICE)[1:].view(4, 5).copy_(ps[0].data)
            ps[1].data = ps[1].data.t().contiguous().t()
            ps[2].data = torch.zeros(60, 80, device=DEVICE)[::2, ::2].copy_(ps[2].data)
        ps[1].grad = ps[1].grad.t().contiguous().t()
        ps[3].grad = torch.cat([ps[3].grad.new_zeros(1), ps[3].grad])[1:]

    shapes = ((4, 5), (30, 40), (30, 40), (3000,))
    side_by_side(build, "triton", torch.float32, 4, near(16), between=between, shapes=shapes, device=DEVICE)


def test_two_runs_give_the_same_bits() -> None:
    def run(build: Any) -> list[Tensor]:
        ps = params(torch.float32, ((300, 301), (70_000,), (5,)), DEVICE)
        opt = build(ps, engine="triton", lr=0.1, wd=0.1)
        for i in range(3):
            for p, g in zip(ps, gradients(ps, i), strict=True):
                p.grad = g
            opt.step()
        return ps

    for build in (Lamb, Larc):
        assert all(torch.equal(a, b) for a, b in zip(run(build), run(build), strict=True))


@pytest.mark.parametrize("build", [Lamb, Larc])
@pytest.mark.parametrize("engine", ["triton", "foreach"])
def test_slices_with_sums_over_processes(build: Any, engine: str) -> None:
    """Two threads with half of each parameter each are as one with the whole."""
    if engine == "triton" and not CUDA:
        pytest.skip("the interpreter runs in one thread")
    whole = params(torch.float32, ((3000,), (8,), (1,)), DEVICE)
    reference = build(whole, lr=0.1, wd=0.1, engine="eager")
    halves = [
        [p.detach()[: p.numel() // 2].clone() for p in whole],
        [p.detach()[p.numel() // 2 :].clone() for p in whole],
    ]
    barrier, sums = threading.Barrier(2), [None, None]

    def reduce_of(rank: int) -> Callable[[Tensor], Tensor]:
        def reduce(partial: Tensor) -> Tensor:
            sums[rank] = partial
            barrier.wait(30)
            total = sums[0] + sums[1]
            barrier.wait(30)
            return total

        return reduce

    opts = [build(ps, lr=0.1, wd=0.1, engine=engine) for ps in halves]
    for i in range(3):
        for p, a, b, g in zip(whole, *halves, gradients(whole, i), strict=True):
            p.grad, a.grad, b.grad = g, g[: p.numel() // 2].clone(), g[p.numel() // 2 :].clone()
        reference.step()
        work = [[opt.group_work(0, ps, [opt.state[p] for p in ps])] for opt, ps in zip(opts, halves, strict=True)]
        threads = [threading.Thread(target=opts[r].run, args=(work[r], reduce_of(r))) for r in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    for p, a, b in zip(whole, *halves, strict=True):
        assert_near(p.detach(), torch.cat([a, b]), "p", 16)


@on_gpu
@pytest.mark.parametrize("build", [Adam, Lamb, Ranger])
def test_a_step_never_waits_for_the_device(build: Any) -> None:
    ps = params(torch.float32, ((300, 301), (7,)), DEVICE)
    opt = build(ps, engine="triton")
    for i in range(8):
        for p, g in zip(ps, gradients(ps, i), strict=True):
            p.grad = g
        torch.cuda.set_sync_debug_mode("error")
        try:
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("build", [Adam, Lamb])
def test_a_captured_step_follows_the_hypers(build: Any) -> None:
    shapes = ((300, 301), (7,), (5000,))
    ours, theirs = params(torch.float32, shapes, DEVICE), params(torch.float32, shapes, DEVICE)
    a, b = build(theirs, engine="eager"), build(ours, engine="triton")
    for p, q in zip(theirs, ours, strict=True):
        p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
    with pytest.raises(RuntimeError, match="capture"):
        b.prepare_replay()

    def gradients_of(i: int) -> None:
        for p, q, g in zip(theirs, ours, gradients(ours, i), strict=True):
            p.grad.copy_(g)
            q.grad.copy_(g)

    for i in range(3):
        gradients_of(i)
        a.step()
        b.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        b.step()
    assert b.state[ours[0]]["step"] == 3
    for i in range(3, 8):
        gradients_of(i)
        for opt in (a, b):
            opt.set_hyper("lr", 0.1 / i)
        a.step()
        b.prepare_replay()
        graph.replay()
        for p, q in zip(theirs, ours, strict=True):
            assert_near(p.detach(), q.detach(), f"step {i}", 16)
            assert a.state[p]["step"] == b.state[q]["step"] == i + 1
    ours[1].grad, left_out = None, ours[1].grad
    with pytest.raises(RuntimeError, match="anew"):
        b.prepare_replay()
    ours[1].grad = left_out
    b.state[ours[0]]["do_wd"] = False
    b.set_hyper("wd", 0.1)
    with pytest.raises(RuntimeError, match="anew"):
        b.prepare_replay()


@on_gpu
def test_more_than_two_to_the_31_elements() -> None:
    n = 2**31 + 3000
    p = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)
    p.grad = torch.ones_like(p)
    p.grad[-1] = 2
    SGD([p], lr=0.5, engine="triton").step()
    assert (p[:-1] == -0.5).all()
    assert p[-1] == -1


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_parameters_on_two_devices() -> None:
    ps = [torch.ones(100, device=f"cuda:{i}") for i in range(2)] + [torch.ones(100)]
    for p in ps:
        p.grad = torch.ones_like(p)
    Adam(ps, lr=0.1, engine="triton").step()
    assert all(torch.allclose(p.cpu(), ps[2]) for p in ps)
