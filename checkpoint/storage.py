"""Files: the only place that creates, lists, reads or removes any.

Two kinds of storage with one meaning. On a POSIX file system a file is created exclusively and synced, and the manifest
appears by an atomic link. On an object store (any other fsspec filesystem) an object appears whole, by one put that
refuses to replace one. Names are never reused and nothing is renamed on an object store, and no stream is opened for
writing: closing one after an exception would publish half an object.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from .errors import CheckpointError

Chunk = bytes | memoryview


class Storage(Protocol):
    """The operations that checkpoints need. Paths are relative to the root, parts joined by `/`."""

    url: str

    def make_folder(self, folder: str) -> None:
        """Create `folder` and its parents unless they exist."""

    def sizes(self, folder: str) -> dict[str, int | None]:
        """Names in `folder` with their bytes (None for a folder); empty where there is no such folder."""

    def create(self, path: str, chunks: Iterable[Chunk]) -> None:
        """Write a new file that survives a crash once this returns. FileExistsError where there is one."""

    def publish(self, path: str, data: bytes) -> None:
        """Write a new file that appears whole or not at all. FileExistsError where there is one."""

    def read_into(self, path: str, start: int, targets: Sequence[memoryview]) -> None:
        """Fill the `targets`, one after the other, with the bytes of the file from `start` on, in one request."""

    def read_all(self, path: str) -> bytes:
        """The whole of a file."""

    def sync_folder(self, folder: str) -> None:
        """Make the names in `folder` survive a crash."""

    def remove(self, path: str) -> None:
        """Remove a file; no error where there is none."""

    def remove_folder(self, folder: str) -> None:
        """Remove a folder if it is there and empty."""


def open_storage(url: str | os.PathLike[str]) -> Storage:
    """The storage at `url`: a path or any fsspec URL."""
    text = os.fspath(url)
    if not text:
        raise CheckpointError("the URL of the checkpoints is empty")
    try:
        fs, path = fsspec.core.url_to_fs(text)
    except (ValueError, ImportError) as error:
        raise CheckpointError(f"cannot open {text!r}: {error}") from error
    if isinstance(fs, LocalFileSystem):
        return LocalStorage(path)
    return RemoteStorage(fs, path)


class LocalStorage:
    """A folder of a POSIX file system."""

    def __init__(self, root: str) -> None:
        self.root = Path(root).absolute()
        self.url = str(self.root)

    def make_folder(self, folder: str) -> None:
        """Create `folder` and its parents unless they exist; a new folder's entry is synced."""
        path = self.root / folder
        new = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        if new:
            _sync(path.parent)

    def sizes(self, folder: str) -> dict[str, int | None]:
        """See Storage."""
        try:
            with os.scandir(self.root / folder) as entries:
                found = list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        sizes: dict[str, int | None] = {}
        for entry in found:
            with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                sizes[entry.name] = None if entry.is_dir() else entry.stat().st_size
        return sizes

    def create(self, path: str, chunks: Iterable[Chunk]) -> None:
        """See Storage. A file that could not be written whole is removed again."""
        place = self.root / path
        handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            try:
                for chunk in chunks:
                    _write(handle, chunk)
                os.fsync(handle)
            finally:
                os.close(handle)
        except BaseException:
            place.unlink(missing_ok=True)
            raise

    def publish(self, path: str, data: bytes) -> None:
        """See Storage: a synced temporary file gets its name by a hard link, or a rename where there are no links."""
        place = self.root / path
        temporary = place.with_name(f".{place.name}.{os.urandom(4).hex()}")
        self.create(str(temporary.relative_to(self.root)), [data])
        try:
            try:
                os.link(temporary, place)
            except FileExistsError:
                raise
            except OSError:
                if place.exists():
                    raise FileExistsError(f"{place} exists") from None
                os.replace(temporary, place)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(place.parent)

    def read_into(self, path: str, start: int, targets: Sequence[memoryview]) -> None:
        """See Storage; straight into the targets, without a copy."""
        with open(self.root / path, "rb", buffering=0) as file:
            file.seek(start)
            for target in targets:
                while target:
                    got = file.readinto(target)
                    if not got:
                        raise CheckpointError(f"{path} ends at byte {file.tell()}, expected {len(target)} more")
                    target = target[got:]

    def read_all(self, path: str) -> bytes:
        """See Storage."""
        return (self.root / path).read_bytes()

    def sync_folder(self, folder: str) -> None:
        """See Storage."""
        _sync(self.root / folder)

    def remove(self, path: str) -> None:
        """See Storage."""
        (self.root / path).unlink(missing_ok=True)

    def remove_folder(self, folder: str) -> None:
        """See Storage."""
        try:
            (self.root / folder).rmdir()
        except FileNotFoundError:
            return
        except OSError:
            if not self.sizes(folder):
                raise


def _write(handle: int, chunk: Chunk) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(handle, view) :]


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RemoteStorage:
    """A prefix of any fsspec filesystem that is not the local one."""

    def __init__(self, fs: Any, root: str) -> None:
        self.fs = fs
        self.root = root.rstrip("/")
        self.url = str(fs.unstrip_protocol(self.root))

    def _path(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def make_folder(self, folder: str) -> None:
        """See Storage; an object store without folders takes it as nothing to do."""
        self.fs.makedirs(self._path(folder), exist_ok=True)

    def sizes(self, folder: str) -> dict[str, int | None]:
        """See Storage."""
        path = self._path(folder)
        self.fs.invalidate_cache(path)
        try:
            entries = self.fs.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        found: dict[str, int | None] = {}
        for entry in entries:
            name = entry["name"].rstrip("/").rsplit("/", 1)[-1]
            found[name] = None if entry["type"] == "directory" else entry["size"]
        return found

    def create(self, path: str, chunks: Iterable[Chunk]) -> None:
        """See Storage; the whole object is in memory once."""
        self.publish(path, b"".join(chunks))

    def publish(self, path: str, data: bytes) -> None:
        """See Storage; where a filesystem knows no exclusive put, it is a look and a put."""
        place = self._path(path)
        try:
            self.fs.pipe_file(place, data, mode="create")
        except (TypeError, NotImplementedError):
            if self.fs.exists(place):
                raise FileExistsError(f"{place} exists") from None
            self.fs.pipe_file(place, data)

    def read_into(self, path: str, start: int, targets: Sequence[memoryview]) -> None:
        """See Storage."""
        size = sum(len(target) for target in targets)
        data = memoryview(self.fs.cat_file(self._path(path), start=start, end=start + size))
        if len(data) != size:
            raise CheckpointError(f"{path} gave {len(data)} of the {size} bytes at {start}")
        at = 0
        for target in targets:
            target[:] = data[at : at + len(target)]
            at += len(target)

    def read_all(self, path: str) -> bytes:
        """See Storage."""
        return bytes(self.fs.cat_file(self._path(path)))

    def sync_folder(self, folder: str) -> None:
        """See Storage; objects are durable when put."""

    def remove(self, path: str) -> None:
        """See Storage."""
        try:
            self.fs.rm_file(self._path(path))
        except FileNotFoundError:
            return

    def remove_folder(self, folder: str) -> None:
        """See Storage; most object stores have no folders to remove."""
        if self.sizes(folder):
            return
        try:
            self.fs.rmdir(self._path(folder))
        except (OSError, NotImplementedError):
            return
