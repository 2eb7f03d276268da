"""Looking where tensors lie, in Python and with compiled functions."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastopt import SGD, Adam
from fastopt.engine.cohorts import look, native
from fastopt.engine.cohorts.look import Looked, count_change, same_members

compiler = pytest.mark.skipif(
    shutil.which(native._compiler()) is None, reason="there is no C++ compiler on this machine"
)
both = pytest.mark.parametrize("eyes", ["python", pytest.param("native", marks=compiler)])


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The compiled functions, waited for."""
    monkeypatch.setenv(native.VARIABLE, "wait")
    module = native.native()
    assert module is not None, "the compiler failed"
    return module


def _looked(eyes: str, params: list[Tensor], request: pytest.FixtureRequest, **states: list[Tensor]) -> Looked:
    looked = Looked(params, states)
    if eyes == "native":
        looked.use(look.NativeEyes(looked.params, looked.states, request.getfixturevalue("compiled")))
    assert looked.again()
    return looked


def _params() -> list[Tensor]:
    params = [torch.ones(n, 3, requires_grad=True) for n in (3, 4)]
    for p in params:
        p.grad = torch.ones_like(p)
    return params


def _other_grad(make: Callable[[Tensor], Tensor | None]) -> Callable[[list[Tensor], list[Tensor]], None]:
    def change(params: list[Tensor], state: list[Tensor]) -> None:
        params[0].grad = make(params[0])

    return change


def _set_data(params: list[Tensor], state: list[Tensor]) -> None:
    params[1].data = params[1].data.clone()


def _transpose_in_place(params: list[Tensor], state: list[Tensor]) -> None:
    params[0].data = params[0].data.t()


def _set_grad_data(params: list[Tensor], state: list[Tensor]) -> None:
    assert params[0].grad is not None
    params[0].grad.data = params[0].grad.data.clone()


def _set_state_data(params: list[Tensor], state: list[Tensor]) -> None:
    state[1].data = state[1].data.clone()


def _first_half(params: list[Tensor], state: list[Tensor]) -> None:
    params[1].grad = None
    params[1].data = params[1].data[:2]
    params[1].grad = torch.ones(2, 3)


def _transpose_grad_in_place(params: list[Tensor], state: list[Tensor]) -> None:
    assert params[0].grad is not None
    params[0].grad.t_()


def _grad_is_state(params: list[Tensor], state: list[Tensor]) -> None:
    params[1].grad = state[1]


CHANGES = {
    "gradient is a state": _grad_is_state,
    "first half of p.data": _first_half,
    "gradient transposed in place": _transpose_grad_in_place,
    "p.data": _set_data,
    "p.data transposed": _transpose_in_place,
    "state.data": _set_state_data,
    "no gradient": _other_grad(lambda p: None),
    "sparse gradient": _other_grad(lambda p: torch.ones_like(p).to_sparse()),
    "gradient with gaps": _other_grad(lambda p: torch.ones(3, 3).t()),
    "gradient is p": _other_grad(Tensor.detach),
    "negative view": _other_grad(lambda p: torch.imag(torch.ones(3, 3, dtype=torch.complex64).conj()).t().t()),
}


@both
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_seen(eyes: str, change: Any, request: pytest.FixtureRequest) -> None:
    params = _params()
    state = [torch.zeros_like(p) for p in params]
    looked = _looked(eyes, params, request, m=state)
    change(params, state)
    assert not looked.again()
    assert not looked.again()  # asked twice in a step


@both
def test_gradients_may_be_elsewhere(eyes: str, request: pytest.FixtureRequest) -> None:
    params = _params()
    looked = _looked(eyes, params, request)
    version = looked.version
    assert looked.again()
    assert looked.version == version
    kept = params[0].grad
    params[0].grad = torch.zeros(3, 3)
    assert looked.again()
    assert looked.version == version + 1
    at = looked.at("grad")
    assert at is not None
    assert at.tolist() == [p.grad.data_ptr() for p in params if p.grad is not None]
    assert kept is not None


@both
def test_a_gradient_with_other_memory_is_seen(eyes: str, request: pytest.FixtureRequest) -> None:
    params = _params()
    looked = _looked(eyes, params, request)
    version = looked.version
    _set_grad_data(params, [])
    assert not looked.again() or looked.version == version + 1


@both
def test_changes_are_counted_for_autograd(eyes: str, request: pytest.FixtureRequest) -> None:
    if eyes == "native":
        request.getfixturevalue("compiled")
    params = _params()
    with torch.inference_mode():
        uncounted = torch.ones(2)
    count_change([*params, uncounted])
    assert [p._version for p in params] == [1, 1]


@compiler
def test_members(compiled: Any) -> None:
    a, b, c = (torch.ones(1) for _ in range(3))
    for lists, members, expected in (
        ([[a], [b, c]], [a, b, c], True),
        ([[a], [], [b, c]], [a, b, c], True),
        ([[a], [c, b]], [a, b, c], False),
        ([[a], [b]], [a, b, c], False),
        ([[a], [b, c, c]], [a, b, c], False),
        ([], [], True),
    ):
        assert compiled.same_members(lists, members) is expected
        assert same_members(lists, members) is expected


@compiler
def test_wrong_arguments_are_refused(compiled: Any) -> None:
    import numpy as np

    one, two = np.zeros((2, 1), np.int64), np.zeros((2, 2), np.int64)
    p = torch.ones(1)
    for arguments in (
        ([p], [], one, two),
        ([p], [], two, one),
        ([1], [], one, one),
        ([p], [[]], np.zeros((3, 1), np.int64), one),
        ([p], [[1]], np.zeros((3, 1), np.int64), one),
        ((p,), [], one, one),
        ([p], []),
    ):
        with pytest.raises(TypeError):
            compiled.look(*arguments)


@compiler
def test_an_optimizer_takes_the_compiled_functions(monkeypatch: pytest.MonkeyPatch, compiled: Any) -> None:
    monkeypatch.setattr(look, "MANY", 1)
    monkeypatch.setattr(look, "_OFTEN", 2)
    ours, theirs = _params(), _params()
    a, b = Adam(ours, lr=0.1, engine="foreach"), Adam(theirs, lr=0.1, engine="eager")
    for i in range(12):
        for p, q in zip(ours, theirs, strict=True):
            p.grad, q.grad = (torch.full(p.shape, 1.0 + i) for _ in range(2))
        if i == 9:
            ours[0].data, theirs[0].data = (torch.full((3, 3), 7.0) for _ in range(2))
        a.step()
        b.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q)
        if i == 8:
            steady = a.runner._steady.get(None)
            assert steady is not None
            assert type(steady.steady[0].cohort.looked._eyes) is look.NativeEyes  # type: ignore[union-attr]


@compiler
def test_a_change_when_the_compiled_functions_come_is_seen(monkeypatch: pytest.MonkeyPatch, compiled: Any) -> None:
    monkeypatch.setattr(look, "MANY", 1)
    monkeypatch.setattr(look, "_OFTEN", 2)
    params = _params()
    looked = Looked(params, {})
    assert looked.again()
    _other_grad(lambda p: torch.ones(3, 3).t())(params, [])
    assert not looked.again()


@both
def test_a_model_in_another_dtype(eyes: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """`model.bfloat16()` between two steps: loops for float32 would write beyond the new parameters."""
    pytest.importorskip("llvmlite")
    if eyes == "native":
        request.getfixturevalue("compiled")
        monkeypatch.setattr(look, "MANY", 1)
        monkeypatch.setattr(look, "_OFTEN", 2)
    ours, theirs = _params(), _params()
    a, b = SGD(ours, lr=0.5, engine="llvm"), SGD(theirs, lr=0.5, engine="eager")
    for i in range(9):
        for p in (*ours, *theirs):
            if i == 6:
                p.grad = None
                p.data = p.data.to(torch.bfloat16)
            p.grad = torch.full_like(p, float(i % 3))
        a.step()
        b.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q)


def test_a_folder_that_others_may_write_to_is_not_trusted(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(folder))
    assert native.cache_folder() == folder
    folder.chmod(0o777)
    assert native.cache_folder() is None


def test_without_a_home_nothing_is_compiled(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert native.cache_folder() is None
