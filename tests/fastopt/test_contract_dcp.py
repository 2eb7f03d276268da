"""PyTorch's distributed checkpoint helpers, in one process: nested and flat, marks, freezing, resume bit for bit."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from fastopt import Adam, Optimizer

from .samples import Case, assert_same, backward, every_optimizer, model, train, values

flat_or_nested = pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])


def grouped(m: nn.Sequential) -> list[list[nn.Parameter]]:
    return [list(m[0].parameters()), list(m[2].parameters())]


@every_optimizer
@flat_or_nested
def test_resume_bit_for_bit(case: Case, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    m, n = model(), model(1)
    one, two = case(grouped(m), lr=[0.02, 0.05]), case(grouped(n), lr=0.5)
    train(m, one, range(3))
    weights, saved = get_state_dict(m, one, options=options)
    weights, saved = copy.deepcopy(weights), copy.deepcopy(saved)
    set_state_dict(n, two, model_state_dict=weights, optim_state_dict=saved, options=options)
    train(m, one, range(3, 6))
    train(n, two, range(3, 6))
    assert_same(m.parameters(), n.parameters())
    assert one.hypers == two.hypers


@every_optimizer
@flat_or_nested
def test_reading_before_the_first_step_moves_nothing(case: Case, flat: bool) -> None:
    """R13: the helper makes state by a step with zero gradients and lr 0."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    m = model()
    opt = case(grouped(m), lr=0.5)
    before = values(m.parameters())
    get_optimizer_state_dict(m, opt, options=options)
    assert_same(m.parameters(), before)
    assert [h["lr"] for h in opt.hypers] == [0.5, 0.5]
    train(m, opt, range(8))
    assert all(torch.isfinite(p).all() for p in m.parameters())


@every_optimizer
@flat_or_nested
def test_marks_do_not_pass_for_state(case: Case, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    m, n = model(), model(1)
    one, two = case(grouped(m), lr=0.02), case(grouped(n), lr=0.02)
    for opt, net in ((one, m), (two, n)):
        opt.state[grouped(net)[0][1]] = {"do_wd": False, "force_train": True}
    train(m, one, range(3))
    weights, saved = copy.deepcopy(get_state_dict(m, one, options=options))
    set_state_dict(n, two, model_state_dict=weights, optim_state_dict=saved, options=options)
    assert {k: v for k, v in two.state[grouped(n)[0][1]].items() if k in ("do_wd", "force_train")} == {
        "do_wd": False,
        "force_train": True,
    }
    train(m, one, range(3, 6))
    train(n, two, range(3, 6))
    assert_same(m.parameters(), n.parameters())


@every_optimizer
@flat_or_nested
def test_frozen_on_both_sides(case: Case, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    m, n = model(), model(1)
    one, two = case(grouped(m), lr=0.05), case(grouped(n), lr=0.5)
    for opt in (one, two):
        opt.freeze()
    train(m, one, range(3))
    weights, saved = copy.deepcopy(get_state_dict(m, one, options=options))
    set_state_dict(n, two, model_state_dict=weights, optim_state_dict=saved, options=options)
    assert [two.is_frozen(0), two.is_frozen(1)] == [True, False]
    before = values(n[0].parameters())
    train(m, one, range(3, 6))
    train(n, two, range(3, 6))
    assert_same(m.parameters(), n.parameters())
    assert_same(n[0].parameters(), before)


def test_matched_by_name_across_the_order_of_groups() -> None:
    m, n = model(), model(1)
    one = Adam(list(m.parameters()), lr=0.05)
    two = Adam(list(n.parameters())[::-1], lr=0.5)
    train(m, one, range(3))
    weights, saved = copy.deepcopy(get_state_dict(m, one))
    set_state_dict(n, two, model_state_dict=weights, optim_state_dict=saved)
    train(m, one, range(3, 6))
    train(n, two, range(3, 6))
    assert_same(m.parameters(), n.parameters())


@flat_or_nested
def test_named_parameters(flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    m, n = model(), model(1)
    one, two = Adam(m.named_parameters(), lr=0.05), Adam(n.named_parameters(), lr=0.5)
    train(m, one, range(3))
    weights, saved = copy.deepcopy(get_state_dict(m, one, options=options))
    set_state_dict(n, two, model_state_dict=weights, optim_state_dict=saved, options=options)
    assert two.param_names() == {p: name for name, p in n.named_parameters()}
    train(m, one, range(3, 6))
    train(n, two, range(3, 6))
    assert_same(m.parameters(), n.parameters())


def test_a_tensor_lr() -> None:
    m, n = model(), model(1)
    one, two = Adam(m.parameters(), lr=torch.tensor(0.05)), Adam(n.parameters(), lr=torch.tensor(0.5))
    train(m, one, range(3))
    weights, saved = copy.deepcopy(get_state_dict(m, one))
    set_state_dict(n, two, model_state_dict=weights, optim_state_dict=saved)
    train(m, one, range(3, 6))
    train(n, two, range(3, 6))
    assert_same(m.parameters(), n.parameters())


def test_unfrozen_at_the_load_only_needs_a_lenient_one() -> None:
    m, n = model(), model(1)
    one, two = Adam(grouped(m), lr=0.05), Adam(grouped(n), lr=0.5)
    one.freeze()
    train(m, one, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(m, one))
    set_optimizer_state_dict(n, two, saved, options=StateDictOptions(strict=False))
    assert two.is_frozen(0)
    assert two.state[grouped(n)[1][1]]["step"] == 3
    train(n, two, range(2))


class App:
    """What PyTorch's tutorials call the app state: model and optimizer as one Stateful."""

    def __init__(self, m: nn.Module, opt: Optimizer) -> None:
        self.m, self.opt = m, opt

    def state_dict(self) -> dict[str, Any]:
        weights, saved = get_state_dict(self.m, self.opt)
        return {"model": weights, "optim": saved}

    def load_state_dict(self, sd: dict[str, Any]) -> None:
        set_state_dict(self.m, self.opt, model_state_dict=sd["model"], optim_state_dict=sd["optim"])


@every_optimizer
def test_save_and_load_with_stateful(case: Case, tmp_path: Path) -> None:
    m, n = model(), model(1)
    one, two = case(grouped(m), lr=0.05), case(grouped(n), lr=0.5)
    train(m, one, range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that there is only one process
        state_dict_saver.save({"app": App(m, one)}, checkpoint_id=tmp_path, no_dist=True)
        state_dict_loader.load({"app": App(n, two)}, checkpoint_id=tmp_path, no_dist=True)
    train(m, one, range(3, 6))
    train(n, two, range(3, 6))
    assert_same(m.parameters(), n.parameters())


def test_a_gradient_that_is_there_keeps_the_helper_from_stepping() -> None:
    m = model()
    opt = Adam(m.parameters())
    backward(m, 0)
    assert get_optimizer_state_dict(m, opt)["state"] == {}
