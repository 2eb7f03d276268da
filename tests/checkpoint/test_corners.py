"""What a sceptic finds in the corners: odd values, links, forks, handlers of signals, groups of other ranks."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing._internal.two_tensor import TwoTensor

from fastopt.checkpoint import Checkpointer, CheckpointError, StorageError, latest, load, prune, save, steps, verify
from fastopt.checkpoint import open as open_states
from fastopt.checkpoint.io import retries, storage
from fastopt.checkpoint.io.storage import LocalStorage
from fastopt.checkpoint.offline.consolidation import consolidate
from fastopt.checkpoint.offline.export import export_hf
from fastopt.checkpoint.saving import staging

from ..ranks import RankPool
from .jobs import bits

Ranks = Callable[[int], RankPool]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before the event is set."""
    go, write = threading.Event(), storage.write
    monkeypatch.setattr(storage, "write", lambda *args: (go.wait(60), write(*args)))
    return go


# ---- values


def test_changes_of_extra_do_not_leak_in(tmp_path: Path, held: threading.Event) -> None:
    extra = {"epoch": 1, "seen": [1]}
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, model=nn.Linear(2, 2), extra=extra)
        extra["epoch"] = 2
        extra["seen"].append(2)
        held.set()
    assert load(tmp_path, model=nn.Linear(2, 2)).extra == {"epoch": 1, "seen": [1]}


class Holder:
    """Something with a state of plain values."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        """The state."""
        return self.state

    def load_state_dict(self, state: Any) -> None:
        """Take it."""
        self.state = state


@pytest.mark.parametrize("state", [7, 0, None, False, "abc", [1, 2], (1, 2), {}, {"a": 1}], ids=repr)
def test_a_position_is_any_plain_value(state: Any, tmp_path: Path) -> None:
    save(tmp_path, step=1, model=nn.Linear(2, 2), loader=Holder(state))
    for now in (state, 5, None):
        live = Holder(now)
        load(tmp_path, loader=live)
        assert bits(live.state) == bits(state)
    save(tmp_path, step=2, model=nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="it holds no loader"):
        load(tmp_path, loader=Holder(state))


def test_more_than_ten_parameters_without_names_are_known_by_place(tmp_path: Path) -> None:
    """As text "10" comes before "2"."""
    models = [nn.Sequential(*(nn.Linear(2, 1) for _ in range(6))) for _ in range(3)]
    opt = torch.optim.Adam(models[0].parameters())
    for i, p in enumerate(models[0].parameters()):
        p.grad = torch.full_like(p, i + 1.0)
    opt.step()
    save(opt.state_dict(), tmp_path, step=1)
    assert "param_names" not in open_states(tmp_path)["param_groups"][0]
    named, unnamed = torch.optim.Adam(models[1].named_parameters()), torch.optim.Adam(models[2].parameters())
    load(tmp_path, opt=named)
    unnamed.load_state_dict(open_states(tmp_path))
    for other, model in ((named, models[1]), (unnamed, models[2])):
        for p, q in zip(model.parameters(), models[0].parameters(), strict=True):
            assert torch.equal(other.state[p]["exp_avg"], opt.state[q]["exp_avg"])


# ---- places


@pytest.mark.parametrize("name", ["a::b", "memory::b", "file:x", "a b", "[x]*", "50%", "ü#?"])
def test_what_is_no_url_is_a_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = tmp_path / name
    for step, path in enumerate((place, str(place))):
        with Checkpointer(path) as checkpoints:
            checkpoints.save(step, model=nn.Linear(2, 2))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert sorted(path.name for path in place.iterdir()) == ["step-00000000", "step-00000001"]


def test_a_step_that_lies_elsewhere_behind_a_link(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for step in (1, 2):
        save(root, step=step, model=nn.Linear(2, 2))
    (root / "step-00000001").rename(elsewhere)
    (root / "step-00000001").symlink_to(elsewhere)
    assert verify(root, step=1, mark=False).sound
    assert prune(root, keep_last=1) == [1]
    assert [path.name for path in root.iterdir()] == ["step-00000002"]


def test_links_that_lead_nowhere_are_not_ours(tmp_path: Path) -> None:
    save(tmp_path, step=1, model=nn.Linear(2, 2))
    for name in ("x", "step-00000003", "step-00000001/y"):
        (tmp_path / name).symlink_to(Path(name).name)
        (tmp_path / f"{name}9").symlink_to("nothing")
    assert steps(tmp_path) == [1]
    save(tmp_path, step=2, model=nn.Linear(2, 2))
    assert load(tmp_path, model=nn.Linear(2, 2)).step == 2
    assert prune(tmp_path, keep_last=1) == [1]


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.ENOTCONN])
def test_a_folder_out_of_reach_is_no_empty_one(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, step=1, model=nn.Linear(2, 2))

    def refuse(path: Any) -> Any:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "scandir", refuse)
    for call in (latest, steps, verify, open_states, lambda url: prune(url, keep_last=1)):
        with pytest.raises(StorageError, match=f"{tmp_path}: {os.strerror(number)}"):
            call(tmp_path)
    with pytest.raises(CheckpointError, match=os.strerror(number)):
        load(tmp_path, model=nn.Linear(2, 2))


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_server_that_was_away_for_a_moment_is_no_damage(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of NFS: the file is opened again. What cannot be read then either is damage, or out of reach."""
    for step in (1, 2):
        save(tmp_path, step=step, model=nn.Linear(700, 700), reuse=False)
    fill, away = storage.fill, 2

    def sometimes(handle: int, views: Any) -> int:
        nonlocal away
        if away and Path(os.readlink(f"/proc/self/fd/{handle}")).parts[-2:][0] == "step-00000002":
            away -= 1
            fill(handle, views[:1])
            raise OSError(number, os.strerror(number))
        return fill(handle, views)

    monkeypatch.setattr(retries, "WAITS", (0.01, 0.01))
    monkeypatch.setattr(storage, "fill", sometimes)
    model = nn.Linear(700, 700)
    load(tmp_path, model=model, staging=1 << 30)
    assert away == 0
    assert load(tmp_path, model=nn.Linear(700, 700)).step == 2
    before, away = bits(dict(model.state_dict())), -1
    if number == errno.EIO:
        assert load(tmp_path, model=model, staging=1 << 30).step == 1
    else:
        with pytest.raises(CheckpointError, match=r"manifest\.json: Stale"):
            load(tmp_path, model=model, staging=1 << 30)
        assert bits(dict(model.state_dict())) == before
        monkeypatch.undo()
        assert latest(tmp_path).step == 2


# ---- processes


def test_a_worker_that_is_forked_during_a_save_ends(tmp_path: Path, held: threading.Event) -> None:
    """A worker of a data loader has no thread that writes: nothing to wait for when it ends."""
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, model=nn.Linear(2, 2))
        worker = multiprocessing.get_context("fork").Process(target=int)
        worker.start()
        worker.join(20)
        code = worker.exitcode
        worker.kill()
        held.set()
    assert code == 0
    assert latest(tmp_path).step == 1


def test_a_save_in_the_middle_of_a_save_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the handler of a signal: both would use one buffer, and only one of them would be waited for."""
    model, told = nn.Linear(2, 2), []
    copy = staging.Staging.copy
    with Checkpointer(tmp_path) as checkpoints:

        def handler(self: Any, items: Any) -> Any:
            monkeypatch.undo()
            with pytest.raises(CheckpointError, match="save of step 2 was called in the middle of another save") as e:
                checkpoints.save(2, model=model)
            told.append(e)
            return copy(self, items)

        monkeypatch.setattr(staging.Staging, "copy", handler)
        checkpoints.save(1, model=model)
        assert told
        checkpoints.save(2, model=model)
    assert steps(tmp_path) == [1, 2]


# ---- damage


@pytest.mark.parametrize("found_by", ["verify", "load"])
def test_nothing_is_taken_from_a_file_found_damaged_by_way_of_another_checkpoint(found_by: str, tmp_path: Path) -> None:
    """Steps 2 and 3 use a file of step 1. What is wrong with it is found in step 3; then step 2 is the newest."""
    model = nn.Linear(1024, 1024)
    for step in (1, 2, 3):
        save(tmp_path, step=step, model=model)
    (file,) = tmp_path.glob("*/model-*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    if found_by == "verify":
        assert not verify(tmp_path).sound
    else:
        with pytest.raises(CheckpointError, match="is damaged"):
            load(tmp_path, model=nn.Linear(1024, 1024), on_corrupt="raise")
    assert latest(tmp_path) is None
    save(tmp_path, step=4, model=model)
    assert verify(tmp_path).sound
    assert load(tmp_path, model=nn.Linear(1024, 1024)).step == 4


@pytest.mark.parametrize("broken", ["missing", "digest"])
def test_a_save_that_fails_leaves_a_damaged_checkpoint_of_its_step_as_it_was(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody may find what it lacks. Only a new one, once it is whole, takes its place."""
    model = nn.Linear(3, 3)
    folder = Path(save(tmp_path, step=1, model=model))
    (file,) = folder.glob("model-*")
    if broken == "missing":
        file.rename(tmp_path / "aside")
    else:
        (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes() + b" ")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(handle: int, views: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match="there is nothing to save"):
        save(tmp_path, step=1)
    monkeypatch.setattr(storage, "write", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save(tmp_path, step=1, model=model)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    monkeypatch.undo()
    order: list[str] = []
    sync, link = storage._sync, os.link
    monkeypatch.setattr(storage, "_sync", lambda place: (order.append(str(place)), sync(place)))
    monkeypatch.setattr(os, "link", lambda a, b: (order.append(Path(b).name), link(a, b)))
    save(tmp_path, step=1, model=model)
    assert str(tmp_path) in order[: order.index("manifest.json")], "the entry of a folder that a dead save has made"
    assert verify(tmp_path).sound


@pytest.mark.parametrize("write", [consolidate, export_hf])
def test_ctrl_c_after_the_last_file_leaves_nothing_or_all(
    write: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "run", step=1, model=nn.Linear(3, 3))
    publish = LocalStorage.publish

    def interrupted(self: LocalStorage, path: str, data: bytes) -> None:
        publish(self, path, data)
        if path.endswith(last):
            raise KeyboardInterrupt

    monkeypatch.setattr(LocalStorage, "publish", interrupted)
    for last in ("index.json", "manifest.json"):
        if last == "index.json" or write is consolidate:
            with pytest.raises(KeyboardInterrupt):
                write(tmp_path / "run", tmp_path / "to")
            assert not [path for path in tmp_path.glob("to/**/*") if path.is_file()]


# ---- ranks


def save_what_differs(rank: int, world: int, root: str) -> list[str]:
    """Errors of saves with schedules that are not the same on both ranks, and one that is."""
    told = []
    for step, states in enumerate([({"a": 1}, None), (None, {"a": 1}), ({"a": 1}, {"a": 2}), ({"a": 1}, {"a": 1})]):
        for what in ("scheduler", "scaler"):
            holder = None if states[rank] is None else Holder(states[rank])
            try:
                save(f"{root}/{what}", step=step, model=nn.Linear(2, 2), **{what: holder})
            except CheckpointError as error:
                told.append(str(error))
    return told


def test_ranks_that_disagree_on_schedule_or_loss_scale_hear_of_it(ranks: Ranks, tmp_path: Path) -> None:
    """Or one rank's would be what all of them go on with."""
    told = ranks(2).run(save_what_differs, str(tmp_path))
    assert told[0] == told[1]
    assert [text.partition(":")[0] for text in told[0]] == [
        *(f"ranks disagree on {what}" for _ in range(2) for what in ("scheduler", "scaler")),
        *(f"ranks disagree on {what} 'a'" for what in ("scheduler", "scaler")),
    ]
    for what in ("scheduler", "scaler"):
        assert steps(tmp_path / what) == [3]
        manifest = (tmp_path / what / "step-00000003" / "manifest.json").read_text()
        assert json.loads(manifest)[what] == {"a": 1}


def save_beside_other_groups(rank: int, world: int, root: str) -> tuple[int, list[int]]:
    """Save in jobs whose ranks are members of different numbers of groups; what each Checkpointer leaves open."""
    dist.new_group([0, 1])
    dist.new_group([0])
    subgroups = [dist.new_group([0, 2]), dist.new_group([1])]
    model = nn.Linear(2, 2)
    left = []
    for step in range(5):
        with Checkpointer(f"{root}/all") as checkpoints:
            checkpoints.save(step, model=model)
        with Checkpointer(f"{root}/{rank % 2}", group=subgroups[rank % 2]) as checkpoints:
            checkpoints.save(step, model=model)
        dist.barrier()
        left.append(len(os.listdir("/proc/self/fd")))
    return left[-1] - left[1], steps(f"{root}/{rank % 2}")


def test_ranks_may_be_in_different_numbers_of_groups(ranks: Ranks, tmp_path: Path) -> None:
    """torch.distributed.new_group would wait for half an hour: it names a group by how many the rank is in."""
    for left, saved in ranks(3).run(save_beside_other_groups, str(tmp_path), timeout=60):
        assert left <= 0, "a Checkpointer that is closed leaves no connections"
        assert saved == list(range(5))
    assert steps(tmp_path / "all") == list(range(5))


# ---- models


@pytest.mark.parametrize("wrapped", [0, 1])
def test_activation_checkpointing_may_be_switched_on_or_off(wrapped: int, tmp_path: Path) -> None:
    """Its wrapper shows in the names of parameters, but not in those of the state dict."""

    def job(wrap: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        if wrap:
            model[0] = checkpoint_wrapper(model[0])
        opt = torch.optim.Adam(model.parameters())
        model(torch.ones(2, 3)).sum().backward()
        opt.step()
        return model, opt

    jobs = [job(wrap=False), job(wrap=True)]
    save(tmp_path, step=1, model=jobs[wrapped][0], opt=jobs[wrapped][1])
    for model, opt in jobs:
        load(tmp_path, model=model, opt=opt)
    assert bits(dict(jobs[0][0].state_dict())) == bits(dict(jobs[1][0].state_dict()))
    assert bits(jobs[0][1].state_dict()) == bits(jobs[1][1].state_dict())


@pytest.mark.parametrize("staging", [0, 1 << 20])
def test_a_tensor_that_is_made_of_others_is_named_before_anything_changes(staging: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    save(tmp_path, step=1, model=model)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(TwoTensor(torch.ones(3, 3), torch.zeros(3, 3)))
    before = bits(model[0].weight)
    with pytest.raises(CheckpointError, match=r"1\.weight \(a TwoTensor, which keeps its data in other tensors"):
        load(tmp_path, model=model, staging=staging)
    assert bits(model[0].weight) == before
    with pytest.raises(CheckpointError, match=r"model tensor '1\.weight' is a TwoTensor"):
        save(tmp_path, step=2, model=model)
