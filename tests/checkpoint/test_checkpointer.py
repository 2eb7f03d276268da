"""Saving in the background: the loop goes on, what it changes does not leak in, errors are told, nothing is lost."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastopt import Adam
from fastopt.checkpoint import Checkpointer, CheckpointError, latest, load, steps
from fastopt.checkpoint.format.manifest import from_bytes
from fastopt.checkpoint.io import storage
from fastopt.checkpoint.saving.staging import Staging
from fastopt.distributed import shard

from ..ranks import RankPool
from .jobs import Small, adam_job, bits, everything, train

Ranks = Callable[[int], RankPool]


class Gate(storage.LocalStorage):
    """Local files that are created only while `opened` is set."""

    opened = threading.Event()

    def create(self, path: str, chunks: Any) -> None:
        """As the storage's, once the gate is open."""
        assert Gate.opened.wait(60)
        super().create(path, chunks)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Saves that stop before their first file until the event is set."""
    monkeypatch.setattr("fastopt.checkpoint.saving.saving.open_storage", lambda url: Gate(str(url)))
    Gate.opened.clear()
    return Gate.opened


def test_the_loop_goes_on_and_its_changes_do_not_leak_in(tmp_path: Path, gate: threading.Event) -> None:
    model, opt, schedule = adam_job()
    train(model, opt, schedule)
    with Checkpointer(tmp_path) as checkpoints:
        before = everything(model, opt, schedule)
        checkpoints.save(3, model=model, opt=opt, scheduler=schedule)
        assert checkpoints.saving
        train(model, opt, schedule)
        for p in model.parameters():
            p.data.fill_(7)
        gate.set()
        assert checkpoints.latest().step == 3
        assert not checkpoints.saving
        assert checkpoints.load(model=model, opt=opt, scheduler=schedule).step == 3
        assert everything(model, opt, schedule) == before


def test_one_save_at_a_time_in_one_buffer(tmp_path: Path, gate: threading.Event) -> None:
    model, opt, _ = adam_job()
    train(model, opt)
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, model=model, opt=opt)
    second = threading.Thread(target=lambda: checkpoints.save(2, model=model, opt=opt))
    second.start()
    second.join(0.2)
    assert second.is_alive(), "it waits for the first"
    buffer = checkpoints._staging._buffer
    gate.set()
    second.join(60)
    assert steps(tmp_path)[:1] == [1]
    checkpoints.wait()
    assert steps(tmp_path) == [1, 2]
    assert checkpoints._staging._buffer is buffer
    checkpoints.close()
    assert checkpoints._staging.nbytes == 0
    with pytest.raises(CheckpointError, match="closed"):
        checkpoints.save(3, model=model)


def test_what_does_not_fit_the_staging_memory_is_written_at_once(tmp_path: Path) -> None:
    model, opt, schedule = adam_job()
    train(model, opt, schedule)
    before = everything(model, opt, schedule)
    for limit in (0, 700):
        with Checkpointer(tmp_path / str(limit), staging=limit) as checkpoints:
            checkpoints.save(1, model=model, opt=opt, scheduler=schedule)
            assert checkpoints._staging.nbytes <= limit
        other = adam_job(5)
        torch.manual_seed(9)
        load(tmp_path / str(limit), model=other[0], opt=other[1], scheduler=other[2])
        assert everything(*other) == before


def test_an_error_is_logged_at_once_and_raised_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(handle: int, views: Any) -> None:
        raise OSError(28, "No space left on device")

    model = Small()
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, model=model)
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", full)
        for again in (checkpoints.wait, checkpoints.latest, lambda: checkpoints.save(3, model=model)):
            caplog.clear()
            checkpoints.save(2, model=model)
            checkpoints._written.wait()
            assert "saving step 2" in caplog.text
            assert "No space left on device" in caplog.text
            with pytest.raises(CheckpointError, match="No space left"):
                again()
        with pytest.raises(CheckpointError, match="No space left"), Checkpointer(tmp_path) as other:
            other.save(2, model=model)
        with pytest.raises(KeyError), Checkpointer(tmp_path) as other:  # noqa: PT012
            other.save(2, model=model)
            raise KeyError("the loop's own error")
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    checkpoints.save(2, model=model)
    checkpoints.close()
    assert steps(tmp_path) == [1, 2]


def test_the_process_waits_for_a_save_before_it_ends(tmp_path: Path) -> None:
    program = f"""
import time, torch
from fastopt.checkpoint import Checkpointer
from fastopt.checkpoint.io import storage
write = storage.write
storage.write = lambda *args: (time.sleep(0.5), write(*args))
Checkpointer({str(tmp_path)!r}).save(1, model=torch.nn.Linear(3, 3))
assert not list({str(tmp_path)!r} and __import__("pathlib").Path({str(tmp_path)!r}).glob("*/manifest.json"))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    assert latest(tmp_path).step == 1


def test_without_a_checkpoint_there_is_nothing_to_load(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, asynchronous=False) as checkpoints:
        assert checkpoints.load(model=nn.Linear(2, 2)) is None
        checkpoints.save(5, model=nn.Linear(2, 2), extra=["x"])
        assert checkpoints.latest().step == 5
        assert checkpoints.load(model=nn.Linear(2, 2)).extra == ["x"]
        with pytest.raises(CheckpointError, match="step 4 does not exist"):
            checkpoints.load(step=4)
    for wrong in ({"keep_last": 0}, {"keep_every": 5}, {"keep_last": 1, "keep_every": 0}, {"staging": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Checkpointer(tmp_path, **wrong)


def in_the_background(rank: int, world: int, root: str, fault: str) -> Any:
    """Some saves of a sharded job, each while it goes on, one of which fails on one rank; what is loaded at the end."""
    model = Small()
    opt = shard(Adam([(name, p) for name, p in model.named_parameters()], lr=0.01), model)
    wanted, texts = None, []
    original = storage.write

    def held() -> Any:
        return bits(dict(model.state_dict())), [bits(dict(opt.state[p])) for p in model.parameters()]

    def full(handle: int, views: Any) -> None:
        raise OSError(28, "No space left on device")

    def no_room(self: Any, items: Any) -> Any:
        raise MemoryError("no room for copies")

    copy = Staging.copy
    with Checkpointer(root, keep_last=2) as checkpoints:
        for step in range(1, 6):
            train(model, opt, steps=1)
            if step == 4 and rank == world - 1:
                if fault == "disk":
                    storage.write = full
                else:
                    Staging.copy = no_room  # type: ignore[method-assign]
            try:
                checkpoints.save(step, model=model, opt=opt)
                if step == 3:
                    wanted = held()
                if step == 4:
                    checkpoints.wait()
            except CheckpointError as error:
                texts.append(str(error))
            finally:
                checkpoints._written and checkpoints._written.wait()
                storage.write, Staging.copy = original, copy  # type: ignore[method-assign]
        checkpoints.wait()
        checkpoints.load(model=model, opt=opt, step=3)
    return texts, held() == wanted


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("disk", "OSError while writing the checkpoint: [Errno 28] No space left on device"),
        ("staging", "MemoryError while writing the checkpoint: no room for copies"),
    ],
)
def test_ranks_save_in_the_background_and_hear_of_each_others_errors(
    fault: str, text: str, ranks: Ranks, tmp_path: Path
) -> None:
    results = ranks(2).run(in_the_background, str(tmp_path), fault)
    assert [same for _, same in results] == [True, True]
    assert results[0] == results[1]
    (told,) = results[0][0]
    assert told.startswith(f"saving step 4 to {tmp_path} failed: rank 1: {text}")
    assert steps(tmp_path) == [3, 5]


def test_frozen_parts_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastopt.checkpoint.saving.writing.LEAST_REUSED", 100)
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 10))
    opt = Adam([model[0].parameters(), model[1].parameters()], lr=0.1)

    def step() -> None:
        model(torch.randn(4, 40)).sum().backward()
        opt.step()
        opt.zero_grad()

    def manifest(number: int) -> Any:
        return from_bytes((tmp_path / f"step-{number:08d}" / "manifest.json").read_bytes())

    with Checkpointer(tmp_path, keep_last=1) as checkpoints:
        step()
        opt.freeze_to(1)
        checkpoints.save(1, model=model, opt=opt)
        for number in (2, 3):
            step()
            checkpoints.save(number, model=model, opt=opt)
        checkpoints.wait()
        assert steps(tmp_path) == [1, 3], "step 3 takes files from step 1, and step 2 is gone"
        homes = {file.step: 0 for file in manifest(3).files}
        for file in manifest(3).files:
            homes[file.step] += file.bytes - file.header
        assert homes[1] == 3 * 4 * (40 * 40 + 40), "weights and both averages of the frozen layer"
        there = {file.name for file in manifest(3).files if file.step == 3}
        assert there == {path.name for path in (tmp_path / "step-00000003").glob("*.safetensors")}
        fresh = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 10))
        fresh_opt = Adam([fresh[0].parameters(), fresh[1].parameters()], lr=0.5)
        load(tmp_path, model=fresh, opt=fresh_opt, rng=False)
        assert everything(fresh, fresh_opt) == everything(model, opt)
        model[0].weight.data[3, 3] += 1
        checkpoints.save(4, model=model, opt=opt)
        checkpoints.wait()
        old = {key for key, tensor in manifest(4).tensors.items() if manifest(4).files[tensor.shards.file[0]].step == 1}
        assert {key for key in old if key.startswith("model/")} == set(), "the file with the changed weight is new"
        assert {key for key in old if key.startswith("state/")} != set()
    (tmp_path / "step-00000001" / sorted(manifest(4).files, key=lambda f: f.step)[0].name).unlink()
    with pytest.raises(CheckpointError, match=r"step-00000001/.*which step 4 needs, is missing"):
        load(tmp_path, model=fresh, step=4)
