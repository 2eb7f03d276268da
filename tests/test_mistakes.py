"""What users get wrong: each mistake raises an error that names the thing and says what to do, and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastopt import Adam, Optimizer, average_grad
from fastopt.checkpoint import Checkpointer, CheckpointError, load, save
from fastopt.checkpoint.offline.export import export_hf
from fastopt.distributed import shard
from fastopt.distributed.plan import plan


def job(steps: int = 1) -> tuple[nn.Sequential, Adam]:
    """A model with an optimizer of two groups."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    opt = Adam([[*layer.parameters()] for layer in model], lr=0.1)
    for _ in range(steps):
        model(torch.ones(2, 4)).sum().backward()
        opt.step()
    return model, opt


def bad_lr(model: nn.Module, opt: Adam) -> None:
    opt.param_groups[1]["lr"] = "0.1"
    opt.step()


def narrow_cb(model: nn.Module, opt: Adam) -> None:
    def narrow(p: Any, lr: Any) -> None:
        p.data.sub_(lr * p.grad)

    Optimizer(model.parameters(), [average_grad, narrow], lr=0.1).step()


def torchs_state(model: nn.Module, opt: Adam) -> None:
    layers: Any = model
    theirs = torch.optim.Adam([{"params": [*layer.parameters()]} for layer in layers], maximize=True)
    opt.load_state_dict(theirs.state_dict())


MISTAKES: dict[str, tuple[Callable[[Any, Any], Any], type[Exception], str]] = {
    "torch's option in a new group": (
        lambda m, o: o.add_param_group({"params": [torch.ones(1)], "amsgrad": True}),
        ValueError,
        "amsgrad of group 2 is True, which has no effect here: leave it out, or keep torch's optimizer in",
    ),
    "torch's option in a state dict": (torchs_state, ValueError, "maximize of group 0 is True, which has no effect"),
    "a hyper that is text": (bad_lr, TypeError, "lr of group 1 is '0.1', expected a number"),
    "a cb without **kwargs": (narrow_cb, TypeError, "narrow has no argument .*'mom', .* add \\*\\*kwargs"),
    "slice of text": (lambda m, o: o.set_hyper("lr", slice("a", "b")), ValueError, "lr=slice.* of numbers"),
    "slice with a step": (lambda m, o: o.set_hyper("lr", slice(0.1, 1, 2)), ValueError, "lr=slice.*first, last"),
    "freeze_to text": (lambda m, o: o.freeze_to("1"), TypeError, r"freeze_to\(\) takes the number of a group, got '1'"),
    "set_freeze of no group": (lambda m, o: o.set_freeze(2, False), IndexError, "no group 2, the optimizer has 2"),
    "clip to text": (lambda m, o: o.clip_grad_norm_("1"), TypeError, "max_norm is '1', expected a number"),
    "clip to less than 0": (lambda m, o: o.clip_grad_norm_(-1.0), ValueError, "max_norm is -1.0, expected a number >="),
    "clip by no norm": (lambda m, o: o.clip_grad_norm_(1.0, 0), ValueError, "norm_type is a positive number or inf"),
    "no state dict": (lambda m, o: o.load_state_dict(None), TypeError, "what state_dict.. gave, got a NoneType"),
    "buckets of text": (lambda m, o: shard(o, m, bucket_bytes="25"), ValueError, "bucket_bytes is .*, got '25'"),
    "a cost that is a number": (lambda m, o: shard(o, m, cost=3), TypeError, "cost is a function .*, got 3"),
    "a cost that is nothing": (
        lambda m, o: shard(o, m, layout="whole", cost=lambda p: None),
        TypeError,
        "the cost of '0.weight' is no number",
    ),
    "plan without an optimizer": (
        lambda m, o: plan(m, 2, o),
        TypeError,
        "make is a function .*; got an object of Adam",
    ),
    "plan of torch's": (lambda m, o: plan(m, 2, torch.optim.SGD), TypeError, "gave a SGD, .*OptimWrapper"),
    "plan on text": (lambda m, o: plan(m, "2"), ValueError, "at least one rank, got world_size='2'"),
    "plan of stage 4": (lambda m, o: plan(m, 2, stages=[4]), ValueError, r"stages are 1, 2 and 3, got \[4\]"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_and_changes_nothing(name: str) -> None:
    call, kind, text = MISTAKES[name]
    model, opt = job()
    weights = copy.deepcopy(model.state_dict())
    hypers, frozen = [dict(hyper) for hyper in opt.hypers], [opt.is_frozen(i) for i in range(2)]
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with pytest.raises(kind, match=text):
        call(model, opt)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert frozen == [opt.is_frozen(i) for i in range(2)]
    if call is not bad_lr:
        assert hypers == [dict(hyper) for hyper in opt.hypers]
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True) if p.grad is not None)


ON_DISK: dict[str, tuple[Callable[[Any, Any, Any], Any], type[Exception], str]] = {
    "save nothing": (lambda url, m, o: save(url, step=2), CheckpointError, "nothing to save: pass model="),
    "save swapped": (lambda url, m, o: save(url, step=2, model=o, opt=m), CheckpointError, "model is a .*got an Adam"),
    "save a module as opt": (lambda url, m, o: save(url, step=2, opt=m), CheckpointError, "opt is an .*a Sequential"),
    "save a number as scheduler": (
        lambda url, m, o: save(url, step=2, model=m, scheduler=3),
        CheckpointError,
        "scheduler is something with state_dict.*got an int",
    ),
    "load a step of text": (lambda url, m, o: load(url, model=m, step="1"), TypeError, "step is .*, got '1'"),
    "load swapped": (lambda url, m, o: load(url, model=o, opt=m), CheckpointError, "model is a .*got an Adam"),
    "save to a step folder": (
        lambda url, m, o: save(url / "step-00000002", step=2, model=m),
        CheckpointError,
        "would be the folder of a step, .* write to .*/run$",
    ),
    "save below a file": (
        lambda url, m, o: save(url / "step-00000001" / "manifest.json" / "x", step=2, model=m),
        CheckpointError,
        "cannot be made: .*/manifest.json is there and is no folder",
    ),
    "load another dtype": (lambda url, m, o: load(url, model=m.double()), CheckpointError, "cast=True takes other"),
    "load a step folder": (
        lambda url, m, o: load(url / "step-00000001", model=m),
        CheckpointError,
        "folder of a step, pass .*/run and step=1",
    ),
    "keep text": (lambda url, m, o: Checkpointer(url, keep_last="3"), TypeError, "keep_last is .*, got '3'"),
    "stage text": (lambda url, m, o: Checkpointer(url, staging="1GB"), TypeError, "staging is .*, got '1GB'"),
    "export to text": (lambda url, m, o: export_hf(url, url, dtype="BF16"), TypeError, "torch.bfloat16, got 'BF16'"),
}


@pytest.mark.parametrize("name", ON_DISK)
def test_a_mistake_with_checkpoints_leaves_them(name: str, tmp_path: Path) -> None:
    call, kind, text = ON_DISK[name]
    model, opt = job()
    save(tmp_path / "run", step=1, model=model, opt=opt)
    before = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(kind, match=text):
        call(tmp_path / "run", model, opt)
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_torchrun_without_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    model, opt = job(0)
    with pytest.raises(RuntimeError, match=r"torchrun has started 2 processes.*call .*init_process_group\(\) before"):
        shard(opt, model)


def on_ranks(rank: int, world_size: int, mistake: str) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model, plain = job(0)
    opt = shard(plain, model)
    called: nn.Module = model
    if mistake == "wrapped":
        called, text = DistributedDataParallel(model), "inside DistributedDataParallel, which averages"
    elif mistake == "fully_shard":
        called, text = fully_shard(model), "'0.weight' of the model is another tensor .*fully_shard"
    else:
        model[0].weight = nn.Parameter(torch.ones(3, 4))
        text = r"'0.weight' of the model is another tensor .*Call shard\(\) after"
    before = [p.detach().clone() for group in plain.param_groups for p in group["params"]]

    def iteration() -> None:
        called(torch.ones(2, 4)).sum().backward()
        opt.step()

    with pytest.raises(RuntimeError, match=text):
        iteration()
    opt.synchronize()
    after = [p for group in plain.param_groups for p in group["params"]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("mistake", ["wrapped", "fully_shard", "replaced"])
def test_a_model_changed_after_shard(ranks: Any, mistake: str) -> None:
    ranks(2).run(on_ranks, mistake)


def part_into_plain(rank: int, world_size: int) -> None:
    model, plain = job(0)
    opt = shard(plain, model)
    model(torch.ones(2, 4)).sum().backward()
    opt.step()
    _, alone = job(1)
    before = copy.deepcopy(alone.state_dict())
    with pytest.raises(ValueError, match=r"the part of one rank: call consolidate_state_dict\(\)"):
        alone.load_state_dict(opt.state_dict())
    after = alone.state_dict()["state"]
    assert all(torch.equal(v["grad_avg"], after[i]["grad_avg"]) for i, v in before["state"].items())


def test_the_part_of_a_rank_does_not_load_into_a_plain_optimizer(ranks: Any) -> None:
    ranks(2).run(part_into_plain)
