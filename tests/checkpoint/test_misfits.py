"""What does not fit is listed, and nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastopt import SGD, Adam
from fastopt.checkpoint import CheckpointError, load, save

from .jobs import Small, adam_job, everything, groups_of, train


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A saved job, step 1."""
    model, opt, schedule = adam_job()
    train(model, opt, schedule)
    save(tmp_path, step=1, model=model, opt=opt, scheduler=schedule)
    return tmp_path


def refused(match: str, root: Path, **live: Any) -> None:
    """Loading raises, and leaves everything as it was."""
    before = everything(**live)
    with pytest.raises(CheckpointError, match=match):
        load(root, **live)
    assert everything(**live) == before


def test_missing_unexpected_and_resized_tensors_are_listed(root: Path) -> None:
    model = Small(1)
    model.body[0] = nn.Linear(6, 7, dtype=torch.float64)
    model.narrow = nn.Parameter(torch.zeros(5, 7, dtype=torch.bfloat16))
    model.new = nn.Linear(2, 2)
    del model.scale
    pattern = (
        r"(?s)step-00000001 does not fit.*missing in the checkpoint: new\.weight, new\.bias\n"
        r".*unexpected in the checkpoint: scale\n"
        r".*narrow \(stored bfloat16 \(5, 6\), live bfloat16 \(5, 7\)\)"
        r".*body\.0\.weight \(stored float32 \(7, 6\), live float64 \(7, 6\)\)"
    )
    refused(pattern, root, model=model)


def test_long_lists_are_cut(root: Path) -> None:
    model = Small(1)
    model.many = nn.ModuleList(nn.Linear(1, 1) for _ in range(20))
    refused("and 20 more", root, model=model)


def test_an_optimizer_of_other_parameters_is_refused(root: Path) -> None:
    model = Small(1)
    first, second = groups_of(model)
    refused("unexpected in the checkpoint's optimizer: body.0.weight", root, model=model, opt=Adam([second], lr=0.1))
    model.extra = nn.Parameter(torch.zeros(2))
    opt = Adam([first, [*second, model.extra]], lr=0.1)
    refused("parameters missing in the checkpoint's optimizer: extra", root, model=model, opt=opt)


def test_groups_whose_hyper_parameters_differ_cannot_become_one(root: Path) -> None:
    model = Small(1)
    first, second = groups_of(model)
    refused(
        r"group 0 of the optimizer has parameters of groups \[0, 1\] of the checkpoint, which .* lr: \[0.0001, 0.001\]",
        root,
        model=model,
        opt=Adam([[*first, *second]], lr=0.1),
    )


def test_a_parameter_of_another_shape_is_refused(root: Path) -> None:
    model = Small(1)
    model.body[0].bias = nn.Parameter(torch.zeros(8))
    opt = Adam([(n, p) for n, p in model.named_parameters()], lr=0.1)
    refused(r"body\.0\.bias \(stored \(7,\), live \(8,\)\)", root, opt=opt)


def test_another_kind_of_optimizer_or_schedule_is_refused(root: Path) -> None:
    model = Small(1)
    opt = SGD(groups_of(model), lr=0.1, mom=0.9)
    refused("hyper-parameters missing in the checkpoint.*momentum of group 0", root, model=model, opt=opt)
    model, opt, _ = adam_job(1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10)
    refused("missing in the checkpoint's scheduler.*T_max", root, model=model, opt=opt, scheduler=cosine)


def test_what_was_not_saved_cannot_be_loaded(tmp_path: Path) -> None:
    model, opt, schedule = adam_job()
    save(tmp_path, step=1, extra={})
    refused(r"(?s)no optimizer.*no scheduler.*no model", tmp_path, model=model, opt=opt, scheduler=schedule)


def test_an_optimizer_that_refuses_leaves_the_scheduler_and_itself(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, opt, schedule = adam_job(1)

    class Stubborn(torch.optim.lr_scheduler.StepLR):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            if state_dict["last_epoch"] == 3:
                self.last_epoch = 99
                raise ValueError("not today")
            super().load_state_dict(state_dict)

    train(model, opt, schedule, 1)
    refused("ValueError.*not today", root, model=model, opt=opt, scheduler=Stubborn(opt, 2))
    monkeypatch.setattr(opt, "load_state_dict", lambda _: (_ for _ in ()).throw(ValueError("no")))
    before = everything(model, opt, schedule)
    with pytest.raises(CheckpointError, match="ValueError while loading the optimizer: no") as caught:
        load(root, model=model, opt=opt, scheduler=schedule)
    assert "the optimizer refused its former state too" in caught.value.__notes__[0]
    assert everything(model, opt, schedule) == before


def test_names_must_be_unique(tmp_path: Path) -> None:
    params = [("a", nn.Parameter(torch.zeros(1))), ("b", nn.Parameter(torch.zeros(1)))]
    opt = Adam(params, lr=0.1)
    opt.param_groups[0]["param_names"] = ["a", "a"]
    with pytest.raises(CheckpointError, match="same name: a"):
        save(tmp_path, step=1, opt=opt)
