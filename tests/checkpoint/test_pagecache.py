"""Files in the page cache are looked at without a copy, and with the same result as reading them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastopt import Adam
from fastopt.checkpoint import CheckpointError, load, save
from fastopt.checkpoint.io import pagecache, storage
from fastopt.checkpoint.io.pagecache import cached, in_page_cache, stretches

from ..ranks import RankPool
from .jobs import Small, bits, data_files, train

Ranks = Callable[[int], RankPool]


def test_any_range_is_seen_in_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagecache, "WINDOW", 8192)
    data = os.urandom(50_001)
    (tmp_path / "file").write_bytes(data)
    with open(tmp_path / "file", "rb") as file:
        for start, stop in ((0, 50_001), (16, 20), (4096, 40_000), (9_000, 50_001), (49_999, 50_001)):
            found = cached("file", file.fileno(), start, stop)
            if found is None:
                pytest.skip("this system or filesystem cannot say what is in the page cache")
            windows = [bytes(window.numpy()) for window in found.windows()]
            assert b"".join(windows) == data[start:stop]
            assert max(map(len, windows)) <= 8192
        assert cached("file", file.fileno(), 5, 5) is None
        assert cached("file", file.fileno(), 40_000, 50_002) is None, "it ends before"


def test_chunks_are_written_in_stretches_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagecache, "_VIEWS", 3)
    chunks = [b"abc", b"", b"defghijklmnopqrstuvwxyz", b"01", b"2", b"3", b"4"]
    found = [b"".join(views) for views in stretches(chunks, 10)]
    assert b"".join(found) == b"".join(chunks)
    assert [len(each) for each in found] == [10, 10, 9, 1, 1]


@pytest.mark.parametrize("in_place", [True, False])
def test_both_ways_of_reading_give_the_same(in_place: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small()
    opt = Adam(model.named_parameters(), lr=0.1)
    train(model, opt)
    save(tmp_path, step=1, model=model, opt=opt)
    wanted = bits([dict(opt.state[p]) for p in model.parameters()]), bits(dict(model.state_dict()))
    calls: list[bool] = []

    def look(*args: Any) -> bool:
        found = len(calls) < looked and in_page_cache(*args)
        calls.append(found)
        return found

    for module in (storage, pagecache):
        monkeypatch.setattr(module, "in_page_cache", look)
    for looked in (0, 1 << 30, 2):
        train(model, opt, steps=1)
        calls.clear()
        load(tmp_path, model=model, opt=opt, staging=0 if in_place else 1 << 30)
        assert (bits([dict(opt.state[p]) for p in model.parameters()]), bits(dict(model.state_dict()))) == wanted
        assert calls
        assert any(calls) is (looked > 0)


def grown(rank: int, world: int, root: str) -> list[float]:
    """By how much of a rank's bytes its memory grows at most while it saves, and while it loads in place."""
    torch.manual_seed(rank)
    model = nn.ParameterList([nn.Parameter(torch.randn(1 << 22)) for _ in range(16)])  # 256 MiB
    shares = []
    for work in (lambda: save(root, step=1, model=model), lambda: load(root, model=model)):
        work()  # what it imports, and its threads, are not counted
        if shares:
            work()
        else:
            Path(root, "step-00000001", "manifest.json").unlink()
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        work()
        shares.append((status("VmHWM") - before) / (256 << 20))
    return shares


def status(field: str) -> int:
    """Bytes of this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset")
def test_neither_saving_nor_loading_in_place_takes_memory(ranks: Ranks, tmp_path: Path) -> None:
    for shares in ranks(1).run(grown, str(tmp_path)):
        assert max(shares) < 0.1, shares


class Failing:
    """A mapping whose pages cannot be brought in."""

    def madvise(self, *_: int) -> None:
        """As Linux says it."""
        raise OSError(14, "Bad address")


def test_a_disk_that_cannot_read_what_was_in_the_cache_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, step=1, model=Small())
    file = max(data_files(tmp_path / "step-00000001"), key=lambda f: f.stat().st_size)

    with open(file, "rb") as opened:
        found = cached(str(file), opened.fileno(), 0, 8)
    if found is None:
        pytest.skip("this system or filesystem cannot say what is in the page cache")
    memory = found._memory
    monkeypatch.setattr(torch, "frombuffer", lambda *_, **__: torch.zeros(8, dtype=torch.uint8))
    found._memory = Failing()
    with pytest.raises(CheckpointError, match="the disk cannot read it"):
        next(found.windows())
    memory.close()
