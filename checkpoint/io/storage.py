"""Files: with remote.py the only place that creates, lists, reads or removes any.

Two kinds of storage with one meaning. On a POSIX file system a file is created exclusively and synced, and the manifest
appears by an atomic link; any other fsspec filesystem is remote.py's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ..errors import CheckpointError, StorageError
from . import retries
from .pagecache import IN_CACHE, Cached, cached, fill, in_page_cache, stretches, write
from .remote import RemoteStorage

_STRETCH = 16 << 20  # bytes written at once
_OPEN_AGAIN = (errno.ESTALE, errno.EIO)  # what a network file system says of a file whose server has been away


class Storage(Protocol):
    """The operations that checkpoints need. Paths are relative to the root, parts joined by `/`."""

    url: str

    def make_folder(self, folder: str) -> None:
        """Create `folder` and its parents unless they exist."""

    def sizes(self, folder: str) -> dict[str, int | None]:
        """Names in `folder` with their bytes (None for a folder); empty where there is no such folder."""

    def modified(self, folder: str) -> dict[str, float]:
        """When the names in `folder` were written, in seconds since 1970 by the storage's clock, where it says so."""

    def create(self, path: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a new file that survives a crash once this returns. FileExistsError where there is one."""

    def publish(self, path: str, data: bytes) -> None:
        """Write a new file that appears whole or not at all. FileExistsError where there is one."""

    def read_into(
        self, path: str, start: int, targets: Sequence[memoryview], each: Callable[[memoryview], None] | None = None
    ) -> None:
        """Fill the `targets`, one after the other, with the bytes of the file from `start` on, in one request.

        `each` is called with all of these bytes where they now are, in their order and a piece at a time, while a
        processor's cache still has them. Nothing beyond a multiple of IN_CACHE bytes, counted from `start`, is stored
        before it has been called with everything up to there: targets on its two sides may be the same memory.
        """

    def in_memory(self, path: str, start: int, stop: int) -> bool:
        """Whether nearly all of these bytes of the file are in memory, so that reading them need not wait."""

    def cached(self, path: str, start: int, stop: int) -> Cached | None:
        """These bytes of the file where they can be looked at without being read, else None."""

    def read_all(self, path: str) -> bytes:
        """The whole of a file."""

    def sync_folder(self, folder: str) -> None:
        """Make the names in `folder` survive a crash."""

    def remove(self, path: str) -> None:
        """Remove a file; no error where there is none."""

    def remove_folder(self, folder: str) -> None:
        """Remove a folder if it is there and empty."""


def local_path(url: str | os.PathLike[str]) -> str | None:
    """The path that `url` means on the local file system, None where it is the URL of something else.

    Whatever lacks `://` is a path: fsspec would take one with `::` in it for a chain of filesystems.
    """
    text = os.fspath(url)
    is_path = "://" not in text or text.startswith(("file://", "local://"))
    return str(LocalFileSystem._strip_protocol(text)) if is_path and text else None


def open_storage(url: str | os.PathLike[str]) -> Storage:
    """The storage at `url`: a path or any fsspec URL."""
    text = os.fspath(url)
    if not text:
        raise CheckpointError("the URL of the checkpoints is empty")
    path = local_path(text)
    if path is not None:
        return LocalStorage(path)
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
        """Create `folder` and its parents unless they exist; the entry of each new one is synced."""
        path = self.root / folder
        new = [place for place in (path, *path.parents) if not place.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            file = next(place for place in (path, *path.parents) if place.exists() or place.is_symlink())
            raise CheckpointError(f"{path} cannot be made: {file} is there and is no folder") from error
        for place in new:
            _sync(place.parent)

    def sizes(self, folder: str) -> dict[str, int | None]:
        """See Storage."""
        place = self.root / folder
        with _in_reach(place):
            try:
                with os.scandir(place) as entries:
                    found = list(entries)
            except (FileNotFoundError, NotADirectoryError):
                return {}
            sizes: dict[str, int | None] = {}
            for entry in found:
                with _perhaps_gone():
                    sizes[entry.name] = None if entry.is_dir() else entry.stat().st_size
            return sizes

    def modified(self, folder: str) -> dict[str, float]:
        """See Storage."""
        times: dict[str, float] = {}
        for name in self.sizes(folder):
            with _in_reach(self.root / folder / name), _perhaps_gone():
                times[name] = (self.root / folder / name).stat().st_mtime
        return times

    def create(self, path: str, chunks: Iterable[bytes | memoryview]) -> None:
        """See Storage. A file that could not be written whole is removed again."""
        place = self.root / path
        handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            try:
                for stretch in stretches(chunks, _STRETCH):
                    write(handle, stretch)
                os.fsync(handle)
            finally:
                os.close(handle)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno and error.filename is None:
                error.filename = str(place)
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
                if not os.path.samefile(temporary, place):  # a network file system may repeat a link that it has made
                    raise
            except OSError:
                if place.exists():
                    raise FileExistsError(f"{place} exists") from None
                os.replace(temporary, place)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(place.parent)

    def read_into(
        self, path: str, start: int, targets: Sequence[memoryview], each: Callable[[memoryview], None] | None = None
    ) -> None:
        """See Storage; straight into the targets, without a copy."""
        place = self.root / path
        with _in_reach(place), contextlib.ExitStack() as opened:
            file = opened.enter_context(open(place, "rb", buffering=0))
            for views in stretches(targets, IN_CACHE):
                for wait in (*retries.WAITS[:2], None):
                    try:
                        file.seek(start)
                        left = fill(file.fileno(), views)
                        break
                    except OSError as error:
                        if wait is None or error.errno not in _OPEN_AGAIN:
                            raise
                        time.sleep(wait)
                        file = opened.enter_context(open(place, "rb", buffering=0))
                start += sum(map(len, views))
                if left:
                    raise CheckpointError(f"{path} ends at byte {start - left}, expected {left} more")
                if each is not None:
                    for view in views:
                        each(view)

    def in_memory(self, path: str, start: int, stop: int) -> bool:
        """See Storage: in the page cache."""
        try:
            handle = os.open(self.root / path, os.O_RDONLY)
        except OSError:  # whoever reads it will say so
            return False
        try:
            return in_page_cache(handle, start, stop)
        finally:
            os.close(handle)

    def cached(self, path: str, start: int, stop: int) -> Cached | None:
        """See Storage: those in the page cache."""
        with _in_reach(self.root / path), open(self.root / path, "rb", buffering=0) as file:
            return cached(str(self.root / path), file.fileno(), start, stop)

    def read_all(self, path: str) -> bytes:
        """See Storage."""
        with _in_reach(self.root / path):
            return (self.root / path).read_bytes()

    def sync_folder(self, folder: str) -> None:
        """See Storage."""
        _sync(self.root / folder)

    def remove(self, path: str) -> None:
        """See Storage."""
        with _in_reach(self.root / path):
            (self.root / path).unlink(missing_ok=True)

    def remove_folder(self, folder: str) -> None:
        """See Storage. Of a link to a folder elsewhere the link is removed."""
        place = self.root / folder
        with _in_reach(place):
            try:
                if not place.is_symlink():
                    place.rmdir()
                elif not self.sizes(folder):
                    place.unlink()
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) and not self.sizes(folder):
                    raise


@contextlib.contextmanager
def _in_reach(place: Path) -> Iterator[None]:
    """What the system refuses says nothing about a checkpoint, except that there is no such file, and one thing more: a
    disk that cannot read a file has damaged it. Then another checkpoint may be better."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.EIO:
            raise CheckpointError(f"{place} is damaged: the disk cannot read it") from error
        raise StorageError(f"{place}: {error.strerror or error}") from error


@contextlib.contextmanager
def _perhaps_gone() -> Iterator[None]:
    """Something in a listing that has been removed since, here or by another machine, or a link that leads nowhere."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE, errno.ELOOP):
            raise


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # SMB and some others sync no folders
            raise
    finally:
        os.close(handle)
