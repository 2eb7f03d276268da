"""Hyper-parameters: every form of value, both spellings, live views, and errors that change nothing."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from fastopt import (
    SGD,
    Adam,
    Larc,
    Lookahead,
    Optimizer,
    Ranger,
    RMSProp,
    average_grad,
    detuplify_pg,
    momentum_step,
    set_item_pg,
    sgd_step,
)

from .samples import Case, every_native, every_optimizer, give_grads, tensors


def three_groups(**hypers: Any) -> Adam:
    a, b, c = tensors((2,), (3,), (1,))
    return Adam([[a], [b], [c]], **hypers)


def lrs(opt: torch.optim.Optimizer) -> list[Any]:
    return [group["lr"] for group in opt.param_groups]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (0.5, [0.5, 0.5, 0.5]),
        (2, [2, 2, 2]),
        (np.float64(0.5), [0.5, 0.5, 0.5]),
        (np.float32(0.5), [0.5, 0.5, 0.5]),
        (np.array(0.5), [0.5, 0.5, 0.5]),
        ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]),
        ((0.1, 0.2, 0.3), [0.1, 0.2, 0.3]),
        (np.array([0.1, 0.2, 0.3]), [0.1, 0.2, 0.3]),
        ([np.float64(0.1), np.float64(0.2), 0.3], [0.1, 0.2, 0.3]),
        (torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), [0.1, 0.2, 0.3]),
        (range(1, 4), [1, 2, 3]),
        ([0.5], [0.5, 0.5, 0.5]),
        (slice(1.0), [0.1, 0.1, 1.0]),
        (slice(0, 1.0), [0.1, 0.1, 1.0]),
        (slice(None, 1.0), [0.1, 0.1, 1.0]),
        (slice(1e-4, 1e-2), [1e-4, 1e-3, 1e-2]),
        (slice(1e-2, 1e-4), [1e-2, 1e-3, 1e-4]),
        (slice(np.float64(1e-4), np.float64(1e-2)), [1e-4, 1e-3, 1e-2]),
        (slice(np.float64(1.0)), [0.1, 0.1, 1.0]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("when", ["built", "set"])
def test_values(given: Any, wanted: list[float], when: str) -> None:
    opt = three_groups(lr=given) if when == "built" else three_groups()
    if when == "set":
        opt.set_hyper("lr", given)
    assert lrs(opt) == pytest.approx(wanted)
    assert {type(v) for v in lrs(opt)} <= {float, int}


def test_a_generator_gives_one_value_per_group() -> None:
    opt = three_groups(lr=(0.1 * i for i in (1, 2, 3)))
    assert lrs(opt) == pytest.approx([0.1, 0.2, 0.3])


def test_one_group_takes_the_end_of_a_slice() -> None:
    for given in (slice(0.5), slice(0.1, 0.5)):
        opt = SGD(tensors((2,)), lr=given)
        assert lrs(opt) == [0.5]


def test_a_tensor_lr_stays_itself_and_other_tensors_become_numbers() -> None:
    lr = torch.tensor(0.5)
    opt = three_groups(lr=lr, wd=torch.tensor(0.25), mom=[torch.tensor(0.5)] * 3)
    assert all(v is lr for v in lrs(opt))
    for group in opt.param_groups:
        assert type(group["weight_decay"]) is float
        assert type(group["betas"][0]) is float
    opt.set_hyper("lr", 0.125)
    assert all(v is lr for v in lrs(opt))
    assert lr.item() == 0.125
    opt.set_hyper("lr", [1.0, 2.0, 4.0])
    assert [v.item() for v in lrs(opt)] == [1.0, 2.0, 4.0]
    opt.set_hyper("lr", 8.0)
    assert [v.item() for v in lrs(opt)] == [8.0, 8.0, 8.0]


@pytest.mark.parametrize("given", [[0.1, 0.2], [], np.array([0.1, 0.2]), torch.ones(4), np.array([0.1])], ids=repr)
@pytest.mark.parametrize("name", ["lr", "wd", "mom"])
def test_a_wrong_length_names_hyper_length_and_groups(given: Any, name: str) -> None:
    opt = three_groups()
    before = copy.deepcopy(opt.state_dict())
    words = f"Trying to set {len(given)} values for {name} but there are 3 parameter groups"
    with pytest.raises(ValueError, match=words):
        opt.set_hyper(name, given)
    assert opt.state_dict() == before
    with pytest.raises(ValueError, match=words):
        three_groups(**{name: given})


@pytest.mark.parametrize("given", [slice(None), slice(0.1, None), slice(-0.1, 0.1), slice(0.1, 0.0)], ids=repr)
def test_a_slice_that_cannot_be_spread(given: slice) -> None:
    opt = three_groups()
    with pytest.raises(ValueError, match="lr=slice"):
        opt.set_hyper("lr", given)
    assert lrs(opt) == [1e-3] * 3


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("lr", -1.0, ValueError),
        ("lr", float("nan"), ValueError),
        ("lr", [0.1, -0.1, 0.1], ValueError),
        ("lr", "fast", TypeError),
        ("lr", None, TypeError),
        ("lr", True, TypeError),
        ("lr", 1j, TypeError),
        ("wd", -0.1, ValueError),
        ("eps", -1e-8, ValueError),
        ("mom", -0.1, ValueError),
        ("mom", 1.0, ValueError),
        ("sqr_mom", 1.0, ValueError),
        ("sqr_mom", [0.9, 0.9, 2.0], ValueError),
    ],
)
def test_values_out_of_range_are_refused_and_nothing_changes(name: str, value: Any, error: type[Exception]) -> None:
    opt = three_groups()
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(error, match=rf"Adam: {name} of group \d"):
        opt.set_hyper(name, value)
    with pytest.raises(error, match=name):
        opt.set_hypers(lr=0.5, **{name: value}) if name != "lr" else opt.set_hypers(wd=0.5, lr=value)
    assert opt.state_dict() == before
    with pytest.raises(error, match=rf"Adam: {name} of group \d"):
        three_groups(**{name: value})


def test_the_momentum_of_sgd_may_be_one() -> None:
    assert SGD(tensors((2,)), mom=1.0).hypers[0]["mom"] == 1.0


@pytest.mark.parametrize("k", [0, -1, 2.5])
def test_lookahead_needs_a_whole_k(k: Any) -> None:
    with pytest.raises(ValueError, match="Lookahead: k of group 0"):
        Lookahead(SGD(tensors((2,))), k=k)
    opt = Ranger(tensors((2,)))
    with pytest.raises(ValueError, match="k of group 0"):
        opt.set_hyper("k", k)
    assert opt.hypers[0]["k"] == 6


class TestSpellings:
    """PyTorch's names and the callbacks', in constructors, set_hyper and the views."""

    @pytest.mark.parametrize(
        ("ours", "torchs"),
        [
            ({"wd": 0.5}, {"weight_decay": 0.5}),
            ({"mom": 0.5, "sqr_mom": 0.6}, {"betas": (0.5, 0.6)}),
            ({"mom": 0.5, "sqr_mom": 0.6}, {"betas": [0.5, 0.6]}),
        ],
    )
    def test_adam(self, ours: dict[str, Any], torchs: dict[str, Any]) -> None:
        a, b = three_groups(**ours), three_groups(**torchs)
        assert a.hypers == b.hypers
        assert a.defaults == b.defaults

    @pytest.mark.parametrize("cls", [SGD, RMSProp, Larc])
    def test_momentum(self, cls: Any) -> None:
        a, b = cls(tensors((2,)), mom=0.5, wd=0.25), cls(tensors((2,)), momentum=0.5, weight_decay=0.25)
        assert a.hypers == b.hypers
        assert a.cbs[1].__class__ is b.cbs[1].__class__
        assert a.param_groups[0]["momentum"] == 0.5

    def test_alpha(self) -> None:
        opt = RMSProp(tensors((2,)), alpha=0.5)
        assert opt.hypers[0]["sqr_mom"] == 0.5
        assert opt.param_groups[0]["alpha"] == 0.5
        opt.set_hyper("alpha", 0.6)
        opt.set_hyper("momentum", 0.0)
        assert opt.hypers[0]["sqr_mom"] == 0.6

    @pytest.mark.parametrize(
        "both",
        [
            {"wd": 0.5, "weight_decay": 0.25},
            {"mom": 0.5, "betas": (0.5, 0.9)},
            {"sqr_mom": 0.5, "betas": (0.9, 0.5)},
            {"mom": np.array([0.5, 0.6, 0.7]), "betas": (0.5, 0.9)},
            {"wd": [0.1, 0.2, 0.3], "weight_decay": 0.25},
        ],
    )
    def test_both_at_once_are_refused(self, both: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="same hyper-parameter"):
            three_groups(**both)

    @pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 0.99, 0.999), "ab", [(0.9, 0.99), (0.8, 0.9)]])
    def test_betas_are_two_numbers(self, betas: Any) -> None:
        with pytest.raises((ValueError, TypeError), match="betas"):
            three_groups(betas=betas)

    def test_set_hyper_takes_torchs_names(self) -> None:
        opt = three_groups()
        opt.set_hyper("weight_decay", [0.1, 0.2, 0.3])
        opt.set_hyper("betas", (0.5, 0.6))
        assert [h["wd"] for h in opt.hypers] == [0.1, 0.2, 0.3]
        assert [g["betas"] for g in opt.param_groups] == [(0.5, 0.6)] * 3
        assert set(opt.param_groups[0]) == {"params", "lr", "eps", "weight_decay", "betas"}

    def test_betas_with_two_groups_are_no_values_per_group(self) -> None:
        a, b = tensors((2,), (3,))
        opt = Adam([[a], [b]])
        opt.set_hyper("betas", (0.5, 0.6))
        assert [g["betas"] for g in opt.param_groups] == [(0.5, 0.6)] * 2
        before = copy.deepcopy(opt.state_dict())
        for wrong in ([(0.1, 0.2), (0.3, 0.4)], (0.5, 1.5), (0.5, "x"), (0.5, 0.6, 0.7), 0.5):
            with pytest.raises((ValueError, TypeError)):
                opt.set_hyper("betas", wrong)
            assert opt.state_dict() == before, wrong

    def test_mom_per_group_with_two_groups(self) -> None:
        a, b = tensors((2,), (3,))
        opt = Adam([[a], [b]], mom=[0.5, 0.6])
        opt.set_hyper("sqr_mom", (0.7, 0.8))
        assert [g["betas"] for g in opt.param_groups] == [(0.5, 0.7), (0.6, 0.8)]

    def test_lookaheads_alpha_beside_rmsprops(self) -> None:
        opt = Lookahead(RMSProp(tensors((2,)), sqr_mom=0.9), k=4, alpha=0.25)
        assert opt.hypers[0]["alpha"] == 0.25
        assert opt.hypers[0]["sqr_mom"] == 0.9
        opt.set_hyper("alpha", 0.75)
        assert (opt.hypers[0]["alpha"], opt.hypers[0]["sqr_mom"]) == (0.75, 0.9)
        opt.hypers[0]["alpha"] = 0.5
        opt.hypers[0]["sqr_mom"] = 0.8
        assert (opt.hypers[0]["alpha"], opt.hypers[0]["sqr_mom"]) == (0.5, 0.8)


class TestViews:
    def test_hypers_equal_print_and_iterate_as_dicts(self) -> None:
        opt = Adam(tensors((2,)))
        wanted = {"lr": 1e-3, "mom": 0.9, "sqr_mom": 0.99, "eps": 1e-5, "wd": 0.01}
        view = opt.hypers[0]
        assert view == wanted
        assert wanted == view
        assert opt.hypers == [wanted]
        assert [wanted] == opt.hypers
        assert opt.hypers != [wanted, wanted]
        assert repr(view) == repr(dict(view))
        assert set(view) == set(wanted)
        assert len(view) == 5
        assert {**view} == wanted
        assert "betas" in view
        assert view["betas"] == (0.9, 0.99)
        with pytest.raises(KeyError):
            view["params"]

    def test_every_view_sees_every_write(self) -> None:
        opt = three_groups()
        hypers, lists = opt.hypers, opt.param_lists
        opt.param_groups[0]["lr"] = 0.5
        assert hypers[0]["lr"] == 0.5
        hypers[1]["mom"] = 0.25
        assert opt.param_groups[1]["betas"] == (0.25, 0.99)
        hypers[-1]["weight_decay"] = 0.125
        assert opt.hypers_of(2)["wd"] == 0.125
        opt.set_hyper("lr", [1.0, 2.0, 3.0])
        assert [h["lr"] for h in hypers] == [1.0, 2.0, 3.0]
        q = torch.zeros(7)
        lists[0].append(q)
        assert opt.param_groups[0]["params"][-1] is q

    def test_views_follow_replaced_groups(self) -> None:
        opt = three_groups()
        hypers, view = opt.hypers, opt.hypers[1]
        opt.load_state_dict(three_groups(lr=[0.1, 0.2, 0.3]).state_dict())
        assert view["lr"] == 0.2
        opt.param_groups = [{**g, "lr": 9.0} for g in opt.param_groups]
        assert view["lr"] == hypers[0]["lr"] == 9.0

    def test_numpy_values_written_to_a_view_are_stored_as_numbers(self) -> None:
        opt = three_groups()
        opt.hypers[0]["lr"] = np.float64(0.5)
        opt.hypers[0]["mom"] = np.float32(0.5)
        assert type(opt.param_groups[0]["lr"]) is float
        assert type(opt.param_groups[0]["betas"][0]) is float

    def test_assigning_hypers_and_param_lists(self) -> None:
        opt = three_groups()
        opt.hypers[0] = {"lr": 0.5, "mom": 0.25}
        assert opt.param_groups[0]["betas"] == (0.25, 0.99)
        new = tensors((4,), (5,), (6,))
        opt.param_lists = [[p] for p in new]
        assert [g["params"][0].shape[0] for g in opt.param_groups] == [4, 5, 6]
        with pytest.raises(ValueError, match="3 parameter groups cannot take 1 values"):
            opt.param_lists = [[new[0]]]
        give_grads(new, 0)
        before = new[0].clone()
        opt.step()
        assert not torch.equal(new[0], before)

    @pytest.mark.parametrize("name", ["params", "param_names", "frozen"])
    def test_parts_of_a_group_are_no_hypers(self, name: str) -> None:
        opt = three_groups()
        before = [dict(g) for g in opt.param_groups]
        with pytest.raises(ValueError, match=f"'{name}' is no hyper"):
            opt.set_hyper(name, [1, 2, 3])
        with pytest.raises(ValueError, match=f"'{name}' is no hyper"):
            opt.hypers[0][name] = 1
        assert opt.param_groups == before

    @pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_a_copy_of_a_view_is_a_snapshot(self, how: Any) -> None:
        opt = three_groups()
        whole, one = how(opt.hypers), how(opt.hypers[0])
        opt.set_hyper("lr", 0.5)
        assert (dict(whole[0])["lr"] if how is not copy.copy else 1e-3, one["lr"]) == (1e-3, 1e-3)
        assert type(one) is dict
        assert type(whole) is list

    def test_a_view_is_no_place_to_add_or_remove_groups(self) -> None:
        opt = three_groups()
        with pytest.raises(TypeError, match="add_param_group"):
            opt.param_lists.append([torch.zeros(1)])
        with pytest.raises(TypeError):
            del opt.hypers[0]
        assert len(opt.param_groups) == 3

    def test_an_entry_can_be_removed_but_not_the_parameters(self) -> None:
        opt = three_groups()
        opt.set_hyper("extra", 3)
        del opt.hypers[0]["extra"]
        assert [("extra" in h) for h in opt.hypers] == [False, True, True]
        for name in ("params", "nothing"):
            with pytest.raises(KeyError):
                del opt.hypers[0][name]

    @every_optimizer
    def test_the_groups_hold_torchs_names(self, case: Case) -> None:
        opt = case(tensors((2,)))
        names = set(opt.param_groups[0])
        assert {"lr", "weight_decay", "params"} <= names
        assert names & {"betas", "momentum"}
        assert not names & {"wd", "mom", "sqr_mom"}
        assert set(opt.defaults) <= names | {"differentiable"}

    @every_native
    def test_hypers_hold_the_seeds_names(self, case: Case) -> None:
        assert {"lr", "mom", "wd"} <= set(case(tensors((2,))).hypers[0])

    def test_the_general_optimizer_stores_what_its_cbs_use(self) -> None:
        opt = Optimizer(tensors((2,)), sgd_step, lr=0.1, mom=0.5, wd=0.25)
        assert set(opt.param_groups[0]) == {"params", "lr", "mom", "wd"}
        opt.set_hyper("anything", {"a": 1})
        assert opt.hypers[0]["anything"] == {"a": 1}

    def test_all_params(self) -> None:
        opt = three_groups()
        (a,), (b,), (c,) = opt.param_lists
        assert [t[0] is p for t, p in zip(opt.all_params(), (a, b, c), strict=True)] == [True] * 3
        (found,) = opt.all_params(1)
        assert (found[0] is b, found[1] is opt.param_lists[1], found[3]["lr"]) == (True, True, 1e-3)
        assert [t[0] is c for t in opt.all_params(-1)] == [True]
        assert len(opt.all_params(slice(1, None))) == 2
        assert len(opt.all_params([0, 2])) == 2
        b.grad = torch.ones(3)
        assert [t[0] is b for t in opt.all_params(with_grad=True)] == [True]
        assert not opt.state
        assert len(opt.state) == 0
        found[2]["mark"] = 1
        assert opt.state[b] == {"mark": 1}
        with pytest.raises(IndexError):
            opt.all_params(3)


@pytest.mark.parametrize("cls", [SGD, RMSProp])
def test_momentum_scheduled_up_without_an_average_is_said(cls: Any) -> None:
    (p,) = tensors((2,))
    opt = cls([p], lr=0.1)
    give_grads([p], 0)
    opt.step()
    opt.set_hyper("mom", 0.9)
    with pytest.warns(UserWarning, match="built with mom=0"):
        opt.step()
    opt.step()  # said once


def test_sgd_with_momentum_in_one_group_has_the_average_in_all() -> None:
    a, b = tensors((2,), (3,))
    opt = SGD([[a], [b]], lr=0.1, mom=[0.0, 0.9])
    give_grads([a, b], 0)
    start, grad = a.clone(), a.grad.clone() if a.grad is not None else torch.zeros(0)
    opt.step()
    opt.step()
    torch.testing.assert_close(a, start - 0.2 * grad)
    assert "grad_avg" in opt.state[b]


def test_detuplify() -> None:
    assert detuplify_pg({"params": [1], "lr": 0.1, "betas": (0.5, 0.6)}) == {
        "lr": 0.1,
        "betas__0": 0.5,
        "betas__1": 0.6,
    }


def test_set_item() -> None:
    group: dict[str, Any] = {"lr": 0.1, "betas": (0.5, 0.6)}
    assert set_item_pg(group, "betas__1", 0.7) is group
    assert set_item_pg(group, "lr", 0.2) == {"lr": 0.2, "betas": (0.5, 0.7)}
    for wrong in ("betas__2", "nothing__0", "betas__x"):
        with pytest.raises(KeyError, match=wrong):
            set_item_pg(group, wrong, 1.0)


def test_a_new_name_that_is_nearly_another_is_said_to_be_one() -> None:
    """New names are no error, because schedules set hypers that an optimizer may lack."""
    opt = three_groups()
    with pytest.warns(UserWarning, match="'weight_deca' is a new hyper-parameter, did you mean 'weight_decay'"):
        opt.set_hyper("weight_deca", 0.1)
    assert opt.hypers[0]["weight_deca"] == 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.set_hyper("weight_decay", 0.1)
        opt.set_hyper("nu", 0.1)
        opt.set_hyper("weight_deca", 0.2)


def test_a_name_that_no_callback_asks_for_and_is_nearly_another() -> None:
    with pytest.warns(UserWarning, match="no callback asks for 'momm', did you mean 'mom'"):
        Optimizer([torch.ones(1)], [average_grad, momentum_step], lr=0.1, momm=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Optimizer([torch.ones(1)], [average_grad, momentum_step], lr=0.1, mom=0.5, momm=0.5, note="anything")


@pytest.mark.parametrize("cls", [SGD, RMSProp, Adam])
def test_options_of_torch_that_would_have_no_effect(cls: Any) -> None:
    for name in ("maximize", "nesterov", "amsgrad", "centered", "differentiable"):
        with pytest.raises(ValueError, match=f"{name} of group 0 is True, which has no effect here"):
            cls([{"params": [torch.ones(1)], name: True}])
        cls([{"params": [torch.ones(1)], name: False}])
