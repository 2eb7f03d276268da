"""The operations of a storage, the same on every kind."""

from __future__ import annotations

import errno
import os
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from fastopt.checkpoint import CheckpointError
from fastopt.checkpoint.io.remote import RemoteStorage
from fastopt.checkpoint.io.storage import LocalStorage, Storage, open_storage


@pytest.fixture(params=["path", "file", "memory", "dir"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """An empty root of each kind."""
    if request.param == "dir":  # a filesystem of fsspec that is not the local class, on a real disk
        yield RemoteStorage(fsspec.filesystem("dir", path=str(tmp_path), fs=fsspec.filesystem("file")), "root")
        return
    urls = {
        "path": str(tmp_path / "a/root"),
        "file": f"file://{tmp_path}/a/root",
        "memory": f"memory://{uuid.uuid4()}/r",
    }
    yield open_storage(urls[request.param])


def test_files_are_made_listed_read_and_removed(storage: Storage) -> None:
    assert storage.sizes("") == {}
    assert storage.sizes("step") == {}
    storage.make_folder("step")
    storage.make_folder("step")
    storage.create("step/a", [b"0123", memoryview(b"456789"), b""])
    storage.publish("step/b", b"x" * 10)
    storage.sync_folder("step")
    assert storage.sizes("step") == {"a": 10, "b": 10}
    assert storage.sizes("") == {"step": None}
    assert storage.read_all("step/a") == b"0123456789"
    first, second, none = bytearray(3), bytearray(4), bytearray(0)
    storage.read_into("step/a", 2, [memoryview(first), memoryview(none), memoryview(second)])
    assert (first, second) == (b"234", b"5678")
    storage.remove_folder("step")
    assert set(storage.sizes("step")) == {"a", "b"}
    storage.remove("step/a")
    storage.remove("step/a")
    storage.remove("step/b")
    storage.remove_folder("step")
    storage.remove_folder("step")
    assert storage.sizes("step") == {}


def test_nothing_is_overwritten(storage: Storage) -> None:
    storage.make_folder("s")
    storage.create("s/a", [b"1"])
    with pytest.raises(FileExistsError):
        storage.create("s/a", [b"2"])
    storage.publish("s/m", b"1")
    with pytest.raises(FileExistsError):
        storage.publish("s/m", b"2")
    assert storage.read_all("s/a") == storage.read_all("s/m") == b"1"
    assert set(storage.sizes("s")) == {"a", "m"}


def test_an_error_while_writing_leaves_no_file(storage: Storage) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise OSError("disk full")

    storage.make_folder("s")
    with pytest.raises(OSError, match="disk full"):
        storage.create("s/a", chunks())
    assert storage.sizes("s") == {}


def test_files_know_when_they_were_written(storage: Storage) -> None:
    storage.make_folder("s")
    storage.create("s/a", [b"1"])
    assert set(storage.modified("s")) == {"a"}
    assert abs(storage.modified("s")["a"] - time.time()) < 60
    assert storage.modified("none") == {}


def test_reading_past_the_end_is_an_error(storage: Storage) -> None:
    storage.make_folder("s")
    storage.create("s/a", [b"0123"])
    with pytest.raises(CheckpointError, match="s/a"):
        storage.read_into("s/a", 2, [memoryview(bytearray(5))])


def test_many_buffers_are_filled_by_one_request(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    data = os.urandom(5000)
    storage.create("a", [data])
    parts = [bytearray(3) for _ in range(1500)]
    storage.read_into("a", 7, [memoryview(part) for part in parts])
    assert b"".join(parts) == data[7:4507]


def test_the_umask_is_respected(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        storage = LocalStorage(str(tmp_path))
        storage.create("a", [b""])
        storage.publish("m", b"")
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "am"} == {0o640}


def test_a_filesystem_without_links_publishes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    storage = LocalStorage(str(tmp_path))
    storage.publish("m", b"1")
    with pytest.raises(FileExistsError):
        storage.publish("m", b"2")
    assert storage.read_all("m") == b"1"
    assert storage.sizes("") == {"m": 1}


class Plain(fsspec.get_filesystem_class("memory")):  # type: ignore[misc]
    """A filesystem that has not heard of exclusive puts."""

    def pipe_file(self, path: str, value: bytes) -> None:
        """Put."""
        super().pipe_file(path, value)


class Swallowing(Plain):
    """One that takes any keyword and does nothing about it."""

    def pipe_file(self, path: str, value: bytes, **kwargs: object) -> None:
        """Put."""
        super().pipe_file(path, value)


class Refusing(Plain):
    """A server of a known protocol that does not implement this part of it."""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite") -> None:
        """Put."""
        if mode == "create":
            raise OSError(errno.ENOSYS, "A header you provided implies functionality that is not implemented")
        super().pipe_file(path, value)


@pytest.mark.parametrize("kind", [Plain, Swallowing, Refusing])
def test_a_filesystem_without_exclusive_put_publishes_too(kind: type[Plain]) -> None:
    storage = RemoteStorage(kind(), f"/{uuid.uuid4()}")
    storage.publish("m", b"1")
    with pytest.raises(FileExistsError):
        storage.publish("m", b"2")
    assert storage.read_all("m") == b"1"


def test_the_entry_of_every_new_folder_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("fastopt.checkpoint.io.storage._sync", synced.append)
    LocalStorage(str(tmp_path / "a/b")).make_folder("step")
    assert set(synced) == {tmp_path, tmp_path / "a", tmp_path / "a/b"}
    synced.clear()
    LocalStorage(str(tmp_path / "a/b")).make_folder("step")
    assert synced == []


def test_what_the_disk_cannot_read_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", unreadable)
    with pytest.raises(CheckpointError, match="a is damaged: the disk cannot read it"):
        LocalStorage(str(tmp_path)).read_all("a")


def test_bad_urls_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="empty"):
        open_storage("")
    with pytest.raises(CheckpointError, match="nosuch://x"):
        open_storage("nosuch://x")
    assert open_storage(tmp_path).url == str(tmp_path)
    assert open_storage("memory://x/y").url == "memory:///x/y"
