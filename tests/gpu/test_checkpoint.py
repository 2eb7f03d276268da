"""Checkpoints of tensors on GPUs: the bits, the order of copies among what the caller has queued, and the memory."""

from __future__ import annotations

import gc
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastopt import Box
from fastopt.bench.checkpoint.live import pinned_bytes
from fastopt.checkpoint import Checkpointer, CheckpointError, load, save
from fastopt.checkpoint.format.datafile import Item
from fastopt.checkpoint.format.dtypes import DTYPES
from fastopt.checkpoint.io import hostmemory
from fastopt.checkpoint.io.gpu_copies import PIECE, Devices
from fastopt.checkpoint.io.hostmemory import host_memory
from fastopt.checkpoint.loading.reading import Wanted
from fastopt.checkpoint.saving.staging import Staging

from ..checkpoint.jobs import bits, data_files, element_values, states_by_name
from ..checkpoint.test_devices import COLUMNS, ROWS, WHOLE, reader
from ..checkpoint.test_every_optimizer import KINDS, Odd, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

LONG = 400_000_000  # cycles of a GPU: some tenths of a second
THREADS = 13  # at most, that read at the same time
WAYS: dict[str, dict[str, Any]] = {
    "before": {"staging": 0},
    "during": {"check": "during"},
    "copies": {"staging": 2**40},
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A folder with a checkpoint of step 0, and the 13 MB in it under `model/a`."""
    place = tmp_path_factory.mktemp("stored")
    values = element_values("a", (ROWS, COLUMNS))
    save({"a": values}, place)
    return place, values


@pytest.fixture
def side() -> Iterator[torch.cuda.Stream]:
    """A stream that is current, and not the default one."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.synchronize()


def anything(dtype: torch.dtype, *shape: int) -> Tensor:
    """Random bytes as numbers."""
    generator = torch.Generator().manual_seed(1)
    high = 2 if dtype is torch.bool else 256
    raw = torch.randint(0, high, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_and_layout(name: str, tmp_path: Path) -> None:
    """Saved from the GPU, whole and by strides, and loaded into all kinds of memory there."""
    dtype = DTYPES[name]
    values, number = anything(dtype, 1111, 1700), anything(dtype)
    on_gpu = values.cuda()
    save({"a": on_gpu, "turned": on_gpu.t(), "number": number.cuda(), "none": on_gpu[:0]}, tmp_path)
    part, columns = Box((100, 0), (701, 1700)), Box((0, 7), (1111, 900))
    whole = Box.whole((1111, 1700))

    def empty(*shape: int) -> Tensor:
        return torch.zeros(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device="cuda").view(dtype).view(shape)

    wanted = [
        Wanted("model/a", [part, columns], [empty(701, 1700), empty(1111, 900)]),
        Wanted("model/turned", [Box.whole((1700, 1111))], [empty(1700, 1111)]),
        Wanted("model/number", [Box((), ())], [empty()]),
        Wanted("model/none", [Box((0, 0), (0, 1700))], [empty(0, 1700)]),
    ]
    reader(tmp_path, wanted).read()
    expected = [values[part.slices], values[columns.slices], values.t(), number, values[:0]]
    assert bits([b for want in wanted for b in want.buffers]) == bits(expected)
    for buffer in (empty(1111, 1700), empty(1700, 1111).t(), empty(1111, 3400)[:, ::2], empty(1112, 1700)[1:]):
        reader(tmp_path, [Wanted("model/a", [whole], [buffer])]).read()
        assert bits(buffer) == bits(values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_rounded_as_on_the_cpu(dtype: torch.dtype, stored: tuple[Path, Tensor]) -> None:
    place, values = stored
    buffer = torch.empty(values.shape, dtype=dtype, device="cuda")
    reader(place, [Wanted("model/a", [WHOLE], [buffer])]).read()
    assert bits(buffer) == bits(values.to(dtype))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer(kind: str, way: str, tmp_path: Path) -> None:
    def job(seed: int) -> tuple[Odd, Any]:
        model = Odd(seed).cuda()
        params = list(model.parameters())
        opt = KINDS[kind]([params[:3], params[3:]], lr=[0.01, 0.02])
        train(model, opt, range(seed, seed + 3))
        return model, opt

    model, opt = job(1)
    save(tmp_path, step=1, model=model, opt=opt)
    other, live = job(5)
    where = [p.data_ptr() for p in other.parameters()]
    load(tmp_path, model=other, opt=live, **WAYS[way])
    assert bits(dict(other.state_dict())) == bits(dict(model.state_dict()))
    assert states_by_name(other, live) == states_by_name(model, opt)
    assert [p.data_ptr() for p in other.parameters()] == where
    train(model, opt, range(9, 11))
    train(other, live, range(9, 11))
    assert bits(dict(other.state_dict())) == bits(dict(model.state_dict()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_come_after_what_the_caller_has_queued(
    dtype: torch.dtype, side: torch.cuda.Stream, stored: tuple[Path, Tensor]
) -> None:
    place, values = stored
    live = torch.empty(values.shape, dtype=dtype, device="cuda")
    for _ in range(2):  # the second finds pinned memory
        torch.cuda._sleep(LONG)  # type: ignore[no-untyped-call]
        live.fill_(3)
        before = live.clone()
        assert not side.query(), "the stream was not busy, this shows nothing"
        reader(place, [Wanted("model/a", [WHOLE], [live])]).read()
        assert side.query(), "something is still on its way"
        after = live.clone()
        side.synchronize()
        assert (before == 3).all()
        assert bits(after) == bits(values.to(dtype))


@pytest.mark.parametrize("way", WAYS)
def test_a_load_beside_a_busy_stream(way: str, side: torch.cuda.Stream, tmp_path: Path) -> None:
    model, other = (nn.Linear(1500, 1100).cuda() for _ in range(2))
    save(tmp_path, step=1, model=model)
    torch.cuda._sleep(LONG)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        other.weight.fill_(3)
    load(tmp_path, model=other, rng=False, **WAYS[way])
    assert bits(dict(other.state_dict())) == bits(dict(model.state_dict()))


def test_no_copy_is_on_its_way_after_an_error(side: torch.cuda.Stream, tmp_path: Path) -> None:
    values = element_values("b", (4 * ROWS, COLUMNS))
    save({"a": values}, tmp_path)
    (file,) = data_files(tmp_path / "step-00000000")
    data = bytearray(file.read_bytes())
    data[2 * len(data) // 3] ^= 4
    file.write_bytes(data)
    live = torch.zeros(values.shape, device="cuda")
    torch.cuda._sleep(LONG)  # type: ignore[no-untyped-call]
    with pytest.raises(CheckpointError, match="is damaged: bytes"):
        reader(tmp_path, [Wanted("model/a", [Box.whole(values.shape)], [live])]).read()
    assert side.query(), "something is still on its way"
    assert live.any(), "the error came before anything was copied, this shows nothing"
    live.fill_(9)
    torch.cuda.synchronize()
    assert (live == 9).all()


def test_a_save_has_what_the_caller_has_queued(side: torch.cuda.Stream, tmp_path: Path) -> None:
    live = torch.zeros(ROWS, COLUMNS, device="cuda")
    model = nn.ParameterDict({"a": live})
    save(tmp_path, step=1, model=model)
    with Checkpointer(tmp_path) as checkpoints:
        for step, value in ((2, 7), (3, 8)):
            torch.cuda._sleep(LONG)  # type: ignore[no-untyped-call]
            with torch.no_grad():
                live.fill_(value)
            if step == 2:
                save(tmp_path, step=step, model=model)
            else:
                checkpoints.save(step, model=model)
            live.data.fill_(-1)
    for step, value in ((2, 7), (3, 8)):
        load(tmp_path, model=model, step=step)
        assert (live == value).all()


def test_views_that_conjugate(tmp_path: Path) -> None:
    """Copied aside and straight: nothing is conjugated on the CPU before it has arrived."""
    values = torch.randn(ROWS, COLUMNS, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    view = values.cuda().conj()
    save({"a": view}, tmp_path, step=0)
    item = Item("a", "C64", tuple(view.shape), WHOLE, view)
    for _ in range(2):  # the first staging pins, which may take as long as the copy
        staged = Staging().copy([item])[0].data
    buffer = torch.zeros_like(values).cuda()
    reader(tmp_path, [Wanted("model/a", [WHOLE], [buffer])]).read()
    expected = torch.complex(values.real, -values.imag)
    assert bits(buffer) == bits(expected) == bits(staged)


def test_pinned_memory_of_our_own() -> None:
    """Pinned as much as asked for, none of PyTorch's; a fork in between changes nothing."""
    size = (33 << 20) + 4096
    before = pinned_bytes()
    memory = host_memory(size, pin=True)
    address = memory.data_ptr()
    assert (memory.is_pinned(), memory[-1:].is_pinned()) == (True, True)
    assert pinned_bytes() == before
    values = anything(torch.uint8, size)
    memory.fill_(5)
    process = os.fork()
    if not process:
        os._exit(int(memory[::4096][:100].any()))  # no share in it: zeros; a few, as OpenMP's threads were not forked
    memory.fill_(1)
    memory.copy_(values.cuda(), non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(memory, values)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    del memory
    gc.collect()
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    assert int(runtime.cudaHostUnregister(address)) != 0, "it was still pinned"
    hostmemory._forget_error()
    assert torch.ones(5, device="cuda").sum() == 5


def test_memory_that_cannot_be_pinned() -> None:
    """A warning, and the next kernel hears nothing of it."""
    memory = hostmemory._Memory(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    found = torch.frombuffer(memory, dtype=torch.uint8)
    memory.pin(found)
    with pytest.warns(UserWarning, match="1048576 bytes for copies cannot be pinned, they are slower: .*already"):
        memory.pin(found)  # CUDA refuses that
    assert torch.ones(5, device="cuda").sum() == 5


@pytest.mark.parametrize("way", ["default", *WAYS])
def test_another_storage(way: str) -> None:
    """By default in copies on the GPU, which has room."""
    model, other = (nn.Linear(1500, 1100).cuda() for _ in range(2))
    save(f"memory://gpu-{way}", step=1, model=model)
    load(f"memory://gpu-{way}", model=other, **WAYS.get(way, {}))
    assert bits(dict(other.state_dict())) == bits(dict(model.state_dict()))


@pytest.mark.parametrize("way", WAYS)
def test_gpus_as_the_default_device(way: str, tmp_path: Path) -> None:
    torch.set_default_device("cuda")
    try:
        model, other = (nn.Linear(1500, 1100) for _ in range(2))
        opts = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, other)]
        for m, opt in zip((model, other), opts, strict=True):
            m(torch.ones(4, 1500)).square().mean().backward()
            opt.step()
        save(tmp_path, step=1, model=model, opt=opts[0])
        load(tmp_path, model=other, opt=opts[1], **WAYS[way])
        assert states_by_name(other, opts[1]) == states_by_name(model, opts[0])
        assert bits(dict(other.state_dict())) == bits(dict(model.state_dict()))
    finally:
        torch.set_default_device(None)


@two_gpus
def test_two_gpus_in_one_process(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.ModuleList(nn.Linear(1500, 1100, device=f"cuda:{n}") for n in (0, 1))

    model, other = make(), make()
    save(tmp_path, step=1, model=model)
    streams = [torch.cuda.Stream(n) for n in (0, 1)]  # type: ignore[no-untyped-call]
    for n in (0, 1):
        other[n].weight.data.fill_(2)  # type: ignore[index, operator, union-attr]  # the first kernel waits to be loaded
        torch.cuda.synchronize(n)
    with torch.cuda.stream(streams[1]), torch.cuda.stream(streams[0]):
        for n, stream in enumerate(streams):
            with torch.cuda.device(n), torch.no_grad():
                torch.cuda._sleep(LONG)  # type: ignore[no-untyped-call]
                other[n].weight.fill_(3)  # type: ignore[index, operator, union-attr]
            assert not stream.query()
        load(tmp_path, model=other, check="during", rng=False)
        assert all(stream.query() for stream in streams)
        assert bits(dict(other.state_dict())) == bits(dict(model.state_dict()))
    assert torch.cuda.current_device() == 0


def test_without_pinned_memory(stored: tuple[Path, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    place, values = stored
    monkeypatch.setattr(Devices, "memory", lambda self, size: torch.empty(size, dtype=torch.uint8))
    live = torch.zeros(values.shape, device="cuda")
    reader(place, [Wanted("model/a", [WHOLE], [live])]).read()
    assert bits(live) == bits(values)


def test_memory(tmp_path: Path) -> None:
    """268 MB come by way of a few blocks, and nothing lies beside them on the GPU."""
    model, other = (nn.Linear(8192, 8192, bias=False, device="cuda") for _ in range(2))
    save(tmp_path, step=1, model=model)
    pinned = pinned_bytes()
    for way in ("before", "during"):
        with torch.no_grad():
            other.weight.zero_()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        load(tmp_path, model=other, **WAYS[way])
        assert torch.cuda.max_memory_allocated() - allocated < 2**20
        assert torch.equal(other.weight, model.weight)
    assert pinned_bytes() - pinned <= THREADS * 2 * PIECE
