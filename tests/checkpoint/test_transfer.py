"""Loading into something else than what was saved: other groups, another head, another dtype, an older checkpoint."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastopt import Adam
from fastopt.checkpoint import CheckpointError, load, save
from fastopt.distributed import shard

from ..ranks import RankPool
from .jobs import Small, adam_job, bits, data_files, everything, states_by_name, train

Ranks = Callable[[int], RankPool]


def named(model: nn.Module, cuts: int, **hypers: Any) -> Adam:
    """Adam over `cuts` groups of consecutive parameters."""
    params = list(model.parameters())
    size = -(-len(params) // cuts)
    return Adam([params[i : i + size] for i in range(0, len(params), size)], **hypers)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3), (3, 2)])
def test_groups_may_be_split_otherwise(before: int, after: int, tmp_path: Path) -> None:
    model = Small()
    opt = named(model, before, lr=0.01, mom=0.8)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 2)
    train(model, opt, schedule)
    save(tmp_path, step=1, model=model, opt=opt, scheduler=schedule)
    other = Small(4)
    fresh = named(other, after, lr=0.5)
    follows = torch.optim.lr_scheduler.StepLR(fresh, 7)
    load(tmp_path, model=other, opt=fresh, scheduler=follows)
    assert states_by_name(other, fresh) == states_by_name(model, opt)
    assert [group["betas"] for group in fresh.param_groups] == [(0.8, 0.99)] * len(fresh.param_groups)
    assert follows.base_lrs == [0.01] * len(fresh.param_groups)
    torch.manual_seed(3)
    losses = train(model, opt, schedule)
    torch.manual_seed(3)
    assert train(other, fresh, follows) == losses


def test_without_strict_what_does_not_fit_stays_and_is_listed(tmp_path: Path) -> None:
    model, opt, schedule = adam_job()
    train(model, opt, schedule)
    save(tmp_path, step=1, model=model, opt=opt, scheduler=schedule)
    other = Small(5)
    other.narrow = nn.Parameter(torch.randn(5, 8).to(torch.bfloat16)[:, :6].contiguous())
    other.body[2] = nn.Linear(7, 6, bias=False)
    other.body[0].weight = nn.Parameter(torch.randn(7, 6)[:, :6].repeat(1, 1))
    other.extra = nn.Parameter(torch.randn(3))
    other.scale = nn.Parameter(torch.rand(2))
    params = dict(other.named_parameters())
    fresh = Adam([[p for n, p in params.items() if n != "extra"], [params["extra"]]], lr=0.3)
    kept = copy.deepcopy((params["extra"].data, params["scale"].data))
    found = load(tmp_path, model=other, opt=fresh, strict=False)
    report = "\n".join(found.report)
    for line in (
        "missing in the checkpoint: extra",
        "unexpected in the checkpoint: body.2.bias",
        "scale (stored float32 (), live float32 (2,))",
        "parameters missing in the checkpoint's optimizer: extra",
        "group 0 of the optimizer has parameters of groups [0, 1]",
    ):
        assert line in report
    assert bits((params["extra"].data, params["scale"].data)) == bits(kept)
    assert torch.equal(other.embed.weight, model.embed.weight)
    assert torch.equal(other.body[0].weight, model.body[0].weight)
    assert fresh.param_groups[0]["lr"] == 0.3, "the groups of the checkpoint differ in it"
    assert bits(dict(fresh.state[other.embed.weight])) == bits(dict(opt.state[model.embed.weight]))
    assert not fresh.state.get(params["extra"])
    assert not fresh.state.get(params["scale"])


class Pair(nn.Module):
    """Two layers, tied or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(200, 200, bias=False), nn.Linear(200, 200, bias=False)
        if tied:
            self.b.weight = self.a.weight


@pytest.mark.parametrize("staging", [0, 1 << 30])
def test_a_tied_tensor_gets_one_of_two_that_were_not(staging: int, tmp_path: Path) -> None:
    """Never both, one over the other."""
    model = Pair(tied=False)
    save(tmp_path, step=1, model=model)
    live = Pair(tied=True)
    before = bits(dict(live.state_dict()))
    with pytest.raises(
        CheckpointError, match=r"one tensor in the model, two in the checkpoint: a\.weight and b\.weight"
    ):
        load(tmp_path, model=live, staging=staging)
    assert bits(dict(live.state_dict())) == before
    (line,) = load(tmp_path, model=live, strict=False, staging=staging).report
    assert "a.weight and b.weight" in line
    assert bits(live.b.weight) == bits(model.a.weight)
    save(tmp_path, step=2, model=live)
    load(tmp_path, model=model, staging=staging)
    assert bits(model.a.weight) == bits(model.b.weight) == bits(live.a.weight)


def test_another_dtype_is_taken_only_when_asked_for(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    save(tmp_path, step=1, model=model)
    for staging in (None, 0):
        half = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).to(torch.bfloat16)
        before = everything(half)
        with pytest.raises(CheckpointError, match=r"0\.weight \(stored float32 \(4, 5\), live bfloat16 \(4, 5\)\)"):
            load(tmp_path, model=half, staging=staging)
        assert everything(half) == before
        load(tmp_path, model=half, cast=True, staging=staging)
        assert torch.equal(half[0].weight, model[0].weight.to(torch.bfloat16))
        assert half[1].num_batches_tracked.dtype is torch.int64
    whole = nn.BatchNorm1d(4)
    whole.num_batches_tracked = torch.tensor(0.0)
    save(tmp_path / "b", step=1, model=nn.BatchNorm1d(4))
    with pytest.raises(CheckpointError, match="num_batches_tracked"):
        load(tmp_path / "b", model=whole, cast=True)


@pytest.mark.parametrize("staging", [0, 1 << 30])
def test_states_of_another_dtype_are_rounded_only_when_asked_for(staging: int, tmp_path: Path) -> None:
    def job(dtype: torch.dtype) -> tuple[nn.Module, Adam]:
        torch.manual_seed(0)
        model = nn.Linear(5, 4)
        opt = Adam(model.named_parameters(), lr=0.1)
        for p in model.parameters():
            opt.state[p] = {"grad_avg": torch.rand_like(p), "sqr_avg": torch.rand_like(p).to(dtype), "step": 3}
        return model, opt

    model, opt = job(torch.float32)
    save(tmp_path, step=1, model=model, opt=opt)
    for strict in (True, False):
        other, live = job(torch.bfloat16)
        live.state[other.bias]["sqr_avg"].zero_()
        before = bits([dict(live.state[p]) for p in other.parameters()])
        if strict:
            with pytest.raises(CheckpointError, match=r"another dtype \(cast=True rounds them\): sqr_avg of weight"):
                load(tmp_path, opt=live, staging=staging)
            assert bits([dict(live.state[p]) for p in other.parameters()]) == before
        else:
            found = load(tmp_path, opt=live, staging=staging, strict=False)
            assert "sqr_avg of bias (stored float32, live bfloat16)" in found.report[0]
            assert not live.state[other.bias]["sqr_avg"].any()
            assert torch.equal(live.state[other.bias]["grad_avg"], opt.state[model.bias]["grad_avg"])
    load(tmp_path, opt=live, staging=staging, cast=True)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(live.state[q]["sqr_avg"], opt.state[p]["sqr_avg"].to(torch.bfloat16))
        assert live.state[q]["sqr_avg"].dtype is torch.bfloat16


def damage(folder: Path, kind: str) -> None:
    """Flip a bit in the middle of the largest file of `kind`."""
    file = max((f for f in data_files(folder) if f.name.startswith(kind)), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[4096 + (len(data) - 4096) // 2] ^= 4
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_replaced_by_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    jobs = []
    for step in (1, 2, 3):
        model, opt, _ = adam_job(step)
        train(model, opt)
        damaged = Path(save(tmp_path, step=step, model=model, opt=opt))
        jobs.append((model, opt))
        if step > 1:
            damage(damaged, "s-" if step == 2 else "model")
    live = adam_job(9)
    before = everything(*live[:2])
    for arguments in ({"on_corrupt": "raise"}, {"step": 3}, {"step": 2}):
        for staging in (None, 0):
            with pytest.raises(CheckpointError, match="is damaged"):
                load(tmp_path, model=live[0], opt=live[1], rng=False, staging=staging, **arguments)  # type: ignore[arg-type]
            assert everything(*live[:2]) == before
    with caplog.at_level(logging.WARNING, "fastopt.checkpoint"):
        found = load(tmp_path, model=live[0], opt=live[1], rng=False)
    assert found.step == 1
    assert [reason.split("step-0000000")[1][0] for reason in found.skipped] == ["3", "2"]
    assert caplog.text.count("loading step 1 instead of a newer one") == 2
    assert everything(live[0], live[1]) == everything(*jobs[0])
    with pytest.raises(ValueError, match="on_corrupt"):
        load(tmp_path, on_corrupt="ignore")  # type: ignore[arg-type]


def fall_back(rank: int, world: int, root: str) -> Any:
    """Load states of which only one rank's part is damaged; what every rank loads and says."""
    told: list[str] = []
    logger = logging.getLogger("fastopt.checkpoint")
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    model = nn.Linear(400, 300)
    opt = shard(Adam(model.named_parameters(), lr=0.1), model)
    for step in (1, 2):
        model(torch.ones(2, 400)).sum().backward()
        opt.step()
        opt.zero_grad()
        save(root, step=step, model=model, opt=opt, reuse=False)
    if rank == 0:
        damage(Path(root) / "step-00000002", "s-")
    torch.distributed.barrier()
    found = load(root, opt=opt, rng=False)
    logger.removeHandler(handler)
    return found.step, opt.state[model.weight]["step"], len(found.skipped), [text.split(":")[0] for text in told]


def test_all_ranks_fall_back_together_and_say_so(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks(2).run(fall_back, str(tmp_path))
    assert results == [(1, 1, 1, [f"rank {r}: loading step 1 instead of a newer one".split(":")[0]]) for r in range(2)]


def in_place(rank: int, world: int, root: str) -> Any:
    """Load into a job that is running, with no memory for copies: whether the tensors stay where they are."""
    outcomes = []
    for sharded in (False, True):
        model = Small()
        opt: Any = Adam([(name, p) for name, p in model.named_parameters()], lr=0.01)
        if sharded:
            opt = shard(opt, model)
        place = f"{root}/{sharded}"
        train(model, opt)
        save(place, step=1, model=model, opt=opt)
        wanted = bits([dict(opt.state[p]) for p in model.parameters()]), bits(dict(model.state_dict()))
        train(model, opt)
        shaped = [opt.state[p][key] for p in model.parameters() if p.ndim for key in ("grad_avg", "sqr_avg")]
        where = [t.data_ptr() for t in shaped]
        load(place, model=model, opt=opt, staging=0)
        now = [opt.state[p][key] for p in model.parameters() if p.ndim for key in ("grad_avg", "sqr_avg")]
        same = (bits([dict(opt.state[p]) for p in model.parameters()]), bits(dict(model.state_dict()))) == wanted
        outcomes.append((same, [t.data_ptr() for t in now] == where))
    return outcomes


def test_without_memory_for_copies_everything_is_read_into_place(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2).run(in_place, str(tmp_path)) == [[(True, True)] * 2] * 2


class Position:
    """A position in the data."""

    def __init__(self, at: Any) -> None:
        self.at = at

    def state_dict(self) -> dict[str, Any]:
        """As a data loader's."""
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As a data loader's."""
        self.at = state["at"]


def positions(rank: int, world: int, root: str, alike: bool, write: bool) -> Any:
    """Save or load the position of every rank and a loss scaler."""
    mine = Position((7, "shard") if alike else (rank, "shard"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**13)
    if write:
        save(root, step=1, loader=mine, scaler=scaler)
        return None
    found, other = Position(None), torch.amp.GradScaler("cpu")
    try:
        load(root, loader=found, scaler=other)
    except CheckpointError as error:
        return str(error)
    return found.at, other.get_scale()


def test_the_loss_scaler_and_the_position_in_the_data_come_back(ranks: Ranks, tmp_path: Path) -> None:
    for alike in (True, False):
        ranks(2).run(positions, str(tmp_path / str(alike)), alike, True)
    assert ranks(3).run(positions, str(tmp_path / "True"), True, False) == [((7, "shard"), 8192.0)] * 3
    assert ranks(2).run(positions, str(tmp_path / "False"), False, False) == [((r, "shard"), 8192.0) for r in range(2)]
    assert all("own position" in text for text in ranks(3).run(positions, str(tmp_path / "False"), False, False))
    save(tmp_path / "none", step=1, model=nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match="it holds no scaler"):
        load(tmp_path / "none", scaler=torch.amp.GradScaler("cpu"))
