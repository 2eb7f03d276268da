"""Several real processes: saved on N ranks and loaded on M, and an error on one rank is an error on all."""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastopt import Adam
from fastopt.checkpoint import CheckpointError, latest, load, prune, save, steps
from fastopt.checkpoint.io import retries, storage
from fastopt.checkpoint.ranks import peers

from ..ranks import RankPool, run_ranks
from .jobs import Cut, Small, adam_job, bits, data_files, element_values, everything, groups_of, train

Ranks = Callable[[int], RankPool]


class Values(nn.Module):
    """Parameters and a buffer whose values follow from their names; the table is larger than a rank's fair share."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"table": (3000, 500), "cube": (3, 5, 7), "odd": (11,), "one": (1, 1), "none": (0, 4), "scalar": ()}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.body = nn.Linear(7, 5)
        self.tied = self.body
        self.register_buffer("mean", torch.zeros(9, dtype=torch.bfloat16))

    def fill(self) -> None:
        """Give everything its value."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(element_values(name.replace("tied", "body"), tuple(tensor.shape), tensor.dtype))

    def check(self) -> None:
        """Assert that everything has its value."""
        for name, tensor in self.state_dict().items():
            assert bits(tensor) == bits(element_values(name.replace("tied", "body"), tuple(tensor.shape), tensor.dtype))


def save_cut(rank: int, world: int, root: str, step: int, whole: bool) -> list[str]:
    """Save known values from every rank; the names of the files."""
    model = Values()
    model.fill()
    opt = Cut(model, rank, world, whole)
    opt.fill()
    opt.param_groups[0]["lr"] = 0.25
    place = save(root, step=step, model=model, opt=opt, extra={"rank": rank})
    return [file.name for file in data_files(place)]


def load_cut(rank: int, world: int, root: str, step: int, whole: bool) -> Any:
    """Load on every rank, check every value, and return what came with it."""
    model = Values()
    opt = Cut(model, rank, world, whole)
    found = load(root, model=model, opt=opt, step=step)
    model.check()
    opt.check()
    assert opt.param_groups[0]["lr"] == 0.25
    return found.step, found.world_size, found.extra


@pytest.mark.parametrize(("n", "m"), list(itertools.product(range(1, 5), repeat=2)))
def test_saved_on_n_ranks_and_loaded_on_m(
    n: int, m: int, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.getbasetemp() / "matrix"
    if not (root / f"step-{n:08d}").exists():
        files = ranks(n).run(save_cut, str(root), n, False)
        assert {name.split("-")[2] for name in files[0]} == {f"r{rank:05d}" for rank in range(n)}
    assert ranks(m).run(load_cut, str(root), n, False) == [(n, n, {"rank": 0})] * m


@pytest.mark.parametrize(("n", "m"), [(1, 3), (3, 2), (2, 4)])
def test_whole_parameters_with_owners_come_back(n: int, m: int, ranks: Ranks, tmp_path: Path) -> None:
    ranks(n).run(save_cut, str(tmp_path), 1, True)
    ranks(m).run(load_cut, str(tmp_path), 1, True)
    ranks(m).run(load_cut, str(tmp_path), 1, False)


def test_every_rank_writes_its_share(ranks: Ranks, tmp_path: Path) -> None:
    ranks(4).run(save_cut, str(tmp_path), 1, False)
    size = dict.fromkeys(range(4), 0)
    for file in data_files(tmp_path / "step-00000001"):
        if file.name.startswith("s-"):  # the model's tensors are not cut
            size[int(file.name.split("-")[2][1:])] += file.stat().st_size
    assert max(size.values()) - min(size.values()) < 20_000 + 500 * 4 * 8


class Counting(storage.LocalStorage):
    """Local files that count the bytes read from data files."""

    read = 0

    def read_into(self, path: str, start: int, targets: Any, each: Any = None) -> None:
        """As the storage's, counted."""
        Counting.read += sum(len(target) for target in targets)
        super().read_into(path, start, targets, each)


def load_counted(rank: int, world: int, root: str) -> tuple[int, int]:
    """Load the optimizer alone; the bytes read, and the bytes that this rank holds."""
    from fastopt.checkpoint.loading import loading

    opt = Cut(Values(), rank, world)
    loading.open_storage, Counting.read = (lambda url: Counting(str(url))), 0  # type: ignore[assignment, misc]
    try:
        load(root, opt=opt, rng=False)
    finally:
        loading.open_storage = storage.open_storage
    values = [value for state in opt.held.values() for value in state.values()]
    held = sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
    held += sum(piece.data.nbytes for value in values if isinstance(value, tuple) for piece in value)
    return Counting.read, held


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_a_rank_reads_little_more_than_it_holds(m: int, ranks: Ranks, tmp_path: Path) -> None:
    ranks(3).run(save_cut, str(tmp_path), 1, False)
    block = 256 << 10
    total = 0
    for read, held in ranks(m).run(load_counted, str(tmp_path)):
        assert held > 6_000_000 // m - 10_000
        assert read <= held + 6 * block
        total += read
    if m == 1:  # nobody needs a part of a block
        assert total <= 6_100_000


def data_parallel(rank: int, world: int, root: str) -> Any:
    """A job whose ranks all hold everything: saved, changed, loaded, continued; what every rank ends with."""
    model, opt, schedule = adam_job()
    train(model, opt, schedule)
    torch.manual_seed(100 + rank)
    random.seed(100 + rank)
    save(root, step=3, model=model, opt=opt, scheduler=schedule)
    torch.manual_seed(5)
    losses = train(model, opt, schedule)
    fresh = adam_job(rank + 7)
    load(root, model=fresh[0], opt=fresh[1], scheduler=fresh[2])
    drawn = torch.rand(3).tolist(), random.random()
    torch.manual_seed(5)
    assert train(*fresh) == losses
    return everything(*fresh), everything(model, opt, schedule), drawn


def other_statistics(rank: int, world: int, root: str) -> Any:
    """Save models whose buffers differ between the ranks; what comes back."""
    model = nn.BatchNorm1d(1000)
    for buffer in model.buffers():
        buffer.fill_(rank + 5)
    save(root, step=1, model=model)
    load(root, model=model)
    return {value for buffer in model.buffers() for value in buffer.reshape(-1).tolist()}


def test_buffers_are_those_of_the_first_rank(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(3).run(other_statistics, str(tmp_path)) == [{5}] * 3


def load_random(rank: int, world: int, root: str) -> Any:
    """What the generators give after loading."""
    load(root)
    return torch.rand(3).tolist(), random.random()


def test_replicas_are_written_once_and_generators_are_each_ranks_own(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks(2).run(data_parallel, str(tmp_path))
    for fresh, model, _ in results:
        assert fresh == model
    for rank, (_, _, drawn) in enumerate(results):
        torch.manual_seed(100 + rank)
        random.seed(100 + rank)
        assert drawn == (torch.rand(3).tolist(), random.random())
    more = ranks(4).run(load_random, str(tmp_path))
    assert more[:2] == [drawn for _, _, drawn in results]
    assert len({drawn[1] for drawn in more}) == 4
    assert ranks(4).run(load_random, str(tmp_path)) == more
    assert ranks(1).run(load_random, str(tmp_path)) == more[:1]


def raises(rank: int, world: int, act: Callable[..., Any], *args: Any) -> str:
    """The text of the CheckpointError that `act` raises on this rank."""
    with pytest.raises(CheckpointError) as caught:
        act(rank, world, *args)
    return str(caught.value)


def differ(rank: int, world: int, root: str, what: str) -> None:
    """Save something that one rank sees differently."""
    model = Small()
    opt = Adam(groups_of(model), lr=0.1)
    train(model, opt)
    step, place = 1, root
    loader: Any = torch.amp.GradScaler("cpu") if what == "loader" and rank == 0 else None
    if rank == 1:
        if what == "step":
            step = 2
        elif what == "url":
            place = root + "/other"
        elif what == "name":
            model.register_buffer("only_here", torch.zeros(1))
        elif what == "shape":
            model.seen = torch.zeros(9)
        elif what == "dtype":
            model.seen = model.seen.int()
        elif what == "hyper":
            opt.set_hyper("lr", 0.2)
        elif what == "frozen":
            opt.freeze_to(1)
        elif what == "count":
            opt.state[model.narrow]["step"] = 9
        elif what == "state":
            opt.state[model.narrow]["grad_avg"] = torch.zeros(3)
        elif what == "group":
            opt = Adam(groups_of(model)[::-1], lr=0.1)
    save(place, step=step, model=model, opt=opt, loader=loader)


DIFFERENCES = {
    "step": "ranks disagree on step: 1 on rank 0, 2 on rank 1",
    "url": "ranks disagree on url",
    "name": "model 'tensors' 'only_here': missing on rank 0, there on rank 1",
    "shape": "'seen'",
    "dtype": "'seen' 1: I64 on rank 0, I32 on rank 1",
    "hyper": "opt 'groups' 0 'options' 'lr': 0.1 on rank 0, 0.2 on rank 1",
    "frozen": "opt 'groups' 0 'options' 'frozen': missing on rank 0, there on rank 1",
    "count": "state 'step' of 'narrow': ['value', 3] on rank 0, ['value', 9] on rank 1",
    "state": "state 'grad_avg' of 'narrow'",
    "group": "opt 'groups' 0 'params'",
    "loader": "ranks disagree on having a loader: 1 on rank 0, 0 on rank 1",
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_ranks_that_disagree_all_hear_of_it(what: str, ranks: Ranks, tmp_path: Path) -> None:
    texts = ranks(2).run(raises, differ, str(tmp_path), what)
    assert texts[0] == texts[1]
    assert DIFFERENCES[what] in texts[0]
    assert not list(tmp_path.iterdir())


def save_with_fault(rank: int, world: int, root: str, fault: str) -> None:
    """A save during which one rank fails."""
    model, opt, schedule = adam_job()
    train(model, opt, schedule)
    original = storage.write, storage.LocalStorage.publish
    if fault == "disk" and rank == 1:

        def full(handle: int, chunk: Any) -> None:
            raise OSError(28, "No space left on device")

        storage.write = full
    elif fault == "extra" and rank == world - 1:
        schedule = {}.get  # type: ignore[assignment]
    elif fault == "manifest":

        def refuse(self: Any, path: str, data: bytes) -> None:
            raise OSError(5, "Input/output error")

        storage.LocalStorage.publish = refuse  # type: ignore[method-assign]
    try:
        save(root, step=2, model=model, opt=opt, scheduler=schedule)
    finally:
        storage.write, storage.LocalStorage.publish = original  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("disk", "rank 1: OSError while writing the checkpoint: [Errno 28] No space left on device"),
        ("manifest", "rank 0: OSError while writing the checkpoint: [Errno 5] Input/output error"),
        ("extra", "rank 2: scheduler is something with state_dict(), got a builtin_function_or_method"),
    ],
)
def test_an_error_on_one_rank_is_raised_on_all(fault: str, text: str, ranks: Ranks, tmp_path: Path) -> None:
    ranks(3).run(save_cut, str(tmp_path), 1, False)
    texts = ranks(3).run(raises, save_with_fault, str(tmp_path), fault)
    assert len(set(texts)) == 1
    assert text in texts[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    ranks(2).run(load_cut, str(tmp_path), 1, False)


def unshared(rank: int, world: int) -> None:
    """Save to a place that every rank has for itself."""
    retries.WAITS = (0.1,)
    save("memory://alone", step=1, model=Small())


def test_storage_that_the_ranks_do_not_share_is_noticed(ranks: Ranks) -> None:
    texts = ranks(2).run(raises, unshared)
    assert "rank 0 sees no such file: is the storage shared by all ranks?" in texts[1]


def load_misfit(rank: int, world: int, root: str, how: str) -> str:
    """A load that fails on one rank only; nothing may change on any."""
    model = Values()
    opt = Cut(model, rank, world)
    opt.fill("cube")
    if rank == 1 and how == "shape":
        model.mean = torch.zeros(10)
    if rank == 1 and how == "refuses":
        opt.load_state_dict = lambda state_dict: {}[0]  # type: ignore[method-assign, assignment]
    before = everything(model), bits(opt.param_groups[0]["lr"])
    with pytest.raises(CheckpointError) as caught:
        load(root, model=model, opt=opt, step=1 + (how == "step" and rank == 1))
    assert (everything(model), bits(opt.param_groups[0]["lr"])) == before
    opt.check("cube")
    return str(caught.value)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("shape", "rank 1: {root}/step-00000001 does not fit"),
        ("refuses", "rank 1: KeyError while loading the optimizer"),
        ("step", "ranks disagree on what to load"),
    ],
)
def test_a_load_that_fails_on_one_rank_changes_nothing_on_any(
    how: str, text: str, ranks: Ranks, tmp_path: Path
) -> None:
    ranks(2).run(save_cut, str(tmp_path), 1, False)
    texts = ranks(2).run(load_misfit, str(tmp_path), how)
    assert texts[0] == texts[1]
    assert text.format(root=tmp_path) in texts[0]


def damaged_load(rank: int, world: int, root: str) -> str:
    """Load the states only; every rank reads other blocks."""
    opt = Cut(Values(), rank, world)
    before = bits(opt.state_dict())
    text = raises(rank, world, lambda *_: load(root, opt=opt))
    assert bits(opt.state_dict()) == before
    return text


def test_a_damaged_block_is_an_error_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2).run(save_cut, str(tmp_path), 1, False)
    states = [file for file in data_files(tmp_path / "step-00000001") if file.name.startswith("s-")]
    file = max(states, key=lambda f: ("r00001" in f.name, f.stat().st_size))
    with file.open("r+b") as opened:
        opened.seek(-1_000_000, os.SEEK_END)
        old = opened.read(1)
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([old[0] ^ 1]))
    texts = ranks(2).run(damaged_load, str(tmp_path))
    assert texts[0] == texts[1]
    assert f"{file.name} is damaged: bytes" in texts[0]


def in_groups(rank: int, world: int, root: str) -> Any:
    """Two groups of ranks save and load, each its own checkpoint."""
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    number = 0 if rank < 2 else 1
    model = Small(number)
    save(f"{root}/{number}", step=number, model=model, group=groups[number])
    other = Small(9)
    found = load(f"{root}/{number}", model=other, group=groups[number])
    assert bits(dict(other.state_dict())) == bits(dict(model.state_dict()))
    foreign = raises(rank, world, lambda *_: save(root, step=1, group=groups[1 - number]))
    return found.step, found.world_size, foreign


def test_a_group_of_ranks_has_its_own_checkpoints(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks(3).run(in_groups, str(tmp_path))
    assert [result[:2] for result in results] == [(0, 2), (0, 2), (1, 1)]
    assert all("not a member" in result[2] for result in results)


def beside_nccl(rank: int, world: int, root: str) -> tuple[int, bool]:
    """Save twice with a group that claims to move only CUDA data; groups made, and whether the model came back."""
    config, gloo_group, made = dist.get_backend_config, peers._gloo_group, []

    def counted(group: Any) -> Any:
        made.append(gloo_group(group))
        return made[-1]

    dist.get_backend_config, peers._gloo_group = (lambda group=None: "cuda:nccl"), counted
    try:
        for step in (1, 2):
            save(root, step=step, model=Small())
        model = Small(1)
        load(root, model=model)
    finally:
        dist.get_backend_config, peers._gloo_group = config, gloo_group
    return len(made), bits(dict(model.state_dict())) == bits(dict(Small().state_dict()))


def test_a_job_on_nccl_gets_one_group_for_cpu_data(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2).run(beside_nccl, str(tmp_path)) == [(1, True)] * 2


def prune_everywhere(rank: int, world: int, root: str) -> list[int]:
    """Prune on every rank."""
    gone = prune(root, keep=1)
    dist.barrier()
    return gone


def test_only_the_first_rank_prunes(ranks: Ranks, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step=step, extra={})
    assert ranks(2).run(prune_everywhere, str(tmp_path)) == [[1, 2], []]
    assert steps(tmp_path) == [3]


def die_while_saving(rank: int, world: int, root: str) -> str:
    """Rank 1 is killed in the middle of a file."""
    model, opt, schedule = adam_job()
    train(model, opt, schedule)
    original = storage.write

    def dies(handle: int, views: list[memoryview]) -> None:
        original(handle, [view[: len(view) // 2] for view in views[-1:]])
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        storage.write = dies
    return raises(rank, world, lambda *_: save(root, step=2, model=model, opt=opt))


def test_a_rank_that_dies_is_an_error_on_the_others(tmp_path: Path) -> None:
    save(tmp_path, step=1, model=Small())
    with pytest.raises(AssertionError, match="rank 1"):
        run_ranks(die_while_saving, 2, str(tmp_path), timeout=60)
    assert latest(tmp_path).step == 1
    save(tmp_path, step=2, model=Small())
    assert latest(tmp_path).step == 2
