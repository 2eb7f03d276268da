"""What is recorded, what is refused, and that a refusal is never wrong."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from numpy import random as numbers
from torch.nn.functional import dropout

from fastopt import SGD, Adam, Optimizer, average_grad

FACTOR = 2.0
SEEN: list[float] = []
COUNT = 0


@pytest.fixture(autouse=True)
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded runs by `foreach`, whatever is installed."""
    monkeypatch.setenv("FASTOPT_ENGINE", "foreach")


def stepped(cb: Any, engine: str | None = None, steps: int = 3, **hypers: Any) -> tuple[Optimizer, torch.Tensor]:
    """An optimizer of one cb after some steps on one parameter."""
    p = torch.linspace(-1, 1, 6).reshape(2, 3).requires_grad_()
    opt = Optimizer([p], cb, engine=engine, lr=0.1, **hypers)
    for i in range(steps):
        p.grad = torch.full((2, 3), 1.0 + i)
        opt.step()
    return opt, p.detach()


def reads_value(p, lr, **kwargs):
    if p.grad.sum() > 0:
        p.data.sub_(lr)


def reads_item(p, lr, **kwargs):
    p.data.sub_(lr * p.grad.max().item())


def uses_shape(p, lr, **kwargs):
    p.data.sub_(lr * p.shape[0])


def indexes(p, lr, **kwargs):
    p.data[0].sub_(lr)


def multiplies_matrices(p, lr, **kwargs):
    p.data.sub_(lr * (p.grad @ p.grad.t()).trace())


def draws(p, lr, **kwargs):
    p.data.add_(torch.rand_like(p), alpha=lr)


def draws_numbers(p, lr, **kwargs):
    p.data.sub_(lr * (0.5 + random.random()))


def draws_by_another_name(p, lr, **kwargs):
    p.data.sub_(lr * numbers.uniform())


def draws_by_a_method(p, lr, **kwargs):
    p.data.sub_(lr * torch.empty(()).uniform_())


def draws_by_a_function(p, lr, **kwargs):
    p.data.sub_(lr * dropout(torch.ones(())))


def draws_from_a_distribution(p, lr, **kwargs):
    p.data.sub_(lr * torch.distributions.Normal(0.0, 1.0).rsample())


def keeps_a_list(p, lr, **kwargs):
    SEEN.append(float(lr))
    p.data.sub_(lr)


def keeps_a_global(p, lr, **kwargs):
    global COUNT
    COUNT = COUNT + 1
    p.data.sub_(lr)


def shares_the_gradient(p, lr, **kwargs):
    return {"seen": p.grad.data}


def swallows(p, lr, **kwargs):
    try:
        p.data.sub_(lr * p.grad.sum().item())
    except Exception:
        p.data.zero_()


def counts_signs(p, lr, **kwargs):
    p.data.sub_(lr * p.grad * (p.data > 0).sum())


def widens_its_state(p, lr, average=None, **kwargs):
    average = p.grad.clone() if average is None else average.double() + p.grad
    p.data.sub_(lr * average)
    return {"average": average}


def keeps_one_state_twice(p, lr, one=None, two=None, **kwargs):
    if one is None:
        one = two = torch.ones_like(p)
    one.mul_(0.5)
    p.data.sub_(lr * two)
    return {"one": one, "two": two}


class Counts:
    count = 0

    def __call__(self, p, lr, **kwargs):
        self.count += 1
        p.data.sub_(lr * self.count)


REFUSED = {
    counts_signs: "a sum of torch.bool",
    keeps_one_state_twice: "lies where the state 'one' lies",
    reads_value: "__bool__",
    reads_item: "item",
    uses_shape: "shape",
    indexes: "__getitem__",
    multiplies_matrices: "t of a tensor",
    draws: "random",
    draws_numbers: "random",
    draws_by_another_name: "numbers.uniform draws random numbers",
    draws_by_a_method: "uniform_ draws random numbers",
    draws_by_a_function: "dropout draws random numbers",
    draws_from_a_distribution: "rsample draws random numbers",
    keeps_a_list: "SEEN",
    keeps_a_global: "COUNT",
    shares_the_gradient: "gradient itself",
    swallows: "item",
}


def _seeded(cb: Any, engine: str | None) -> tuple[Optimizer, torch.Tensor]:
    """`stepped`, with the same random numbers each time."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    return stepped(cb, engine)


@pytest.mark.parametrize("cb", REFUSED, ids=lambda cb: cb.__name__)
def test_what_cannot_be_recorded_runs_as_it_is_and_says_why(cb: Any) -> None:
    (opt, ours), (_, theirs) = _seeded(cb, None), _seeded(cb, "eager")
    assert torch.equal(ours, theirs)
    (choice,) = opt.engine
    assert choice.executor == "eager"
    assert cb.__name__ in choice.reason or "lies where" in choice.reason
    assert REFUSED[cb] in choice.reason


@pytest.mark.parametrize("engine", ["foreach", "llvm"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("cb", [widens_its_state, keeps_one_state_twice], ids=lambda cb: cb.__name__)
def test_states_that_change_their_kind_or_are_one(cb: Any, steps: int, engine: str) -> None:
    ours, theirs = stepped(cb, engine, steps), stepped(cb, "eager", steps)
    assert torch.allclose(ours[1], theirs[1], rtol=1e-6)
    for a, b in zip(*(next(iter(opt.state.values())).items() for opt, _ in (ours, theirs)), strict=True):
        assert a[0] == b[0]
        assert a[1].dtype == b[1].dtype
        assert torch.allclose(a[1], b[1])


def test_an_object_that_counts_is_refused_and_says_why() -> None:
    opt, ours = stepped(Counts())
    _, theirs = stepped(Counts(), "eager")
    assert torch.equal(ours, theirs)
    assert "Counts: sets the attribute 'count'" in opt.engine[0].reason


def test_a_global_number_is_read_again_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    def cb(p, lr, **kwargs):
        p.data.sub_(lr * FACTOR)

    p = torch.zeros(2)
    opt = Optimizer([p], cb, lr=1.0)
    for factor in (2.0, 3.0, 3.0):
        monkeypatch.setitem(globals(), "FACTOR", factor)
        p.grad = torch.ones(2)
        opt.step()
    assert p.tolist() == [-8.0, -8.0]
    assert opt.engine[0].executor == "foreach"


def test_a_number_of_a_closure_or_object_is_read_again() -> None:
    factor = 1.0

    def cb(p, lr, **kwargs):
        p.data.sub_(lr * factor)

    class Step:
        size = 1.0

        def __init__(self) -> None:
            self.scale = 1.0

        def factor(self) -> float:
            return self.scale * self.size

        def __call__(self, p, **kwargs):
            p.data.mul_(self.factor())

    step = Step()
    p = torch.zeros(2)
    opt = Optimizer([p], (cb, step), lr=1.0)
    p.grad = torch.ones(2)
    opt.step()
    factor, step.scale = 5.0, 2.0
    opt.step()
    assert p.tolist() == [-12.0, -12.0]
    assert opt.engine[0].executor == "foreach"


class Base:
    factor = 1.0


class Scaled(Base):
    def __call__(self, p, lr, **kwargs):
        p.data.sub_(lr * self.factor)


class ScaledByGetattr(Base):
    def __call__(self, p, lr, **kwargs):
        p.data.sub_(lr * getattr(self, "factor"))  # noqa: B009


class ScaledWithin(Base):
    def __call__(self, p, lr, **kwargs):
        p.data.sub_(sum(lr * self.factor for _ in range(2)))


def _factor_of(x):
    return x.factor


class ScaledByHelper(Base):
    def __call__(self, p, lr, **kwargs):
        p.data.sub_(lr * _factor_of(self))


class ScaledBySomething(Base):
    def __getattr__(self, name):
        if name != "something":
            raise AttributeError(name)
        return self.factor

    def __call__(self, p, lr, **kwargs):
        p.data.sub_(lr * self.something)


def _of_object(kind: Any, of_class: bool) -> Any:
    def make() -> Any:
        cb = kind()
        return cb, lambda x: setattr(Base if of_class else cb, "factor", x)

    return make


def _of_inner_function() -> Any:
    factor = 1.0

    def cb(p, lr, **kwargs):
        def scaled():
            return lr * factor

        p.data.sub_(scaled() + sum(factor for _ in range(2)))

    def change(x: float) -> None:
        nonlocal factor
        factor = x

    return cb, change


def _of_default() -> Any:
    def cb(p, lr, factor=1.0, **kwargs):
        p.data.sub_(lr * factor)

    return cb, lambda x: setattr(cb, "__defaults__", (x,))


def _of_function() -> Any:
    def cb(p, lr, **kwargs):
        p.data.sub_(lr * cb.factor)

    cb.factor = 1.0  # type: ignore[attr-defined]
    return cb, lambda x: setattr(cb, "factor", x)


def _of_class_within() -> Any:
    def cb(p, lr, **kwargs):
        class Here:
            factor = Base.factor

        p.data.sub_(lr * Here.factor)

    return cb, lambda x: setattr(Base, "factor", x)


UNSEEN = {
    "inner function": _of_inner_function,
    "default": _of_default,
    "attribute of a function": _of_function,
    "class within": _of_class_within,
    **{
        f"{kind.__name__}, {'class' if of_class else 'object'}": _of_object(kind, of_class)
        for kind in (Scaled, ScaledByGetattr, ScaledWithin, ScaledByHelper, ScaledBySomething)
        for of_class in (True, False)
    },
}


@pytest.mark.parametrize("make", UNSEEN.values(), ids=UNSEEN)
def test_what_a_cb_reads_in_other_ways_is_read_again(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for engine in ("foreach", "eager"):
        monkeypatch.setattr(Base, "factor", 1.0)
        cb, change = make()
        p = torch.zeros(2)
        opt = Optimizer([p], cb, lr=1.0, engine=engine)
        for factor in (1.0, 1.0, 2.0, 2.0, 5.0):
            p.grad = torch.ones(2)
            change(factor)
            opt.step()
        ends.append(p.tolist())
    assert ends[0] == ends[1]


LATER = {
    "global": (lambda p, lr, **kwargs: p.data.sub_(lr * DEFINED_LATER), "DEFINED_LATER", NameError),  # type: ignore[name-defined]  # noqa: F821
    "builtin": (lambda p, lr, **kwargs: p.data.sub_(max(lr, 0.5 * lr)), "max", None),
}


@pytest.mark.parametrize(("cb", "name", "error"), LATER.values(), ids=LATER)
def test_names_that_are_defined_later(cb: Any, name: str, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.zeros(1)
    p.grad = torch.ones(1)
    opt = Optimizer([p], cb, lr=1.0)
    if error is not None:
        with pytest.raises(error):
            opt.step()
    else:
        opt.step()
    p.zero_()
    for value in (2.0, 2.0, 3.0) if error else (min, min, min):
        monkeypatch.setitem(globals(), name, value)
        opt.step()
    assert p.tolist() == [-7.0 if error else -1.5]
    assert opt.engine[0].executor == "foreach"


def alternates(p, lr, last=None, **kwargs):
    p.data.sub_(lr * p.grad if last is None else 0.5 * lr)
    return {"last": lr if last is None else None}


def turns_float(p, lr, n=0, **kwargs):
    p.data.sub_(lr * p.grad * (1.0 if isinstance(n, int) else 0.25))
    if isinstance(n, int):
        return {"n": n * 1.5 if n == 4 else n + 1}
    return {"n": 0 if n > 9 else n + 2}


@pytest.mark.parametrize("engine", ["foreach", "llvm"])
@pytest.mark.parametrize("cb", [alternates, turns_float], ids=lambda cb: cb.__name__)
def test_numbers_of_the_state_that_change_their_type(cb: Any, engine: str) -> None:
    (opt, ours), (other, theirs) = stepped(cb, engine, steps=30), stepped(cb, "eager", steps=30)
    assert torch.allclose(ours, theirs, rtol=1e-5)
    assert list(opt.state.values()) == list(other.state.values())
    assert opt.engine[0].executor == engine


def test_numbers_that_decide_or_leave_python_are_guarded() -> None:
    def cb(p, lr, step=0, **kwargs):
        step += 1
        if step % 3 == 0 or lr < 0.05:
            p.data.mul_(0.5)
        for _ in range(step):
            p.data.add_(1.0)
        p.data.add_(math.sqrt(step))
        return {"step": step, "even": step % 2 == 0, "text": f"{step}"}

    opt, ours = stepped(cb, steps=7)
    other, theirs = stepped(cb, "eager", steps=7)
    assert torch.equal(ours, theirs)
    assert opt.engine[0].executor == "foreach"
    (a,), (b,) = opt.state.values(), other.state.values()
    assert a == b


def test_a_missing_argument_is_named_as_by_eager() -> None:
    p = torch.ones(2)
    p.grad = torch.ones(2)
    with pytest.raises(TypeError, match="sqr_avg"):
        Optimizer([p], lambda p, sqr_avg, **kwargs: None, lr=1.0).step()


def test_mixed_kinds_in_one_group() -> None:
    ps = [torch.ones(3), torch.ones(3, dtype=torch.complex64), torch.ones(3, dtype=torch.float64), torch.ones(2, 2)]
    for p in ps:
        p.grad = torch.ones_like(p)
    ps[3].grad = torch.ones(2, 2).to_sparse()
    opt = SGD(ps, lr=0.5)
    opt.step()
    for p in ps:
        assert torch.equal(p, torch.full_like(p, 0.5))
    assert opt.engine[0].executor == "eager"
    assert "complex" in opt.engine[0].reason or "sparse" in opt.engine[0].reason


def test_the_engine_is_known_before_the_first_step() -> None:
    p = torch.ones(2, requires_grad=True)
    assert Adam([p]).engine[0].executor == "foreach"
    assert Optimizer([p], (average_grad, uses_shape), lr=1.0).engine[0].executor == "eager"
    assert Adam([p]).state == {}


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTOPT_ENGINE", "eager")
    p = torch.ones(2, requires_grad=True)
    assert Adam([p]).engine[0] == (0, "eager", "chosen by FASTOPT_ENGINE")
    monkeypatch.setenv("FASTOPT_ENGINE", "warp")
    with pytest.raises(ValueError, match="warp"):
        Adam([p])
    with pytest.raises(ValueError, match="foreach"):
        Adam([p], engine="loop")


def test_nothing_is_imported_for_it() -> None:
    import subprocess
    import sys

    heavy = ["triton", "llvmlite", "matplotlib", "click", "rich", "s3fs", "torch._dynamo", "torch._inductor"]
    code = (
        f"import fastopt, sys; print([m for m in {heavy} if m in sys.modules])\n"
        f"import fastopt.checkpoint, fastopt.distributed; print([m for m in {heavy} if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # a warning of the packages, or of what they import, is an error here
    assert done.stdout.split("\n") == ["[]", "[]", ""]


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
def test_a_schedule_of_numpy_numbers_is_recorded(kind: Any) -> None:
    ends = []
    for engine in ("foreach", "eager"):
        p, q = torch.linspace(0, 1, 4), torch.linspace(0, 1, 4)
        opt = Adam([[p], [q]], engine=engine)
        for i in range(4):
            opt.param_groups[0]["lr"] = kind(1 / (i + 1))
            p.grad, q.grad = torch.full((4,), 1.0 + i), torch.ones(4)
            opt.step()
        assert opt.engine[0].executor == engine
        ends.append(torch.cat([p, q]))
    assert torch.equal(*ends)
