"""The state mapping: reading leaves nothing behind, writing does, marks are no training state."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections import defaultdict

import pytest
import torch

from fastopt import Adam
from fastopt.state import ParamState, flags_of

from .samples import Case, every_optimizer, give_grads, run_steps, tensors


def test_reading_creates_nothing() -> None:
    a, b = tensors((2,), (3,))
    state = ParamState()
    assert state[a] == {}
    assert state.get(a) is None
    assert a not in state
    assert len(state) == 0
    assert not state
    assert state.pop(a, {}) == {}
    assert list(state) == []
    assert state[b] is state[b]


def test_every_way_of_writing_enters() -> None:
    p, q, r, s, t = tensors(*[(2,)] * 5)
    state = ParamState()
    state[p]["x"] = 1
    state[q].update(x=1)
    assert state[r].setdefault("x", 1) == 1
    state[s] = {"x": 1}
    state[t] |= {"x": 1}
    assert [state[k] for k in (p, q, r, s, t)] == [{"x": 1}] * 5
    assert len(state) == 5


def test_a_dict_that_was_handed_out_enters_when_written_to() -> None:
    (p,) = tensors((2,))
    state = ParamState()
    entry = state[p]
    entry |= {"x": 1}
    assert p in state
    state[p]["y"] = 2
    assert entry == {"x": 1, "y": 2}


def test_empty_updates_leave_nothing() -> None:
    (p,) = tensors((2,))
    state = ParamState()
    state[p].update({})
    assert p not in state


def test_a_replaced_entry_is_not_brought_back_by_an_old_dict() -> None:
    (p,) = tensors((2,))
    state = ParamState()
    old = state[p]
    state[p] = {"x": 1}
    old["y"] = 2
    assert state[p] == {"x": 1}


def test_marks_are_kept_but_are_no_training_state() -> None:
    a, b = tensors((2,), (3,))
    state = ParamState()
    state[a] = {"force_train": True, "do_wd": False}
    state[b] = {}
    assert not state
    assert len(state) == 2
    state[b]["step"] = 1
    assert state
    state[a]["step"] = 1
    assert flags_of(state[a]) == {"force_train": True, "do_wd": False}
    assert flags_of(state[b]) == {}


def test_equality_is_a_dicts() -> None:
    (p,) = tensors((2,))
    state = ParamState([(p, {"x": 1})])
    assert state == {p: {"x": 1}}
    assert ParamState() == {}


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda s: s.copy(), lambda s: pickle.loads(pickle.dumps(s))])
def test_copies(how: object) -> None:
    assert callable(how)
    a, b = tensors((2,), (3,))
    state = ParamState([(a, {"x": torch.ones(2), "force_train": True})])
    state[b]["step"] = 3
    twin = how(state)
    assert type(twin) is ParamState
    assert [sorted(e) for e in twin.values()] == [["force_train", "x"], ["step"]]
    other = torch.zeros(1)
    assert twin[other] == {}
    assert other not in twin
    twin[other]["x"] = 1
    assert other in twin
    assert other not in state


def test_deepcopy_keeps_parameters_and_state_together() -> None:
    (p,) = tensors((2,), requires_grad=True)
    opt = Adam([p])
    run_steps(opt, [p], range(2))
    q, twin = copy.deepcopy((p, opt))
    assert twin.param_groups[0]["params"][0] is q
    assert twin.state[q]["step"] == 2
    assert twin.state[q]["grad_avg"] is not opt.state[p]["grad_avg"]


@every_optimizer
def test_an_optimizer_has_no_state_before_its_first_step(case: Case) -> None:
    params = tensors((2,), (3,), requires_grad=True)
    opt = case([params[:1], params[1:]])
    opt.freeze()
    opt.unfreeze()
    opt.set_hyper("lr", slice(1e-3))
    repr(opt)
    opt.state_dict()
    opt.all_params()
    list(opt.hypers)
    opt.zero_grad()
    opt.step()
    for p in params:
        assert opt.state[p] == {}
    assert len(opt.state) == 0
    assert not opt.state


@every_optimizer
def test_only_parameters_with_a_gradient_get_state(case: Case) -> None:
    params = tensors((2,), (3,), requires_grad=True)
    opt = case(params)
    give_grads(params[:1], 0)
    before = params[1].detach().clone()
    opt.step()
    assert params[1] not in opt.state
    assert torch.equal(params[1], before)


@every_optimizer
def test_values_are_tensors_and_numbers(case: Case) -> None:
    params = tensors((2,), (), requires_grad=True)
    opt = case(params)
    run_steps(opt, params, range(2))
    for entry in opt.state.values():
        assert all(isinstance(v, torch.Tensor | int | float) for v in entry.values())


@every_optimizer
def test_a_state_replaced_by_a_plain_mapping_works(case: Case) -> None:
    params = tensors((2,), requires_grad=True)
    opt = case(params)
    run_steps(opt, params, range(2))
    opt.state = defaultdict(dict)
    run_steps(opt, params, range(2))
    opt.load_state_dict(opt.state_dict())
    assert opt.all_params()[0][2] == opt.state[params[0]]


def test_tensors_of_no_group_may_be_marked() -> None:
    """fastai marks frozen biases whether the optimizer has them or not."""
    (p,), (foreign,) = tensors((2,)), tensors((3,))
    opt = Adam([p])
    opt.state[foreign]["do_wd"] = False
    run_steps(opt, [p], range(2))
    assert set(opt.state_dict()["state"]) == {0}
    opt.load_state_dict(opt.state_dict())
    opt.clear_state()
    assert opt.state[foreign] == {"do_wd": False}


def test_state_survives_torch_save() -> None:
    (p,) = tensors((2,))
    opt = Adam([p])
    run_steps(opt, [p], range(2))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["state"][0]["step"] == 2
    assert type(loaded["state"][0]) is dict


def test_states_and_marks_of_replaced_parameters_are_told() -> None:
    """Accelerate puts sharded parameters in the place of those in the groups (FSDP2)."""
    old, new = ([torch.ones(2, requires_grad=True) for _ in range(2)] for _ in range(2))
    opt = Adam(old, lr=0.1)
    opt.state[old[0]] = {"do_wd": False}
    opt.param_groups[0]["params"] = new
    give_grads(new, 0)
    with pytest.warns(UserWarning, match=r"of 1 parameters .* in no group any more, 1 with marks \(do_wd"):
        opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
        opt.param_lists = [old]  # with their states, as fastai's mixed precision does it
        for p, q in zip(old, new, strict=True):
            opt.state[p] = opt.state.pop(q)
        give_grads(old, 1)
        opt.step()
