"""Loading in one pass, checked while live tensors are overwritten, beside the default that changes nothing before."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastopt import Adam
from fastopt.checkpoint import Checkpointer, CheckpointError, load, save
from fastopt.checkpoint.io import storage
from fastopt.checkpoint.io.storage import LocalStorage
from fastopt.checkpoint.loading import reading
from fastopt.checkpoint.loading.optimizer_target import OptTarget
from fastopt.distributed import shard

from ..ranks import RankPool
from .jobs import Small, adam_job, bits, data_files, element_values, everything, states_by_name, train

Ranks = Callable[[int], RankPool]
SPOILT = "what is in memory is partly overwritten and must not be trained on"


def flip(file: Path, place: float = 0.5) -> None:
    """Flip a bit of its data, at this share of the file."""
    data = bytearray(file.read_bytes())
    data[max(4096, int(place * len(data)))] ^= 16
    file.write_bytes(data)


def flip_largest(folder: Path, kind: str) -> None:
    """Flip a bit of the largest file of a kind."""
    flip(max((f for f in data_files(folder) if f.name.startswith(kind)), key=lambda f: f.stat().st_size))


def job(seed: int) -> tuple[nn.Module, Any]:
    """A sharded job of 2.4 MB whose weights and averages follow from `seed`: elements of each are on every rank."""
    model = nn.Linear(400, 500)
    opt = shard(Adam(model.named_parameters(), lr=seed), model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(element_values(f"{seed} {name}", tuple(p.shape)))
            opt.state[p] = {key: _own(opt, p, f"{seed} {key} {name}") for key in ("grad_avg", "sqr_avg")} | {"step": 1}
    return model, opt


def _own(opt: Any, p: torch.Tensor, key: str) -> torch.Tensor:
    """This rank's elements of a state whose values follow from its key."""
    number = [id(q) for q in opt.param_groups[0]["params"]].index(id(p))
    start, stop = opt.layout.interval(number, opt.rank)
    return element_values(key, tuple(p.shape)).reshape(-1)[start:stop].clone()


def all_of(model: nn.Module, opt: Any) -> Any:
    """Everything that a load replaces, as bits."""
    states = [dict(opt.state[p]) for p in model.parameters()]
    return bits(dict(model.state_dict())), bits(states), bits(opt.param_groups[0]["lr"])


def plain_job(seed: int) -> tuple[nn.Module, Adam]:
    """A job in one process whose weights and averages follow from `seed`."""
    torch.manual_seed(seed)
    model = nn.Linear(300, 400)
    opt = Adam(model.named_parameters(), lr=0.1)
    for p in model.parameters():
        opt.state[p] = {"grad_avg": torch.rand_like(p), "sqr_avg": torch.rand_like(p), "step": seed}
    return model, opt


def loads_of_damage(rank: int, world: int, root: str) -> dict[str, Any]:
    """Save steps 1 and 2, damage rank 1's part of the states of step 2, and load into step 9 in every way."""
    for step in (1, 2):
        save(root, step=step, **dict(zip(("model", "opt"), job(step), strict=True)))
    if rank == 0:
        flip(max((Path(root) / "step-00000002").glob("s-*-r00001-*"), key=lambda file: file.stat().st_size))
    torch.distributed.barrier()
    found: dict[str, Any] = {}
    for check in ("before", "during"):
        model, opt = job(9)
        was = all_of(model, opt)
        with pytest.raises(CheckpointError) as caught:
            load(root, model=model, opt=opt, step=2, check=check)
        found[check] = str(caught.value), all_of(model, opt) == was
        torch.distributed.barrier()
    for check in ("before", "during"):
        model, opt = job(9)
        loaded = load(root, model=model, opt=opt, check=check)
        found[f"{check}, previous"] = loaded.step, len(loaded.skipped), all_of(model, opt) == all_of(*job(1))
        torch.distributed.barrier()
        if rank == 0:  # so that the second is not passed over because of a note
            for note in (Path(root) / "step-00000002").glob("damaged-*"):
                note.unlink()
        torch.distributed.barrier()
    return found


def test_a_flipped_bit_is_an_error_on_all_ranks_and_the_one_before_overwrites_everything(
    ranks: Ranks, tmp_path: Path
) -> None:
    first, second = ranks(2).run(loads_of_damage, str(tmp_path))
    for check in ("before", "during"):
        assert first[check][0] == second[check][0]
        assert "-r00001-" in first[check][0]
        assert "is damaged: bytes" in first[check][0]
        assert (SPOILT in first[check][0]) is (check == "during")
        for each in (first, second):
            assert each[f"{check}, previous"] == (1, 1, True)
    assert (first["before"][1], second["before"][1]) == (True, True)
    assert not (first["during"][1] and second["during"][1])


def test_without_an_older_one_the_error_says_what_is_in_memory(tmp_path: Path) -> None:
    for step, seed in ((1, 1), (2, 2)):
        save(tmp_path, step=step, model=Small(seed))
    for step in (1, 2):
        flip_largest(tmp_path / f"step-{step:08d}", "model")
    with pytest.raises(CheckpointError, match=f"{SPOILT}.*there is no complete checkpoint"):
        load(tmp_path, model=Small(3), check="during")
    other = nn.Linear(2, 2)
    save(tmp_path, step=0, model=other)
    for note in tmp_path.glob("*/damaged-*"):
        note.unlink()
    with pytest.raises(CheckpointError, match=f"{SPOILT}.*does not fit") as caught:
        load(tmp_path, model=Small(3), check="during")
    assert "step-00000000" in str(caught.value)


def test_one_pass_reads_every_byte_once_and_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model, opt), (other, live) = plain_job(1), plain_job(2)
    save(tmp_path, step=1, model=model, opt=opt)
    averages = [live.state[p][key] for p in other.parameters() for key in ("grad_avg", "sqr_avg")]
    where = [t.data_ptr() for t in (*averages, *other.parameters())]
    read: list[tuple[str, int, int]] = []
    looked: list[str] = []
    plain, verify = LocalStorage.read_into, reading.Reader.verify

    def count(self: LocalStorage, path: str, start: int, targets: Any, each: Any = None) -> None:
        read.append((path, start, start + sum(map(len, targets))))
        plain(self, path, start, targets, each)

    monkeypatch.setattr(LocalStorage, "read_into", count)
    monkeypatch.setattr(reading.Reader, "verify", lambda *args: (looked.append("verified"), verify(*args)))
    load(tmp_path, model=other, opt=live, check="during", rng=False)  # the generators are new memory
    data = [each for each in read if each[1] >= 4096 and each[0].endswith(".safetensors")]
    assert not looked
    assert sorted(data) == sorted(set(data))
    assert sum(stop - start for _, start, stop in data) == sum(
        file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
        for file in data_files(tmp_path / "step-00000001")
    )
    averages = [live.state[p][key] for p in other.parameters() for key in ("grad_avg", "sqr_avg")]
    assert [t.data_ptr() for t in (*averages, *other.parameters())] == where
    assert states_by_name(other, live) == states_by_name(model, opt)
    assert bits(dict(other.state_dict())) == bits(dict(model.state_dict()))


def test_new_memory_is_read_before_anything_live_is_touched(tmp_path: Path) -> None:
    model, opt, _ = adam_job()
    train(model, opt)
    save(tmp_path, step=1, model=model, opt=opt)
    flip_largest(tmp_path / "step-00000001", "s-")
    other, fresh, _ = adam_job(5)
    before = everything(other, fresh)
    with pytest.raises(CheckpointError, match="is damaged") as caught:
        load(tmp_path, model=other, opt=fresh, check="during")
    assert SPOILT not in str(caught.value)
    assert everything(other, fresh) == before


def test_an_optimizer_that_refuses_is_asked_before_anything_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, opt, _ = adam_job()
    train(model, opt)
    save(tmp_path, step=1, model=model, opt=opt)
    train(model, opt)
    before = everything(model, opt)
    take = Adam.load_state_dict
    told: list[Any] = []

    def refuse(self: Adam, state_dict: Any) -> None:
        told.append(state_dict)
        if len(told) == 1:
            raise ValueError("not today")
        take(self, state_dict)

    monkeypatch.setattr(Adam, "load_state_dict", refuse)
    with pytest.raises(CheckpointError, match="not today") as caught:
        load(tmp_path, model=model, opt=opt, check="during")
    assert SPOILT not in str(caught.value)
    assert everything(model, opt) == before


def test_a_load_that_was_killed_is_made_again(tmp_path: Path) -> None:
    model = nn.Linear(700, 800)
    save(tmp_path, step=1, model=model)
    files = {file: file.read_bytes() for file in sorted((tmp_path / "step-00000001").iterdir())}
    child = os.fork()
    if not child:  # dies in the middle of overwriting
        checked: list[int] = []
        compare = reading._Check._compare

        def then_die(self: Any, digest: str) -> None:
            compare(self, digest)
            checked.append(1)
            if len(checked) == 4:
                os.kill(os.getpid(), signal.SIGKILL)

        reading._Check._compare = then_die  # type: ignore[method-assign]
        load(tmp_path, model=model, check="during")
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert {file: file.read_bytes() for file in sorted((tmp_path / "step-00000001").iterdir())} == files
    other = nn.Linear(700, 800)
    load(tmp_path, model=other, check="during")
    assert bits(dict(other.state_dict())) == bits(dict(model.state_dict()))


def test_a_file_that_goes_bad_between_verifying_and_reading_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(tmp_path, step=step, model=Small(step))
    verify = reading.Reader.verify

    def then_lost(self: reading.Reader, *args: Any) -> None:
        verify(self, *args)
        if f"step-{2:08d}" in self.manifest.files[0].path:
            flip_largest(tmp_path / "step-00000002", "model")

    monkeypatch.setattr(reading.Reader, "verify", then_lost)
    with pytest.raises(CheckpointError, match=f"{SPOILT}, load it again: .*is damaged"):
        load(tmp_path, model=Small(3), step=2)
    flip_largest(tmp_path / "step-00000002", "model")  # back as it was
    model = Small(3)
    assert load(tmp_path, model=model).step == 1
    assert bits(dict(model.state_dict())) == bits(dict(Small(1).state_dict()))


@pytest.mark.parametrize("check", ["before", "during"])
def test_torchs_optimizers_are_overwritten_too(check: Any, tmp_path: Path) -> None:
    jobs = []
    for seed in (1, 2):
        model = Small(seed)
        opt = torch.optim.AdamW(model.parameters(), lr=0.1 * seed)
        train(model, opt)
        jobs.append((model, opt))
    with Checkpointer(tmp_path, asynchronous=False) as checkpoints:
        checkpoints.save(1, model=jobs[0][0], opt=jobs[0][1])
        checkpoints.load(model=jobs[1][0], opt=jobs[1][1], check=check, staging=0)
    assert states_by_name(*jobs[1]) == states_by_name(*jobs[0])
    assert bits(dict(jobs[1][0].state_dict())) == bits(dict(jobs[0][0].state_dict()))


def test_another_storage_is_read_once_and_another_dtype_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(300, 400)
    save("memory://during/run", step=1, model=model)
    half = nn.Linear(300, 400).to(torch.bfloat16)
    read: list[tuple[str, int]] = []
    plain = storage.RemoteStorage.read_into
    monkeypatch.setattr(
        storage.RemoteStorage, "read_into", lambda self, *args: (read.append(args[:2]), plain(self, *args))[1]
    )
    load("memory://during/run", model=half, cast=True, check="during")
    assert bits(half.weight) == bits(model.weight.to(torch.bfloat16))
    data = [each for each in read if each[1]]
    assert data
    assert len(data) == len(set(data))


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="check is 'before' or 'during', got 'after'"):
        load(tmp_path, check="after")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="check='during' overwrites live tensors"):
        load(tmp_path, check="during", strict=False)


def loads_without_memory(rank: int, world: int, root: str) -> str:
    """Load where rank 1 has no memory for new states; the error."""
    model, opt = job(1)
    save(root, step=1, model=model, opt=opt)
    other = nn.Linear(400, 500)
    plan = OptTarget.plan

    def no_memory(self: OptTarget, in_place: bool) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    if rank == 1:
        OptTarget.plan = no_memory  # type: ignore[method-assign]
    try:
        with pytest.raises(CheckpointError) as caught:
            load(root, model=other, opt=shard(Adam(other.named_parameters()), other))
    finally:
        OptTarget.plan = plan  # type: ignore[method-assign]
    return str(caught.value)


def test_a_rank_without_memory_for_new_states_tells_the_others(ranks: Ranks, tmp_path: Path) -> None:
    for text in ranks(2).run(loads_without_memory, str(tmp_path), timeout=20):
        assert text == "rank 1: OutOfMemoryError while reading the checkpoint: CUDA out of memory"


def memory_of_new_states(rank: int, world: int, root: str) -> tuple[set[int], set[int]]:
    """Where new states are read to, and where they are after the load."""
    save(root, step=1, **dict(zip(("model", "opt"), job(1), strict=True)))
    model = nn.Linear(400, 500)
    opt = shard(Adam(model.named_parameters()), model)
    targets: list[OptTarget] = []
    plan = OptTarget.plan
    OptTarget.plan = lambda self, in_place: (targets.append(self), plan(self, in_place))[1]  # type: ignore[method-assign]
    try:
        load(root, model=model, opt=opt)
    finally:
        OptTarget.plan = plan  # type: ignore[method-assign]
    read = {buffer.data_ptr() for want in targets[0].fresh for buffer in want.buffers}
    return read, {opt.state[p][key].data_ptr() for p in model.parameters() for key in ("grad_avg", "sqr_avg")}


def test_new_states_are_read_into_the_memory_that_they_keep(ranks: Ranks, tmp_path: Path) -> None:
    """Also where one rank holds all of them: nothing lies in memory twice."""
    ((read, kept),) = ranks(1).run(memory_of_new_states, str(tmp_path))
    assert len(kept) == 4
    assert kept == read
