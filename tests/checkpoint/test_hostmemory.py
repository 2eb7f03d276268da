"""New memory: asked for in large pages, pinned by a runtime that is none here, and given back."""

from __future__ import annotations

import gc
import mmap
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastopt.checkpoint import Checkpointer, load, save
from fastopt.checkpoint.io import hostmemory
from fastopt.checkpoint.io.hostmemory import host_memory, in_large_pages

from .jobs import bits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the system calls and /proc are Linux's")
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
large_pages = pytest.mark.skipif(not PAGES.exists(), reason="this system has no large pages")
MIB = 1 << 20


class Runtime:
    """What CUDA would be told of memory. `answer`: of the next registration."""

    def __init__(self, answer: int = 0) -> None:
        self.answer = answer
        self.known: dict[int, int] = {}
        self.calls: list[str] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.calls.append("register")
        assert flags == 1, "for all GPUs"
        if not self.answer:
            self.known[address] = size
        return self.answer

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append("unregister")
        assert flags_of(address) is not None, "it is unmapped already"
        del self.known[address]
        return 0

    def cudaGetErrorString(self, answer: int) -> str:
        return f"no room, number {answer}"


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """A runtime that takes everything."""
    found = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    return found


def flags_of(address: int) -> set[str] | None:
    """How the kernel looks at the mapping that an address of this process lies in; None where there is none."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, stop = (int(part, 16) for part in first.split("-"))
            inside = start <= address < stop
        elif inside and first == "VmFlags:":
            return set(line.split()[1:])
    return None


@large_pages
@pytest.mark.parametrize("size", [2 * MIB, 5 * MIB + 3])
def test_large_pages_are_asked_for(size: int) -> None:
    new = torch.empty(size, dtype=torch.uint8)
    assert in_large_pages(new) is new
    assert "hg" in (flags_of(new.data_ptr()) or ())
    assert "hg" in (flags_of(new.data_ptr() + size - 1) or ())
    assert "hg" in (flags_of(host_memory(size, pin=False).data_ptr()) or ())


def test_what_is_small_or_elsewhere_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(hostmemory, "advise", lambda *args: asked.append(args))
    in_large_pages(torch.empty(100))
    in_large_pages(torch.empty(10 * MIB, device="meta"))
    assert asked == []
    in_large_pages(torch.empty(MIB))
    assert len(asked) == 1


@large_pages
def test_new_tensors_of_a_load_are_in_large_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies, and the states of an optimizer that has none."""
    seen: list[int] = []
    asked = hostmemory.advise

    def advise(address: int, size: int, advice: int) -> bool:
        seen.append(size)
        done = asked(address, size, advice)
        assert done
        return done

    monkeypatch.setattr(hostmemory, "advise", advise)
    models = [torch.nn.Linear(1024, 600, bias=False) for _ in range(2)]
    opts = [torch.optim.Adam(model.parameters(), lr=0.1) for model in models]
    models[0](torch.ones(1, 1024)).sum().backward()
    opts[0].step()
    opts[0].state[models[0].weight]["of another shape"] = torch.rand(600 * 1024)
    save(tmp_path, step=1, model=models[0], opt=opts[0])
    load(tmp_path, model=models[1], opt=opts[1], staging=1 << 40)
    least = 1024 * 600 * 4
    assert len([size for size in seen if least <= size <= least + 2 * mmap.PAGESIZE]) == 4
    assert bits(models[1].state_dict()) == bits(models[0].state_dict())
    assert bits(list(opts[1].state.values())) == bits(list(opts[0].state.values()))


@pytest.mark.parametrize("size", [0, 1, 3 * MIB + 5])
def test_it_is_given_back_when_nobody_has_it_any_more(size: int, runtime: Runtime) -> None:
    memory = host_memory(size, pin=False)
    assert (memory.numel(), memory.dtype, memory.device.type) == (size, torch.uint8, "cpu")
    memory.fill_(7)
    part, address = memory[size // 2 :], memory.data_ptr()
    del memory
    gc.collect()
    assert (part == 7).all()
    del part
    gc.collect()
    if size:
        assert flags_of(address) is None
    assert runtime.calls == []


def test_pinned_once_and_unpinned_before_it_is_unmapped(runtime: Runtime) -> None:
    memory = host_memory(3 * MIB + 5, pin=True)
    address = memory.data_ptr()
    assert runtime.known == {address: 3 * MIB + 5}
    assert int(memory.sum()) == 0
    part = memory[5:9]
    del memory
    gc.collect()
    assert runtime.calls == ["register"]
    del part
    gc.collect()
    assert (runtime.calls, runtime.known) == (["register", "unregister"], {})
    assert flags_of(address) is None


def test_memory_that_cannot_be_pinned_is_used_as_it_is(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[bool] = []
    monkeypatch.setattr(hostmemory, "_forget_error", lambda: forgotten.append(True))
    runtime.answer = 2
    with pytest.warns(UserWarning, match="5000 bytes for copies cannot be pinned, they are slower: no room, number 2"):
        memory = host_memory(5000, pin=True)
    assert forgotten
    assert memory.fill_(3).sum() == 15000
    del memory
    gc.collect()
    assert runtime.calls == ["register"]


def test_without_threads(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(*args: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", no_more)
    memory = host_memory(4096, pin=True)
    assert runtime.known == {memory.data_ptr(): 4096}


def test_a_forked_child_has_no_part_in_pinned_memory(runtime: Runtime) -> None:
    """It sees zeros, its memory is its own, and it does not unpin."""
    memory = host_memory(3 * MIB, pin=True).fill_(9)
    process = os.fork()
    if not process:
        try:
            zeros = not memory[::4096].any()  # few, as OpenMP's threads have not been forked
            del memory
            gc.collect()
            os._exit(0 if zeros and runtime.calls == ["register"] else 3)
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert (memory == 9).all()


def test_more_than_there_is() -> None:
    with pytest.raises(MemoryError, match=f"the system has no {1 << 60} bytes of memory for copies"):
        host_memory(1 << 60, pin=False)


def test_saves_in_the_background_pin_what_they_need_and_no_more(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, for all saves; PyTorch would pin the next power of two."""
    monkeypatch.setattr("fastopt.checkpoint.saving.staging.in_use", lambda device: device == "cuda")
    models = [torch.nn.Linear(1000, 300, bias=False) for _ in range(2)]
    opts = [torch.optim.Adam(model.parameters(), lr=0.1) for model in models]
    models[0](torch.ones(1, 1000)).sum().backward()
    opts[0].step()
    with Checkpointer(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, model=models[0], opt=opts[0])
        checkpoints.wait()
        (size,) = runtime.known.values()
        assert 3 * 4 * 300_000 <= size <= 3 * 4 * 300_000 + 65536, "parameter, averages, and random generators"
        assert runtime.calls == ["register"]
    within = time.monotonic() + 60
    while runtime.known and time.monotonic() < within:  # the thread that wrote ends a moment after the save
        time.sleep(0.01)
    assert (runtime.calls, runtime.known) == (["register", "unregister"], {})
    assert load(tmp_path, model=models[1], opt=opts[1]).step == 2
    assert bits(models[1].state_dict()) == bits(models[0].state_dict())
