"""What a job meets that nobody planned: Ctrl-C, threads, two jobs in one place, full disks, models without memory."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastopt import Adam
from fastopt.checkpoint import Checkpointer, CheckpointError, catalog, latest, load, save, steps, verify
from fastopt.checkpoint.io import retries, storage
from fastopt.checkpoint.io.storage import LocalStorage

from .jobs import Small, adam_job, bits, everything, train
from .torture import fill, job, wrong

# ---- what cannot be loaded into, or saved


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(3, 3)


def expanded() -> nn.Module:
    model = nn.Linear(3, 3)
    model.weight.data = torch.zeros(1, 3).expand(3, 3)
    return model


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(3, 3)


def conjugated() -> nn.Module:
    model = nn.Linear(3, 3)
    model.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64).conj())
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (on_meta, "meta device"),
        (expanded, "share memory"),
        (in_inference_mode, "inference mode"),
        (conjugated, "conjugates"),
    ],
)
@pytest.mark.parametrize("staging", [0, 1 << 20])
def test_live_tensors_that_nothing_can_be_stored_in_are_named(
    make: Callable[[], nn.Module], why: str, staging: int, tmp_path: Path
) -> None:
    stored = conjugated() if make is conjugated else nn.Linear(3, 3)
    save(tmp_path, step=1, model=nn.Sequential(nn.Linear(2, 2), stored))
    model = nn.Sequential(nn.Linear(2, 2), make())
    first = bits(model[0].weight)
    with pytest.raises(CheckpointError, match=rf"cannot be loaded into: 1\.weight \(.*{why}"):
        load(tmp_path, model=model, staging=staging)
    assert bits(model[0].weight) == first
    report = load(tmp_path, model=model, strict=False).report
    assert any("1.weight" in line for line in report)
    assert bits(model[0].weight) != first


def test_an_optimizer_of_parameters_without_memory_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    save(tmp_path, step=1, model=model, opt=Adam(model.named_parameters()))
    with pytest.raises(CheckpointError, match="meta device"):
        load(tmp_path, opt=Adam(on_meta().named_parameters()))


@pytest.mark.parametrize("staging", [0, 1 << 20])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_default_device_of_a_program_does_not_matter(asynchronous: bool, staging: int, tmp_path: Path) -> None:
    """Buffers for files are on the CPU, whatever torch.set_default_device says."""
    model, opt, schedule = adam_job()
    train(model, opt, schedule)
    other = adam_job(1)
    torch.set_default_device("meta")
    try:
        with Checkpointer(tmp_path, asynchronous=asynchronous) as checkpoints:
            checkpoints.save(1, model=model, opt=opt, scheduler=schedule)
        load(tmp_path, model=other[0], opt=other[1], scheduler=other[2], staging=staging)
        assert verify(tmp_path).sound
    finally:
        torch.set_default_device(None)
    assert everything(*other) == everything(model, opt, schedule)


@dataclass
class Holder:
    """Something with a state of plain values."""

    state: Any

    def state_dict(self) -> Any:
        """The state."""
        return self.state


def metadata() -> dict[str, Any]:
    model = nn.Module()
    model._parameters["__metadata__"] = nn.Parameter(torch.zeros(2))
    return {"model": model}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"step": 1 << 62}, "step must be a whole number from 0 to 4611686018427387903"),
        ({"step": 10**20}, "step must be a whole number"),
        (metadata(), "'__metadata__': safetensors files have no room"),
        ({"extra": {"a": 10**5000}}, r"extra\.a is a number of 16610 bits"),
        ({"scheduler": Holder({"v": {frozenset([1]): 2}})}, r"a key of scheduler\.v is frozenset"),
        ({"scheduler": Holder({"v": {(1, frozenset())}})}, r"scheduler\.v\[0\] is \(1, frozenset"),
        ({"loader": Holder({"v": "x" * 10_000})}, r"the manifest would have .* more than 10000: .* loader"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(
    what: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "_LARGEST_MANIFEST", 10_000)
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, **{"step": 1, "model": nn.Linear(2, 2), **what})
    assert not list(tmp_path.iterdir())
    save(tmp_path, step=(1 << 62) - 1, model=nn.Linear(2, 2))
    assert latest(tmp_path).step == (1 << 62) - 1


# ---- disks


def test_a_disk_that_fills_up_at_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data files, index and manifest: the save fails and names the file, the checkpoint before is as it was."""
    model, opt = job(sharded=False)
    fill(model, opt, 1)
    save(tmp_path, step=1, model=model, opt=opt, extra=1)
    write, room, files, left, only = storage.write, 0, [], 0, ""

    def full(handle: int, views: Any) -> None:
        nonlocal left
        chosen = Path(os.readlink(f"/proc/self/fd/{handle}")).name.startswith(only)
        left -= chosen
        if chosen and left < 0:
            os.write(handle, views[0][:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(handle, views)

    monkeypatch.setattr(storage, "write", full)
    fill(model, opt, 2)
    for only in ("model-", "s-"):  # files of both kinds are written at the same time
        left = 0
        with pytest.raises(CheckpointError, match=f"step-00000002/{only}"):
            save(tmp_path, step=2, model=model, opt=opt, extra=2)
    only = ""
    while True:
        left = room
        fill(model, opt, 2)
        try:
            save(tmp_path, step=2, model=model, opt=opt, extra=2)
            break
        except CheckpointError as error:
            files.append(str(error).rpartition("/")[2].partition("-")[0])
        room += 1
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        load(tmp_path, model=model, opt=opt)
        assert not wrong(model, opt, 1)
    assert [name.split(".json")[0] for name in files[-2:]] == [".model.safetensors.index", ".manifest"]
    load(tmp_path, model=model, opt=opt)
    assert not wrong(model, opt, 2)


def test_a_filesystem_that_syncs_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def only_files(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    save(tmp_path / "run", step=1, model=nn.Linear(2, 2))
    assert verify(tmp_path / "run").sound


def test_what_appears_late_in_a_listing_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, where a listing may be half a minute old."""
    sizes, late = LocalStorage.sizes, [2]

    def lagging(self: LocalStorage, folder: str) -> dict[str, int | None]:
        found = sizes(self, folder)
        if any(name.startswith("s-") for name in found) and late[0]:
            late[0] -= 1
            return {name: size for name, size in found.items() if not name.startswith("s-")}
        return found

    monkeypatch.setattr(retries, "WAITS", (0.01, 0.01))
    monkeypatch.setattr(LocalStorage, "sizes", lagging)
    save(tmp_path, step=1, model=nn.Linear(2, 2))
    assert late == [0]
    assert latest(tmp_path).step == 1


@pytest.mark.parametrize("part", ["manifest.json", "safetensors"])
def test_an_answer_that_ends_early_is_asked_for_again(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no damage: going on with an older checkpoint would cost hours."""
    url = f"memory://short/{part}"
    for step in (1, 2):
        save(url, step=step, model=Small(step))
    fs = storage.open_storage(url).fs  # type: ignore[attr-defined]
    cat_file, short = fs.cat_file, [2]

    def cut(path: str, **kwargs: Any) -> bytes:
        data: bytes = cat_file(path, **kwargs)
        if part in path and short[0]:
            short[0] -= 1
            return data[:-3]
        return data

    monkeypatch.setattr(retries, "WAITS", (0.01,) * 3)
    monkeypatch.setattr(type(fs), "cat_file", lambda self, path, **kwargs: cut(path, **kwargs))
    assert load(url, model=Small()).step == 2
    assert short == [0]
    short[0] = 100
    with pytest.raises(storage.StorageError, match="the answer ended after"):
        load(url, model=Small())
    monkeypatch.undo()
    assert latest(url).step == 2


# ---- others in the same place


def test_two_jobs_that_save_one_step_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one saves all of it just before the manifest of this one: that other one counts, index and all."""
    publish = LocalStorage.publish

    def overtaken(self: LocalStorage, path: str, data: bytes) -> None:
        if path.endswith("manifest.json"):
            monkeypatch.setattr(LocalStorage, "publish", publish)
            save(tmp_path, step=1, model=Small(2), extra="other")
            (tmp_path / "step-00000001" / "model.safetensors.index.json").unlink()
            publish(self, "step-00000001/model.safetensors.index.json", b"that of this job")
        publish(self, path, data)

    monkeypatch.setattr(LocalStorage, "publish", overtaken)
    with pytest.raises(CheckpointError, match=r"saved by somebody else meanwhile.*two jobs"):
        save(tmp_path, step=1, model=Small(1), extra="this")
    model = Small()
    assert load(tmp_path, model=model).extra == "other"
    assert bits(dict(model.state_dict())) == bits(dict(Small(2).state_dict()))
    assert verify(tmp_path).problems == ()
    assert len(list((tmp_path / "step-00000001").glob("*.safetensors"))) == 2, "none of this job's files is left"


def test_threads_take_turns(tmp_path: Path) -> None:
    """One Checkpointer, several threads: what is written is what the caller had."""
    models = [nn.Linear(200, 200) for _ in range(3)]
    for number, model in enumerate(models):
        torch.nn.init.constant_(model.weight, number)
    checkpoints = Checkpointer(tmp_path)
    failed: list[BaseException] = []

    def saver(number: int) -> None:
        try:
            for step in range(4):
                checkpoints.save(10 * step + number, model=models[number])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=saver, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    checkpoints.close()
    assert not failed
    assert steps(tmp_path) == [10 * step + number for step in range(4) for number in range(3)]
    live = nn.Linear(200, 200)
    for step in steps(tmp_path):
        load(tmp_path, model=live, step=step)
        assert (live.weight == step % 10).all()


def test_the_place_is_the_same_after_a_change_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Checkpointer("run") as checkpoints:
        checkpoints.save(1, model=nn.Linear(2, 2))
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        checkpoints.save(2, model=nn.Linear(2, 2))
    assert steps(tmp_path / "run") == [1, 2]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_cannot_be_removed_does_not_look_like_a_failed_save(
    asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: LocalStorage, path: str) -> None:
        if "step-00000001" in path:
            raise PermissionError(errno.EACCES, "Permission denied", path)

    checkpoints = Checkpointer(tmp_path, keep_last=1, asynchronous=asynchronous)
    checkpoints.save(1, model=nn.Linear(2, 2), extra=1)
    checkpoints.wait()
    monkeypatch.setattr(LocalStorage, "remove", refuse)
    with pytest.raises(CheckpointError, match=r"step 2 is saved at .*, but removing older ones failed: .*denied"):
        save_and_wait(checkpoints, 2)
    monkeypatch.undo()
    assert latest(tmp_path).step == 2


def save_and_wait(checkpoints: Checkpointer, step: int) -> None:
    checkpoints.save(step, model=nn.Linear(2, 2))
    checkpoints.wait()


def test_damage_is_no_reason_to_begin_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpointer(tmp_path)
    (tmp_path / "step-00000001").mkdir()
    assert checkpoints.load(model=nn.Linear(2, 2)) is None, "a save that died is no checkpoint"
    save_and_wait(checkpoints, 2)
    manifest = tmp_path / "step-00000002" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"there is no complete checkpoint.*\n.*digest"):
        checkpoints.load(model=nn.Linear(2, 2))
    assert latest(tmp_path) is None
    assert "passed over step 2" in caplog.text
    assert not verify(tmp_path).sound, "also of the newest"


# ---- Ctrl-C


@pytest.fixture
def alarm() -> Iterator[Callable[[float], None]]:
    """`alarm(seconds)`: KeyboardInterrupt in the main thread after that time."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds) and None
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_an_interrupted_wait_can_be_repeated(
    tmp_path: Path, alarm: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next save must not overwrite the buffer of the one that is still being written."""
    go, write = threading.Event(), storage.write
    monkeypatch.setattr(storage, "write", lambda *args: (go.wait(60), write(*args)))
    model, opt = job(sharded=False)
    with Checkpointer(tmp_path) as checkpoints:
        fill(model, opt, 1)
        checkpoints.save(1, model=model, opt=opt, extra=1)
        for call in (checkpoints.wait, lambda: checkpoints.save(2, model=model, opt=opt, extra=2), checkpoints.wait):
            fill(model, opt, 2)
            alarm(0.1)
            with pytest.raises(KeyboardInterrupt):
                call()
            assert checkpoints.saving
        go.set()
        checkpoints.save(2, model=model, opt=opt, extra=2)
    for step in (1, 2):
        load(tmp_path, model=model, opt=opt, step=step)
        assert not wrong(model, opt, step)


@pytest.mark.parametrize("at", ["scheduler", "model"])
def test_an_interrupted_load_changes_nothing_or_says_so(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, opt, schedule = adam_job()
    train(model, opt, schedule)
    save(tmp_path, step=1, model=model, opt=opt, scheduler=schedule)
    other, fresh, after = adam_job(1)
    train(other, fresh, after, steps=1)
    before = everything(other, fresh, after)
    once = [True]

    def interrupt(load_state_dict: Any) -> Any:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if once and once.pop():
                raise KeyboardInterrupt
            return load_state_dict(*args, **kwargs)

        return stand_in

    place = type(after if at == "scheduler" else other)
    monkeypatch.setattr(place, "load_state_dict", interrupt(place.load_state_dict))
    with pytest.raises(KeyboardInterrupt) as caught:
        load(tmp_path, model=other, opt=fresh, scheduler=after)
    notes = getattr(caught.value, "__notes__", [])
    if at == "scheduler":
        assert everything(other, fresh, after) == before
        assert not notes
    else:
        assert "partly overwritten" in notes[0]
    load(tmp_path, model=other, opt=fresh, scheduler=after)
    assert everything(other, fresh, after)["opt"] == everything(model, opt, schedule)["opt"]


def test_an_interrupted_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, step=1, model=nn.Linear(2, 2))

    def interrupt(self: LocalStorage, path: str, data: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalStorage, "publish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, step=2, model=nn.Linear(2, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    monkeypatch.undo()
    save(tmp_path, step=2, model=nn.Linear(2, 2))
