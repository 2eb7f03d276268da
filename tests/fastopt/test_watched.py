"""Dicts that count their changes, and numbers of the state that are written when they are read."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastopt import Adam, Lookahead, OptimWrapper
from fastopt.state import Entry, ParamState
from fastopt.watched import Watch, Watched, watch_of

WRITES: dict[str, Callable[[Any], Any]] = {
    "set": lambda d: d.__setitem__("b", 2),
    "delete": lambda d: d.__delitem__("a"),
    "update": lambda d: d.update(a=2),
    "or": lambda d: d.__ior__({"a": 2}),
    "setdefault": lambda d: d.setdefault("b", 2),
    "pop": lambda d: d.pop("a"),
    "popitem": lambda d: d.popitem(),
    "clear": lambda d: d.clear(),
}
READS: dict[str, Callable[[Any], Any]] = {
    "item": lambda d: {**d, "step": d["step"]},
    "get": lambda d: {**d, "step": d.get("step")},
    "dict": dict,
    "stars": lambda d: {**d},
    "keywords": lambda d: (lambda **given: given)(**d),
    "items": lambda d: dict(d.items()),
    "values": lambda d: dict(zip(d.keys(), d.values(), strict=True)),
    "copy": lambda d: d.copy(),
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "or": lambda d: d | {},
    "ror": lambda d: {} | d,
    "pickle": lambda d: pickle.loads(pickle.dumps(d)),
    "json": lambda d: json.loads(json.dumps(d)),
    "repr": lambda d: eval(repr(d)),
    "update of another": lambda d: _updated(d),
    "sorted": lambda d: dict(sorted(d.items())),
    "pop": lambda d: {"step": d.pop("step"), "a": d["a"]},
    "equal": lambda d: {"step": 5, "a": 1} if d == {"step": 5, "a": 1} else None,
}


def _updated(d: dict[str, Any]) -> dict[str, Any]:
    other: dict[str, Any] = {}
    other.update(d)
    return other


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_every_change_is_counted(write: Callable[[Any], Any]) -> None:
    watch = Watch()
    watched, plain = Watched(watch, {"a": 1}), {"a": 1}
    write(watched)
    write(plain)
    assert watched == plain
    assert watch.changes >= 1


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_every_change_of_a_state_is_counted(write: Callable[[Any], Any]) -> None:
    state = ParamState.of([("p", {"a": 1})])
    before = state.changes
    write(state["p"])
    assert state.changes > before


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_deferred_numbers_are_there_when_they_are_read(read: Callable[[Any], Any]) -> None:
    state = ParamState.of([("p", {"step": 4, "a": 1})])
    entry = state["p"]
    before = state.changes
    state.defer("key", lambda: dict.__setitem__(entry, "step", 3))
    state.defer("key", lambda: dict.__setitem__(entry, "step", 5))
    assert state.changes == before
    assert read(entry) == {"step": 5, "a": 1}


def test_a_change_comes_after_what_was_deferred() -> None:
    state = ParamState.of([("p", {"step": 4})])
    entry = state["p"]
    state.defer("key", lambda: dict.__setitem__(entry, "step", 5))
    entry["step"] = 9
    assert entry == {"step": 9}


def test_watch_of() -> None:
    watch = Watch()
    assert watch_of([Watched(watch), Watched(watch)]) is watch
    assert watch_of([Watched(watch), Watched(Watch())]) is None
    assert watch_of([Watched(watch), {}]) is None
    assert watch_of([]) is None
    state = ParamState()
    assert watch_of([state["p"], state["q"]], Entry) is state


def _groups_are_watched(opt: Any) -> bool:
    return watch_of(opt.param_groups) is not None


def test_groups_stay_watched() -> None:
    p, q = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    opt = Adam([[p], [q]])
    opt.add_param_group({"params": [torch.ones(1, requires_grad=True)]})
    assert _groups_are_watched(opt)
    opt.load_state_dict(opt.state_dict())
    assert _groups_are_watched(opt)
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert _groups_are_watched(twin)
    around = copy.deepcopy(Lookahead(Adam([[p], [q]])))
    around.load_state_dict(around.state_dict())
    assert _groups_are_watched(around)
    assert around.param_groups is around.opt.param_groups
    wrapped = OptimWrapper([p], torch.optim.SGD, lr=0.1)
    wrapped.load_state_dict(wrapped.state_dict())
    assert type(wrapped.param_groups[0]) is dict


def test_the_state_dict_and_its_groups_are_plain() -> None:
    p = torch.ones(2, requires_grad=True)
    p.grad = torch.ones(2)
    opt = Adam([p])
    for _ in range(3):
        opt.step()
    saved = opt.state_dict()
    assert type(saved["param_groups"][0]) is dict
    assert type(saved["state"][0]) is dict
    assert saved["state"][0]["step"] == 3


def test_the_step_count_is_right_whenever_it_is_read() -> None:
    p = torch.ones(2, requires_grad=True)
    opt = Adam([p], engine="foreach")
    for i in range(1, 8):
        p.grad = torch.ones(2)
        opt.step()
        if i == 1:
            entry = opt.state[p]
        if i in (1, 2, 5, 7):
            assert entry["step"] == opt.state[p]["step"] == i


def test_a_state_is_handed_out_when_somebody_else_reads_it() -> None:
    p = torch.ones(2, requires_grad=True)
    opt = Adam([p], engine="foreach")
    for _ in range(5):
        p.grad = torch.ones(2)
        opt.step()
    state = opt.state
    assert isinstance(state, ParamState)
    assert not state.handed_out
    opt.state_dict()
    assert state.handed_out


def test_a_callback_that_runs_as_it_is_may_keep_what_it_gets() -> None:
    p = torch.ones(2, requires_grad=True)
    opt = Adam([p], engine="eager")
    for _ in range(2):
        p.grad = torch.ones(2)
        opt.step()
    state = opt.state
    assert isinstance(state, ParamState)
    assert state.handed_out


def test_a_state_that_was_moved_by_its_data_is_noticed() -> None:
    ps = [torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)]
    ours, theirs = Adam(ps[:1], lr=0.1, engine="foreach"), Adam(ps[1:], lr=0.1, engine="eager")
    for i in range(8):
        for p, opt in zip(ps, (ours, theirs), strict=True):
            p.grad = torch.full((3,), 1.0 + i)
            opt.step()
            if i in (3, 5):
                opt.state[p]["grad_avg"].data = torch.full((3,), 4.0)
        assert torch.equal(*ps)
