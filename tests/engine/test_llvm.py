"""The compiled loops against `eager`: the same results but for the last bit of torch's square root."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastopt import SGD, Adam, Lamb, Larc, Optimizer
from fastopt.engine.executors.llvm_compile import _object_of
from fastopt.engine.executors.llvm_source import Layout, source_of
from tests.fastopt.samples import Case, every_native

from .chains import FOREIGN, foreign, random_cb, random_chains
from .compare import assert_near, gradients, params, side_by_side
from .test_changes import CHANGES, adam
from .test_foreach import with_engine

pytest.importorskip("llvmlite")


def near(a: Any, b: Any, where: str) -> None:
    assert_near(a, b, where, 8)


def executors(opt: Optimizer) -> set[str]:
    return {choice.executor for choice in opt.engine}


@every_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_optimizer(case: Case, dtype: torch.dtype) -> None:
    _, opt = side_by_side(with_engine(case), "llvm", dtype, steps=9, check=near)
    beta = case.name == "RAdam-beta"  # softplus is not compiled
    assert executors(opt) == ({"foreach"} if beta else {"llvm"})


def test_without_a_square_root_it_is_the_same_to_the_bit() -> None:
    def build(ps: Any, engine: str) -> Optimizer:
        return SGD([ps[:2], ps[2:]], lr=[0.1, 0.2], mom=0.9, wd=0.1, engine=engine)

    _, opt = side_by_side(build, "llvm", torch.float32, steps=5)
    assert executors(opt) == {"llvm"}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_chains(name: str) -> None:
    side_by_side(lambda ps, engine: foreign(name, ps, engine), "llvm", torch.float32, check=near)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes_between_steps(change: Any) -> None:
    side_by_side(adam, "llvm", torch.float32, 6, near, between=change)


def test_an_lr_that_is_a_tensor() -> None:
    def fill(opt: Any, ps: list[Tensor], i: int) -> None:
        opt.param_groups[0]["lr"].fill_(0.1 / (i + 1))

    side_by_side(
        lambda ps, engine: Larc(ps, lr=torch.tensor(0.1), wd=0.1, engine=engine),
        "llvm", torch.float32, check=near, between=fill,
    )  # fmt: skip


@given(chain=random_chains(norms=True), lr=st.sampled_from((0.0, 0.1)), wd=st.sampled_from((0.0, 0.3)))
@settings(max_examples=40, deadline=None)
def test_random_chains(chain: Any, lr: float, wd: float) -> None:
    def build(ps: Any, engine: str) -> Optimizer:
        return Optimizer([ps[:2], ps[2:]], chain, engine=engine, lr=[lr, 0.2], wd=wd)

    def check(a: Any, b: Any, where: str) -> None:
        """Where a square root was off by a bit, that may have been magnified."""
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)
        else:
            assert a == b

    shapes = ((4, 5), (7,), (33, 4))
    try:
        side_by_side(build, "eager", torch.float64, steps=1, shapes=shapes)
    except (RuntimeError, TypeError, ZeroDivisionError):
        return
    side_by_side(build, "llvm", torch.float64, steps=1, shapes=shapes, check=check)


# ---- operations

SPECIAL = (0.0, -0.0, 1.0, -1.0, 0.3, -2.5, 1e-42, -1e38, 3e38, float("inf"), float("-inf"), float("nan"), 0.5, 7.75)
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{
        name: lambda x, y, name=name: getattr(torch, name)(x)
        for name in ("rsqrt", "square", "abs", "sign", "neg", "reciprocal", "relu", "floor", "ceil")
    },
    **{
        name: lambda x, y, name=name: getattr(torch, name)(x, y) for name in ("mul", "div", "maximum", "minimum", "sub")
    },
    **{
        f"where {name}": lambda x, y, name=name: torch.where(getattr(torch, name)(x, y), x, 2.5)
        for name in ("eq", "ne", "lt", "le", "gt", "ge")
    },
    **{f"power {n}": lambda x, y, n=n: x**n for n in (-2.0, -1.0, -0.5, 1.0, 2.0, 3.0)},
    "add scaled": lambda x, y: torch.add(x, y, alpha=0.7),
    "sub scaled": lambda x, y: torch.sub(x, y, alpha=-0.7),
    "from a number": lambda x, y: 1.25 - x,
    "over a number": lambda x, y: x / 3,
    "number over": lambda x, y: 3 / x,
    "addcmul": lambda x, y: torch.addcmul(x, y, y, value=0.3),
    "addcdiv": lambda x, y: torch.addcdiv(x, x, y, value=-0.3),
    "lerp near": lambda x, y: torch.lerp(x, y, 0.1),
    "lerp far": lambda x, y: torch.lerp(x, y, 0.9),
    "lerp by tensor": lambda x, y: torch.lerp(x, y, x),
    "clamp": lambda x, y: x.clamp(-0.5, 0.5),
    "clamp below": lambda x, y: x.clamp(min=0.25),
    "masked": lambda x, y: x * (y > 0),
    "and": lambda x, y: torch.where((x > 0) & ~(y > 0), x, y),
    "logical": lambda x, y: torch.where(torch.logical_xor(x, y).logical_not(), x, y),
    "nan to zero": lambda x, y: torch.where(torch.isnan(x) | torch.isinf(y), torch.zeros_like(x), x),
    "finite": lambda x, y: torch.where(torch.isfinite(x), y, x),
    "narrowed": lambda x, y: x.to(torch.bfloat16).to(x.dtype) + y,
    "half": lambda x, y: x.half().to(x.dtype) + y,
    "widened": lambda x, y: (x.double() * y.double()).to(x.dtype),
    "compared wide": lambda x, y: torch.where(x.double() < y, x, y),
    "ones": lambda x, y: torch.ones_like(x) * 3 + y,
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_operation_gives_the_bits_of_torch(name: str, dtype: torch.dtype) -> None:
    """On all pairs of special numbers, and on random ones; 16 at a time and one at a time."""
    pairs = torch.cartesian_prod(*[torch.tensor(SPECIAL, dtype=dtype)] * 2)
    x, y = torch.cat([pairs, torch.randn(1003, 2, generator=torch.Generator().manual_seed(1)).to(dtype)]).unbind(1)

    operation = OPERATIONS[name]

    def cb(p: Tensor, **kwargs: Any) -> None:
        p.data.copy_(operation(p.data, p.grad))

    p = x.clone().requires_grad_()
    p.grad = y.clone()
    opt = Optimizer([p], cb, lr=0.1, engine="llvm")
    opt.step()
    assert executors(opt) == {"llvm"}, opt.engine
    torch.testing.assert_close(p.detach(), OPERATIONS[name](x, y), rtol=0, atol=0, equal_nan=True)


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": lambda x: x.norm(),
    "sum": lambda x: x.sum(),
    "mean": lambda x: x.mean(),
    "largest": lambda x: x.amax(),
    "smallest": lambda x: x.min(),
    "norm 1": lambda x: x.norm(1),
    "norm inf": lambda x: torch.linalg.vector_norm(x, float("inf")),
    "root mean square": lambda x: x.square().mean().sqrt(),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name: str) -> None:
    shapes = ((3,), (16,), (8192,), (100, 213), (40_000,), ())
    reduction = REDUCTIONS[name]

    def cb(p: Tensor, **kwargs: Any) -> None:
        p.data.add_(reduction(p.data))

    for p in params(torch.float32, shapes):
        p.grad = torch.zeros_like(p)
        expected = reduction(p.detach().double()) + p.detach().double()
        opt = Optimizer([p], cb, lr=1, engine="llvm")
        opt.step()
        assert executors(opt) == {"llvm"}
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-6, atol=2e-6)


def test_a_nan_is_not_lost_in_a_reduction() -> None:
    def cb(p: Tensor, **kwargs: Any) -> None:
        p.data.add_(p.grad.amax())

    for where in (0, 5, 17, 9000, 16400):
        p = torch.zeros(16401, requires_grad=True)
        p.grad = torch.zeros(16401)
        p.grad[where] = float("nan")
        Optimizer([p], cb, lr=1, engine="llvm").step()
        assert torch.isnan(p).all()


# ---- dtypes


@every_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad_dtype", [None, torch.float32], ids=str)
def test_low_precision_is_computed_in_float32_and_rounded_once(
    case: Case, dtype: torch.dtype, grad_dtype: torch.dtype | None
) -> None:
    """A step is that of `eager` on the same numbers in float32, rounded. But that is not so where a pass reads again
    what the pass before it has rounded."""
    if case.name in ("Lamb", "RAdam-beta"):
        return
    ps = params(dtype)
    opt = with_engine(case)(ps, "llvm")
    for i in range(3):
        twins = [p.detach().float().requires_grad_() for p in ps]
        twin = with_engine(case)(twins, "eager")
        for p, q, g in zip(ps, twins, gradients(ps, i, grad_dtype), strict=True):
            if g.dtype != p.dtype:
                p.grad_dtype = g.dtype
            p.grad, q.grad = g.clone(), g.float()
            twin.state[q] = {
                k: v.clone().float() if isinstance(v, Tensor) else v for k, v in opt.state.get(p, {}).items()
            }
        opt.step()
        twin.step()
        assert executors(opt) == {"llvm"}
        for p, q in zip(ps, twins, strict=True):
            assert_near(q.detach().to(dtype), p.detach(), f"step {i}", 1)
            for key, value in opt.state.get(p, {}).items():
                expected = twin.state[q][key]
                if isinstance(value, Tensor):
                    assert value.dtype in (dtype, torch.float32)
                    assert_near(expected.to(value.dtype), value, f"step {i}, {key}", 8 if key == "local_lr" else 1)
                else:
                    assert value == expected or abs(value - expected) < 1e-3


# ---- layouts and threads


def unaligned(x: Tensor) -> Tensor:
    """The same numbers, one byte beside where they should lie."""
    memory = torch.empty(x.numel() * x.element_size() + 1, dtype=torch.uint8)
    view = torch.frombuffer(memory.numpy(), dtype=x.dtype, offset=1, count=x.numel()).view(x.shape)
    return view.copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every second": lambda x: torch.stack([x, -x], -1)[..., 0],
    "one for all": lambda x: x[:1, :1].expand_as(x),
    "unaligned": unaligned,
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("build", [SGD, Lamb])
@pytest.mark.parametrize("which", ["gradient", "parameter"])
def test_tensors_of_any_layout(name: str, build: Any, which: str) -> None:
    if (name, which) == ("one for all", "parameter"):
        return
    g = torch.Generator().manual_seed(3)
    x, others = torch.randn(40, 30, generator=g), [torch.randn(40, 30, generator=g) for _ in range(3)]
    results = []
    for engine in ("eager", "llvm"):
        start = LAYOUTS[name](x) if which == "parameter" else x.clone()
        ps = [start.clone(memory_format=torch.preserve_format) if name == "transposed" else start, x.clone()]
        opt = build([p.requires_grad_() for p in ps], lr=0.1, wd=0.1, engine=engine)
        for grad in others:
            ps[0].grad = LAYOUTS[name](grad) if which == "gradient" else grad.clone()
            ps[1].grad = grad.clone()
            opt.step()
        assert executors(opt) == {engine}
        results.append([p.detach().clone() for p in ps])
        if which == "parameter":
            assert ps[0].data_ptr() == start.data_ptr() or name == "transposed"
    for a, b in zip(*results, strict=True):
        assert_near(a, b, name, 8)


def test_a_parameter_of_several_chunks() -> None:
    shapes = ((300, 301), (40_000,), (3,))
    side_by_side(lambda ps, engine: Lamb(ps, lr=0.1, engine=engine), "llvm", torch.float32, 3, near, shapes=shapes)


def stepped(shapes: Sequence[tuple[int, ...]], reduced: bool, steps: int = 3) -> list[Tensor]:
    """Parameters after some steps of Lamb; `reduced` goes pass by pass, as a sharded optimizer does."""
    ps = params(torch.float32, shapes)
    opt = Lamb(ps, lr=0.1, wd=0.1, engine="llvm")
    if reduced:
        opt._reduce = lambda x: x.clone()
    for i in range(steps):
        for p, g in zip(ps, gradients(ps, i), strict=True):
            p.grad = g
        opt.step()
    return [p.detach() for p in ps]


def test_the_bits_depend_neither_on_threads_nor_on_the_order_of_the_work() -> None:
    shapes = ((700, 301), (9000,), (3,), (0,), (400, 400), *[(50,)] * 30, (8192,), (90_000,))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(stepped(shapes, reduced=False))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@given(
    chain=random_chains(),
    cuts=st.lists(st.integers(0, 40_000), max_size=5),
    lr=st.sampled_from((0.1, 0.5)),
)
@settings(max_examples=25, deadline=None)
def test_slices_step_as_the_whole_does(chain: Any, cuts: list[int], lr: float) -> None:
    """Bit for bit, wherever a parameter is cut: what sharding rests on."""
    n, g = 40_000, torch.Generator().manual_seed(5)
    start, grad = (torch.randn(n, generator=g, dtype=torch.float32) for _ in range(2))
    bounds = sorted({0, n, *cuts})
    pieces = [slice(a, b) for a, b in pairwise(bounds)]

    def run(parts: list[slice]) -> Tensor | None:
        ps = [start[part].clone().requires_grad_() for part in parts]
        opt = Optimizer(ps, chain, lr=lr, wd=0.1, engine="llvm")
        for _ in range(2):
            for p, part in zip(ps, parts, strict=True):
                p.grad = grad[part].clone()
            opt.step()
        return torch.cat([p.detach() for p in ps]) if executors(opt) == {"llvm"} else None

    try:
        whole = run([slice(0, n)])
    except (RuntimeError, TypeError, ZeroDivisionError):
        return
    if whole is not None:
        cut = run(pieces)
        assert cut is not None
        torch.testing.assert_close(cut, whole, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_steps_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    (p,) = params(torch.float32, ((500, 400),))
    opt = Adam([p], lr=0.1, engine="llvm")
    p.grad = gradients([p], 0)[0]
    opt.step()
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        before = p.detach().clone()
        opt.step()
        os._exit(0 if not torch.equal(before, p.detach()) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_one_structure_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastopt.engine.executors import llvm_compile, llvm_run

    compiled: list[str] = []
    real = llvm_compile._object_of
    monkeypatch.setattr(llvm_compile, "_object_of", lambda source: compiled.append(source) or real(source))
    llvm_run.loops_of.cache_clear()
    for _ in range(2):
        ps = params(torch.float32)
        opt = Adam([ps[:2], ps[2:4], ps[4:]], lr=[0.1, 0.2, 0.3], wd=[0.1, 0.2, 0.3], engine="llvm")
        for i in range(4):
            for p, g in zip(ps, gradients(ps, i), strict=True):
                p.grad = g
            opt.step()
    assert len(compiled) == 2  # the first step, which creates the state, and the others


def test_the_best_there_is_for_a_chain_that_is_not_compiled() -> None:
    ps = params(torch.float32)
    opt = Optimizer(ps, random_cb, lr=0.1, wd=0.1, steps=(("unary", "tanh", 0, 0, 0, 0),), keeps=0)
    assert executors(opt) <= {"foreach", "eager"}


def test_a_rate_on_another_device_is_not_taken_for_memory() -> None:
    p = torch.ones(3)
    p.grad = torch.ones(3)
    opt = SGD([p], lr=torch.tensor(0.1, device="meta"), engine="llvm")
    (choice,) = opt.engine
    assert choice.executor == "eager"
    assert "'lr' is on meta, a parameter on cpu" in choice.reason
    with pytest.raises(NotImplementedError, match="meta tensor"):
        opt.step()
    assert torch.equal(p, torch.ones(3))


def test_compiled_code_is_not_registered_for_exceptions() -> None:
    p = torch.ones(3)
    p.grad = torch.ones(3)
    opt = Adam([p], engine="llvm")
    opt.step()
    (program,) = opt.runner.programs()
    source, _ = source_of(Layout(program))
    assert b".text" in _object_of(source)
    assert b".eh_frame" not in _object_of(source)
