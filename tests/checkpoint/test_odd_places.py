"""Very large and very many tensors, storages that allow little, and files whose ends are zeros."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from torch import nn

from fastopt import Box
from fastopt.checkpoint import CheckpointError, latest, load, save, verify
from fastopt.checkpoint import open as open_checkpoint
from fastopt.checkpoint.errors import StorageError
from fastopt.checkpoint.format.manifest import from_bytes, place, to_bytes
from fastopt.checkpoint.format.records import DataFile, Manifest, ModelPart, StoredTensor
from fastopt.checkpoint.format.shards import Shards
from fastopt.checkpoint.io.remote import RemoteStorage
from fastopt.checkpoint.io.storage import LocalStorage, open_storage
from fastopt.checkpoint.loading.reading import Reader, Wanted

from .jobs import Small, bits, data_files

BLOCK = 16 << 20
ZEROS = xxhash.xxh3_64_hexdigest(bytes(BLOCK))


def test_a_tensor_of_more_than_two_to_the_32_elements(tmp_path: Path) -> None:
    """Two sparse files of 4 GiB: a part of the tensor is read from far behind, without the rest."""
    shape, half = (1 << 17, 1 << 16), 1 << 32
    save_id, folder = "0000abcd", tmp_path / "step-00000001"
    folder.mkdir()
    files = []
    for rank in (0, 1):
        name = f"model-{save_id}-r{rank:05d}-000.safetensors"
        last = np.arange(BLOCK, dtype=np.uint32).astype(np.uint8) if rank else np.zeros(BLOCK, np.uint8)
        with (folder / name).open("wb") as file:
            file.truncate(4096 + half)
            if rank:
                file.seek(4096 + half - BLOCK)
                file.write(last.tobytes())
        blocks = ZEROS * (half // BLOCK - 1) + xxhash.xxh3_64_hexdigest(last)
        files.append(DataFile(name, 4096 + half, 4096, xxhash.xxh3_64_hexdigest(bytes(4096)), 1, blocks))
    shards = Shards.intervals(shape, [0, 1], [0, half], [half, half])
    tensors = place(tuple(files), {"model/big": StoredTensor("U8", shape, shards)})
    model = ModelPart(("big",))
    made = Manifest(1, save_id, "", 2, {}, BLOCK, tuple(files), tensors, model, None, None, None, (), (), None)
    manifest = from_bytes(to_bytes(made))
    assert math.prod(manifest.tensors["model/big"].shape) == 1 << 33
    across = Wanted("model/big", [Box(((1 << 16) - 1, 0), (2, 1 << 16)), Box(((1 << 17) - 2, 5), (2, 300))])
    reader = Reader(LocalStorage(str(tmp_path)), manifest, [across])
    assert [(read.file, read.start - 4096) for read in reader.reads] == [(0, half - BLOCK), (1, 0), (1, half - BLOCK)]
    reader.read()
    assert not across.buffers[0].any()
    row = torch.arange(5, 305).to(torch.uint8)
    assert torch.equal(across.buffers[1], torch.stack([row, row])), "2**16 elements are a multiple of 256"


def test_ten_thousand_tensors(tmp_path: Path) -> None:
    flat = torch.arange(10_000, dtype=torch.float32)
    save({f"layer.{n}": flat[n : n + 1] for n in range(len(flat))}, tmp_path)
    found: Any = open_checkpoint(tmp_path)
    assert len(found) == 10_000
    for n in (0, 17, 9_999):
        assert found[f"layer.{n}"].item() == n


@pytest.mark.parametrize("how", ["tail", "all", "swapped halves"])
def test_a_file_of_the_right_size_with_other_bytes(how: str, tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step=step, model=nn.Linear(50, 50))
    (file,) = (f for f in data_files(tmp_path / "step-00000002") if f.name.startswith("model"))
    data = file.read_bytes()
    middle = len(data) // 2 // 4 * 4
    spoilt = {
        "tail": data[:-4096] + bytes(4096),
        "all": bytes(len(data)),
        "swapped halves": data[:4096] + data[middle:] + data[4096:middle],
    }
    file.write_bytes(spoilt[how])
    assert latest(tmp_path).step == 2, "sizes alone do not tell"  # type: ignore[union-attr]
    model = nn.Linear(50, 50)
    before = bits(dict(model.state_dict()))
    with pytest.raises(CheckpointError, match="is damaged"):
        load(tmp_path, model=model, step=2)
    assert bits(dict(model.state_dict())) == before
    assert load(tmp_path, model=model).step == 1
    assert not verify(tmp_path, step=2).sound


def test_a_storage_that_may_only_be_read_is_loaded_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path, step=step, model=Small(step))
    file = max(data_files(tmp_path / "step-00000002"), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    opened = os.open

    def only_read(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", only_read)
    before = sorted(tmp_path.rglob("*"))
    model = Small(3)
    assert load(tmp_path, model=model).step == 1
    assert bits(dict(model.state_dict())) == bits(dict(Small(1).state_dict()))
    assert not verify(tmp_path, step=2).sound
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises((CheckpointError, PermissionError), match="Permission denied"):
        save(tmp_path, step=3, model=model)


def test_a_storage_that_may_not_be_listed_is_no_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "memory://no-list/run"
    save(url, step=1, model=Small())
    storage = open_storage(url)
    assert isinstance(storage, RemoteStorage)

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Access Denied")

    monkeypatch.setattr(type(storage.fs), "ls", refuse)
    for call in (lambda: load(url, model=Small()), lambda: latest(url), lambda: save(url, step=2, model=Small())):
        with pytest.raises(StorageError, match="Access Denied"):
            call()
