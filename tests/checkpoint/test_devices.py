"""What is read for GPUs: copied late, from blocks that are used again; here by GPUs that are none."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastopt import Box
from fastopt.checkpoint import CheckpointError, catalog, load, save
from fastopt.checkpoint.format import datafile
from fastopt.checkpoint.format.datafile import Body, Item
from fastopt.checkpoint.format.manifest import from_bytes
from fastopt.checkpoint.io.gpu_copies import PIECE, Devices
from fastopt.checkpoint.io.storage import open_storage
from fastopt.checkpoint.loading import loading, reading
from fastopt.checkpoint.loading.reading import Reader, Wanted
from fastopt.checkpoint.saving import writing

from .jobs import data_files, element_values

ROWS, COLUMNS = 1100, 3000  # 13 MB of float32: four pieces


class Late(Devices):
    """A GPU whose memory is on the CPU. It does what it has been told when somebody waits for it, and not before."""

    made: list[Late] = []  # noqa: RUF012

    def __init__(self, tensors: Any) -> None:
        super().__init__(())
        tensors = list(tensors)
        self.real = bool(tensors)
        self.queue: deque[Callable[[], Any]] = deque()
        self.told = self.done = self.waits = 0
        self.blocks: list[int] = []
        self.lock = threading.Lock()
        self.entered = {threading.get_ident()}
        self.made.append(self)

    def __bool__(self) -> bool:
        return self.real

    def straight(self, tensor: Tensor) -> bool:
        return not self.real or tensor.dtype is torch.int16

    def enter(self) -> None:
        self.entered.add(threading.get_ident())

    def memory(self, size: int) -> Tensor:
        self.blocks.append(size)
        return super().memory(size)

    def _tell(self, work: Callable[[], Any]) -> None:
        assert threading.get_ident() in self.entered, "a thread with other streams"
        with self.lock:
            self.queue.append(work)
            self.told += 1

    def copy(self, target: Tensor, source: Tensor) -> None:
        self._tell(lambda: target.copy_(source))

    def bring(self, source: Tensor, device: torch.device) -> Tensor:
        there = torch.empty_like(source)
        self._tell(lambda: there.copy_(source))
        return there

    def mark(self, devices: Any) -> list[Any]:
        return [_Mark(self, self.told)]

    def until(self, number: int) -> None:
        with self.lock:
            while self.done < number:
                self.queue.popleft()()
                self.done += 1

    def wait(self) -> None:
        self.waits += 1
        self.until(self.told)


class _Mark:
    def __init__(self, device: Late, number: int) -> None:
        self.device, self.number = device, number

    def synchronize(self) -> None:
        self.device.until(self.number)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[Late]:
    """Those that have been made, the last one last."""
    monkeypatch.setattr(Late, "made", [])
    monkeypatch.setattr(reading, "Devices", Late)
    return Late.made


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A folder with a checkpoint of step 0, and what is in it."""
    place = tmp_path_factory.mktemp("stored")
    tensors = {name: element_values(name, (ROWS, COLUMNS)) for name in ("a", "b")}
    tensors["odd"] = torch.arange(3_000_001, dtype=torch.int64).to(torch.uint8)
    save(tensors, place)
    return place, tensors


def reader(place: Path | str, wanted: list[Wanted], workers: int | None = None) -> Reader:
    storage = open_storage(place)
    return Reader(storage, from_bytes(catalog.find(storage, 0)[1]), wanted, workers)


WHOLE = Box((0, 0), (ROWS, COLUMNS))
EVERY_SECOND = torch.empty(ROWS, 2 * COLUMNS)[:, ::2]
DESTINATIONS: dict[str, tuple[Box, Callable[[], Tensor]]] = {
    "whole": (WHOLE, lambda: torch.empty(ROWS, COLUMNS)),
    "rows": (Box((100, 0), (701, COLUMNS)), lambda: torch.empty(701, COLUMNS)),
    "columns": (Box((0, 7), (ROWS, 1500)), lambda: torch.empty(ROWS, 1500)),
    "strides": (WHOLE, lambda: torch.empty(ROWS, 2 * COLUMNS)[:, ::2]),
    "transposed": (WHOLE, lambda: torch.empty(COLUMNS, ROWS).t()),
    "another dtype": (WHOLE, lambda: torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("name", DESTINATIONS)
@pytest.mark.parametrize("workers", [1, 3])
def test_what_arrives(name: str, workers: int, late: list[Late], stored: tuple[Path, dict[str, Tensor]]) -> None:
    place, tensors = stored
    box, empty = DESTINATIONS[name]
    wanted = [Wanted(f"model/{key}", [box], [empty()]) for key in ("a", "b")]
    wanted.append(Wanted("model/odd", [Box((1,), (2_500_000,))], [torch.empty(2_500_000, dtype=torch.uint8)]))
    reader(place, wanted, workers).read()
    for want in wanted:
        box = want.boxes[0]
        assert torch.equal(want.buffers[0], tensors[want.key[6:]][box.slices].to(want.buffers[0].dtype))
    (device,) = late
    assert device.done == device.told >= 9  # four pieces, two times, and the odd one
    assert not device.queue
    if workers == 1:
        assert device.blocks == [PIECE, PIECE]
    assert max(device.blocks) <= PIECE


def test_neighbours_on_the_cpu(late: list[Late], tmp_path: Path) -> None:
    """What is read straight into place lies between what is not, in the same pieces."""
    tensors = {
        f"t{n:02}": element_values(f"{n}", (300_001 + 7919 * n,)).to(torch.int16 if n % 3 else torch.float16)
        for n in range(40)
    }
    save(tensors, tmp_path)
    wanted = [Wanted(f"model/{name}", [Box.whole(t.shape)], [torch.zeros_like(t)]) for name, t in tensors.items()]
    reader(tmp_path, wanted).read()
    for want in wanted:
        assert torch.equal(want.buffers[0], tensors[want.key[6:]])
    assert late[0].told == late[0].done
    assert 14 < late[0].told < 40, "those of two bytes a number that are not on the CPU, some in two pieces"


def test_bytes_that_go_to_two_places(late: list[Late], stored: tuple[Path, dict[str, Tensor]]) -> None:
    place, tensors = stored
    wanted = Wanted("model/a", [WHOLE, Box((5, 0), (1000, COLUMNS)), Box((0, 9), (ROWS, 10))])
    reader(place, [wanted]).read()
    assert all(
        torch.equal(got, tensors["a"][box.slices]) for got, box in zip(wanted.buffers, wanted.boxes, strict=True)
    )


def test_another_storage(late: list[Late]) -> None:
    values = element_values("far", (ROWS, COLUMNS))
    save({"a": values}, "memory://to-devices")
    wanted = Wanted("model/a", [WHOLE])
    reader("memory://to-devices", [wanted]).read()
    assert torch.equal(wanted.buffers[0], values)
    assert late[0].told == -(-values.nbytes // PIECE)


def test_no_copy_is_on_its_way_after_an_error(
    late: list[Late], tmp_path: Path, stored: tuple[Path, dict[str, Tensor]]
) -> None:
    save(stored[1], tmp_path)
    file = max(data_files(tmp_path / "step-00000000"), key=lambda each: each.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)
    wanted = [Wanted("model/a", [WHOLE]), Wanted("model/b", [WHOLE])]
    with pytest.raises(CheckpointError, match="is damaged: bytes"):
        reader(tmp_path, wanted).read()
    (device,) = late
    assert device.waits == 1
    assert 0 < device.done == device.told
    assert not device.queue


def test_chunks_that_are_saved_have_arrived(
    late: list[Late], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stored: tuple[Path, dict[str, Tensor]]
) -> None:
    """The next is on its way when one is handed out, and a chunk that is kept keeps its bytes."""
    monkeypatch.setattr(datafile, "Devices", Late)
    item = Item("model/a", "F32", (ROWS, COLUMNS), WHOLE, stored[1]["a"])
    ahead: list[int] = []
    kept = []
    for chunk in Body([item], 1 << 20).chunks():
        ahead.append(late[-1].told - late[-1].done)
        kept.append(chunk)
    assert b"".join(kept) == stored[1]["a"].numpy().tobytes()
    assert len(late[-1].blocks) == -(-item.nbytes // (4 << 20))
    assert ahead[0] == 1


def test_what_the_caller_has_queued_is_saved(late: list[Late], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The threads that write have other streams, so the caller's are waited for before these begin."""
    monkeypatch.setattr(writing, "Devices", Late)
    live = torch.zeros(4)
    monkeypatch.setattr(Late, "wait", lambda self: live.fill_(7) if self.real else None)
    save({"a": live}, tmp_path)
    wanted = Wanted("model/a", [Box((0,), (4,))])
    monkeypatch.setattr(reading, "Devices", Devices)
    reader(tmp_path, [wanted]).read()
    assert wanted.buffers[0].tolist() == [7] * 4


def test_a_small_load_takes_little_memory(late: list[Late], tmp_path: Path) -> None:
    save(tmp_path, step=0, model=nn.Linear(3, 2))
    load(tmp_path, model=nn.Linear(3, 2), rng=False, check="during")
    assert sum(sum(device.blocks) for device in late) < 4096


class Stream:
    """What has been asked of a stream, by which thread."""

    def __init__(self, number: int) -> None:
        self.number, self.asked = number, []  # type: tuple[int, list[tuple[str, str]]]

    def synchronize(self) -> None:
        self.asked.append(("wait", threading.current_thread().name))


class OnGpu(Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    is_cuda = True
    number = 0

    @property
    def device(self) -> torch.device:
        """The GPU that it is not on."""
        return torch.device("cuda", self.number)


def on_gpu(number: int) -> Any:
    found: Any = torch.zeros(4).as_subclass(OnGpu)
    found.number = number
    return found


def test_the_callers_streams_are_those_of_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {torch.device("cuda", number): Stream(number) for number in range(3)}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[device])
    entered: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_stream", entered.append)
    devices = Devices([on_gpu(2), torch.zeros(4), on_gpu(0), on_gpu(2)])
    devices.enter()
    devices.wait()
    assert {stream.number for stream in entered} == {0, 2}
    assert [len(streams[torch.device("cuda", number)].asked) for number in range(3)] == [1, 0, 1]


def test_memory_that_cannot_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    plain = torch.empty

    def empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        asked.append(pin_memory)
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    devices = Devices([on_gpu(0)])
    with pytest.warns(UserWarning, match="copied without pinned memory, more slowly: CUDA error: out of memory"):
        assert devices.memory(100).numel() == 100
    assert devices.memory(7).numel() == 7
    assert asked == [True, False, False]


def test_inference_tensors_are_filled_by_all_threads(tmp_path: Path) -> None:
    values = element_values("frozen", (3000, 4000))
    save({"a": values}, tmp_path)
    with torch.inference_mode():
        wanted = Wanted("model/a", [Box((0, 0), (3000, 4000))], [torch.empty(4000, 3000).t()])
        reader(tmp_path, [wanted], 3).read()
        assert torch.equal(wanted.buffers[0], values)


def test_copies_are_on_the_device_of_what_they_are_copies_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """And are made where that device has four times as much room, whatever the CPU has."""
    model = nn.Linear(300, 400)
    save("memory://beside", step=1, model=model)
    read: list[str] = []
    verify = Reader.verify
    monkeypatch.setattr(
        Reader, "verify", lambda self, *args: (read.extend(w.key for w in self.wanted), verify(self, *args))
    )
    asked: list[tuple[torch.device, int]] = []
    for room, names in ((4, []), (3.99, ["model/bias", "model/weight"])):
        read.clear()
        monkeypatch.setattr(
            loading, "free_memory", lambda *args, room=room: (asked.append(args), int(room * 301 * 400 * 4))[1]
        )
        other = nn.Linear(300, 400)
        load("memory://beside", model=other)
        assert torch.equal(other.weight, model.weight)
        assert sorted(read) == names
    assert set(asked) == {(torch.device("cpu"), 1)}
