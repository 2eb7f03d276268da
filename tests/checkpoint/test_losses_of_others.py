"""Losses that users of other checkpoints have reported, each as what must not happen here."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastopt import Adam
from fastopt.checkpoint import Checkpointer, CheckpointError, latest, load, prune, save, steps, verify
from fastopt.checkpoint import open as open_checkpoint
from fastopt.checkpoint.io import remote, storage
from fastopt.checkpoint.io.storage import LocalStorage
from fastopt.checkpoint.loading.reading import Reader
from fastopt.checkpoint.offline.consolidation import consolidate
from fastopt.checkpoint.offline.difference import diff
from fastopt.distributed import shard

from ..ranks import RankPool
from .jobs import Small, adam_job, bits, everything, train
from .test_one_process import DTYPES

Ranks = Callable[[int], RankPool]


def test_pytorch_140898_gradients_that_are_there_are_left_alone_and_lose_no_state(tmp_path: Path) -> None:
    model, opt, schedule = adam_job()
    train(model, opt, schedule)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    before = everything(model, opt, schedule)
    save(tmp_path, step=1, model=model, opt=opt, scheduler=schedule)
    assert everything(model, opt, schedule) == before
    other = adam_job(1)
    for p in other[0].parameters():
        p.grad = torch.full_like(p, 4.0)
    load(tmp_path, model=other[0], opt=other[1], scheduler=other[2])
    assert everything(*other) == before
    assert all((p.grad == 3).all() for p in model.parameters() if p.grad is not None)
    assert all((p.grad == 4).all() for p in other[0].parameters() if p.grad is not None)


def test_pytorch_192485_consolidation_keeps_every_dtype_and_number(tmp_path: Path) -> None:
    model = nn.Module()
    for dtype in DTYPES:
        raw = torch.randint(0, 2, (16 * 8,), dtype=torch.uint8)
        name = str(dtype).removeprefix("torch.")
        model.register_buffer(f"some_{name}", raw.view(dtype).clone())
        model.register_buffer(f"one_{name}", raw.view(dtype)[0].clone())
    model.register_buffer("none", torch.empty(0, 3))
    model.weight = nn.Parameter(torch.randn(4, 3))
    opt = torch.optim.Adam(model.parameters())  # its counts are 0-d tensors
    model.weight.grad = torch.ones(4, 3)
    for _ in range(7):
        opt.step()
    save(tmp_path / "run", step=7, model=model, opt=opt)
    consolidate(tmp_path / "run", tmp_path / "whole")
    assert diff(tmp_path / "run", tmp_path / "whole") == []
    other = nn.Module()
    for name, buffer in model.named_buffers():
        other.register_buffer(name, torch.zeros_like(buffer))
    other.weight = nn.Parameter(torch.zeros(4, 3))
    fresh = torch.optim.Adam(other.parameters())
    load(tmp_path / "whole", model=other, opt=fresh)
    assert bits(dict(other.state_dict())) == bits(dict(model.state_dict()))
    assert fresh.state[other.weight]["step"].item() == 7.0
    assert bits(fresh.state_dict()) == bits(opt.state_dict())


@pytest.mark.parametrize("asynchronous", [True, False])
def test_kempnerforge_102_nothing_goes_before_the_next_is_there(
    asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither after a save that fails, nor a moment before the manifest of one that succeeds."""
    checkpoints = Checkpointer(tmp_path, keep_last=1, asynchronous=asynchronous)
    checkpoints.save(1, model=Small(1))
    checkpoints.wait()
    publish, remove = LocalStorage.publish, LocalStorage.remove
    events: list[str] = []

    def refuse(self: LocalStorage, path: str, data: bytes) -> None:
        if path.endswith("manifest.json"):
            raise OSError(28, "No space left on device")
        publish(self, path, data)

    def publishes(self: LocalStorage, path: str, data: bytes) -> None:
        publish(self, path, data)
        events.append(f"wrote {path}")

    def removes(self: LocalStorage, path: str) -> None:
        remove(self, path)
        events.append(f"removed {path}")

    monkeypatch.setattr(LocalStorage, "publish", refuse)
    with pytest.raises(CheckpointError, match="No space"):
        _save(checkpoints, 2)
    assert steps(tmp_path) == [1]
    assert verify(tmp_path, mark=False).sound
    monkeypatch.setattr(LocalStorage, "publish", publishes)
    monkeypatch.setattr(LocalStorage, "remove", removes)
    _save(checkpoints, 2)
    assert steps(tmp_path) == [2]
    committed = events.index("wrote step-00000002/manifest.json")
    gone = [number for number, event in enumerate(events) if event.startswith("removed step-00000001")]
    assert gone
    assert min(gone) > committed


def _save(checkpoints: Checkpointer, step: int) -> None:
    checkpoints.save(step, model=Small(step))
    checkpoints.wait()


def test_orbax_394_a_run_may_be_copied_and_moved(tmp_path: Path) -> None:
    """Nothing in it says where it is, or depends on times; one step that stands alone may go alone."""
    for step in (1, 2):
        save(tmp_path / "run", step=step, model=Small(step), reuse=False)
    shutil.copytree(tmp_path / "run", tmp_path / "copy", copy_function=shutil.copyfile)
    (tmp_path / "run").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved" / "step-00000002", tmp_path / "one" / "step-00000002")
    for name in ("copy", "moved", "one"):
        model = Small()
        assert load(tmp_path / name, model=model).step == 2
        assert bits(dict(model.state_dict())) == bits(dict(Small(2).state_dict()))
        assert verify(tmp_path / name).sound


def test_a_map_of_names_moves_a_checkpoint_to_another_model(tmp_path: Path) -> None:
    """Weights and states under other names, through the state dicts that `open` gives."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    opt = Adam(model.named_parameters(), lr=0.01)
    model(torch.ones(1, 3)).sum().backward()
    opt.step()
    save(tmp_path, step=1, model=model, opt=opt)
    other = nn.ModuleDict({"body": nn.Linear(3, 4), "head": nn.Linear(4, 2)})
    fresh = Adam(other.named_parameters())
    found: Any = open_checkpoint(tmp_path)
    names = {"0": "body", "1": "head"}
    other.load_state_dict({f"{names[n[0]]}{n[1:]}": tensor for n, tensor in found["model"].items()})
    state = found["opt"].copy()
    for group in state["param_groups"]:
        group["param_names"] = [f"{names[n[0]]}{n[1:]}" for n in group["param_names"]]
    fresh.load_state_dict(state)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert bits(a.detach()) == bits(b.detach())
        assert bits(dict(opt.state[a])) == bits(dict(fresh.state[b]))
    assert fresh.param_groups[0]["lr"] == 0.01


def on_ranks(rank: int, world: int, root: str, write: bool) -> Any:
    """Save, or load and count: the manifests that this rank has read, and what came back with the schedule."""
    model = Small(0 if write else 9)
    opt = shard(Adam(model.named_parameters(), lr=0.1), model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 0.3, total_steps=50)
    if write:
        train(model, opt, schedule, steps=4)
        save(root, step=4, model=model, opt=opt, scheduler=schedule, extra={"seen": 32})
    read_into, seen = LocalStorage.read_into, []

    def counts(self: LocalStorage, path: str, *args: Any) -> None:
        seen.append(path.rpartition("/")[2])
        read_into(self, path, *args)

    LocalStorage.read_into = counts  # type: ignore[method-assign]
    try:
        found = load(root, model=model, opt=opt, scheduler=schedule)
    finally:
        LocalStorage.read_into = read_into  # type: ignore[method-assign]
    rates = []
    for _ in range(5):
        opt.step()
        schedule.step()
        rates.append([opt.param_groups[0]["lr"], opt.param_groups[0]["betas"], opt.param_groups[0]["initial_lr"]])
    return seen.count("manifest.json"), found.extra, schedule.last_epoch, rates


def test_paddle_79804_and_simpletuner_3045_one_rank_reads_the_manifest_and_rates_come_back_everywhere(
    ranks: Ranks, tmp_path: Path
) -> None:
    saved = ranks(2).run(on_ranks, str(tmp_path), True)
    loaded = ranks(3).run(on_ranks, str(tmp_path), False)
    assert [count for count, *_ in loaded] == [1, 0, 0]
    assert all(rest == list(saved[0][1:]) for _, *rest in loaded)
    assert saved[0][2] == 9


def test_speculators_739_a_name_makes_no_checkpoint(tmp_path: Path) -> None:
    """Empty folders, empty files and names that point elsewhere are passed over."""
    save(tmp_path, step=1, model=Small(1))
    for step in (2, 3):
        (tmp_path / f"step-0000000{step}").mkdir()
    (tmp_path / "step-00000003" / "manifest.json").touch()
    for name in ("latest", "step-9", "step-00000004"):
        (tmp_path / name).write_text("step-00000003")
    assert latest(tmp_path).step == 1  # type: ignore[union-attr]
    assert load(tmp_path, model=Small()).step == 1


def test_smart_open_684_an_exception_in_the_middle_publishes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "memory://half/run"
    save(url, step=1, model=Small(1))
    chunks = remote.RemoteStorage.create

    def fails(self: Any, path: str, data: Any) -> None:
        def half() -> Any:
            yield next(iter(data))
            raise RuntimeError("the device is gone")

        chunks(self, path, half())

    monkeypatch.setattr(remote.RemoteStorage, "create", fails)
    with pytest.raises(CheckpointError, match="the device is gone"):
        save(url, step=2, model=Small(2))
    monkeypatch.undo()
    assert storage.open_storage(url).sizes("step-00000002") == {}
    assert latest(url).step == 1  # type: ignore[union-attr]


def test_a_job_that_goes_back_keeps_what_it_saves_and_is_warned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After a spike of the loss: back to step 1, on to step 2, while step 3 of before is still there."""
    for step in (1, 3):
        save(tmp_path, step=step, model=Small(step))
    assert "newer" not in caplog.text
    with Checkpointer(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(2, model=Small(2))
    assert steps(tmp_path) == [2, 3]
    assert re.search(
        r"step 2 is saved, but .* has newer steps \(3\): a load without step= takes the newest", caplog.text
    )


@pytest.mark.parametrize("when", ["manifest", "data"])
def test_a_checkpoint_that_is_pruned_while_it_is_loaded_is_replaced_by_a_newer_one(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where one job evaluates what another one trains: that is no damage, and not the end of the search."""
    save(tmp_path, step=1, model=Small(1), reuse=False)
    place = (LocalStorage, "read_into") if when == "manifest" else (Reader, "verify")
    original = getattr(*place)

    def overtaken(self: Any, *args: Any) -> None:
        monkeypatch.setattr(*place, original)
        save(tmp_path, step=2, model=Small(2), reuse=False)
        assert prune(tmp_path, keep=1) == [1]
        original(self, *args)

    monkeypatch.setattr(*place, overtaken)
    model = Small()
    found = load(tmp_path, model=model)
    assert (found.step, found.skipped) == (2, ())
    assert bits(dict(model.state_dict())) == bits(dict(Small(2).state_dict()))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    assert not caplog.text
