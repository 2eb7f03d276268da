"""Files: the only place that creates, lists, reads or removes any.

Two kinds of storage with one meaning. On a POSIX file system a file is created exclusively and synced, and the manifest
appears by an atomic link. On an object store (any other fsspec filesystem) an object appears whole, by one put that
refuses to replace one. Names are never reused and nothing is renamed on an object store, and no stream is opened for
writing: closing one after an exception would publish half an object.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import inspect
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from .errors import CheckpointError, StorageError
from .pagecache import Cached, cached, fill, in_page_cache, stretches, write
from .retries import retry

T = TypeVar("T")

_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss"})
_COMPARED = 16 << 20  # bytes read at once when an object is compared
_STRETCH = 16 << 20  # bytes written at once
IN_CACHE = 1 << 20  # bytes read at once: a processor's second-level cache still has them when they are looked at


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

    def modified(self, folder: str) -> dict[str, float]:
        """See Storage."""
        times: dict[str, float] = {}
        for name in self.sizes(folder):
            with contextlib.suppress(FileNotFoundError):
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
        with _damage(self.root / path), open(self.root / path, "rb", buffering=0) as file:
            file.seek(start)
            for views in stretches(targets, IN_CACHE):
                left = fill(file.fileno(), views)
                if left:
                    raise CheckpointError(f"{path} ends at byte {file.tell()}, expected {left} more")
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
        with open(self.root / path, "rb", buffering=0) as file:
            return cached(str(self.root / path), file.fileno(), start, stop)

    def read_all(self, path: str) -> bytes:
        """See Storage."""
        with _damage(self.root / path):
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


@contextlib.contextmanager
def _damage(place: Path) -> Iterator[None]:
    """A disk that cannot read a file has damaged it: then another checkpoint may be better."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise CheckpointError(f"{place} is damaged: the disk cannot read it") from error


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # SMB and some others sync no folders
            raise
    finally:
        os.close(handle)


class RemoteStorage:
    """A prefix of any fsspec filesystem that is not the local one. What may pass by itself is tried again."""

    def __init__(self, fs: Any, root: str) -> None:
        self.fs = fs
        self.root = root.rstrip("/")
        self.url = str(fs.unstrip_protocol(self.root))
        protocols = (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
        self._folders = not _OBJECT_STORES.intersection(protocols)

    def _path(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def _try(self, path: str, call: Callable[[], T]) -> T:
        return retry(f"{self.url}/{path}" if path else self.url, call)

    def make_folder(self, folder: str) -> None:
        """See Storage; nothing on an object store, where it could only make a bucket that nobody asked for."""
        if self._folders:
            self._try(folder, lambda: self.fs.makedirs(self._path(folder), exist_ok=True))

    def sizes(self, folder: str) -> dict[str, int | None]:
        """See Storage."""
        return {name: None if e["type"] == "directory" else int(e["size"]) for name, e in self._list(folder).items()}

    def modified(self, folder: str) -> dict[str, float]:
        """See Storage."""
        times = {name: _time(entry) for name, entry in self._list(folder).items()}
        return {name: time for name, time in times.items() if time is not None}

    def _list(self, folder: str) -> dict[str, dict[str, Any]]:
        path = self._path(folder)

        def entries() -> list[dict[str, Any]]:
            self.fs.invalidate_cache(path)
            return list(self.fs.ls(path, detail=True))

        try:
            found = self._try(folder, entries)
        except FileNotFoundError:
            return {}
        named = ((entry["name"].rstrip("/"), entry) for entry in found)
        return {name.rsplit("/", 1)[-1]: entry for name, entry in named if name != path.strip("/")}

    def create(self, path: str, chunks: Iterable[bytes | memoryview]) -> None:
        """See Storage; the whole object is in memory once, and of the chunks one at a time."""
        data = io.BytesIO()
        for chunk in chunks:
            data.write(chunk)
        self.publish(path, data.getvalue())

    def publish(self, path: str, data: bytes) -> None:
        """See Storage; where a filesystem knows no exclusive put, it is a look and a put.

        An object that is there already and holds exactly `data` is this very one: a put whose answer was lost has been
        tried again. (What two saves write is never the same, their id is in it.)
        """
        place = self._path(path)
        try:
            self._try(path, lambda: self._put_new(place, data))
        except FileExistsError:
            if not self._try(path, lambda: self._holds(place, data)):
                raise
        except FileNotFoundError as error:
            raise StorageError(f"{self.url}: there is no such bucket or folder ({error})") from error

    def _put_new(self, place: str, data: bytes) -> None:
        if _knows_exclusive_put(self.fs):
            try:
                self.fs.pipe_file(place, data, mode="create")
                return
            except (NotImplementedError, ValueError):
                pass
            except OSError as error:
                if error.errno != errno.ENOSYS:  # a store that speaks S3, but not this part of it
                    raise
        self.fs.invalidate_cache(place)
        if self.fs.exists(place):
            raise FileExistsError(f"{place} exists")
        self.fs.pipe_file(place, data)

    def _holds(self, place: str, data: bytes) -> bool:
        self.fs.invalidate_cache(place)
        if self.fs.info(place)["size"] != len(data):
            return False
        steps = range(0, len(data), _COMPARED)
        return all(
            self.fs.cat_file(place, start=at, end=min(at + _COMPARED, len(data))) == data[at : at + _COMPARED]
            for at in steps
        )

    def read_into(
        self, path: str, start: int, targets: Sequence[memoryview], each: Callable[[memoryview], None] | None = None
    ) -> None:
        """See Storage."""
        size = sum(len(target) for target in targets)
        if not size:
            return
        data = memoryview(self._try(path, lambda: self._fetch(self._path(path), start, size)))
        if len(data) != size:
            raise CheckpointError(f"{self.url}/{path} gave {len(data)} of the {size} bytes at {start}")
        at = 0
        for views in stretches(targets, IN_CACHE):
            for view in views:
                view[:] = data[at : at + len(view)]
                at += len(view)
                if each is not None:
                    each(view)

    def _fetch(self, place: str, start: int, size: int) -> bytes:
        """These bytes of an object. An answer that ends early, though the object does not, is a failed request."""
        # By keyword: the second positional argument of s3fs is a version.
        data: bytes = self.fs.cat_file(place, start=start, end=start + size)
        if len(data) < size:
            self.fs.invalidate_cache(place)
            if self.fs.info(place)["size"] >= start + size:
                raise ConnectionError(f"the answer ended after {len(data)} of {size} bytes")
        return data

    def in_memory(self, path: str, start: int, stop: int) -> bool:
        """See Storage: none are here."""
        return False

    def cached(self, path: str, start: int, stop: int) -> Cached | None:
        """See Storage: none are here."""
        return None

    def read_all(self, path: str) -> bytes:
        """See Storage."""
        return bytes(self._try(path, lambda: self.fs.cat_file(self._path(path))))

    def sync_folder(self, folder: str) -> None:
        """See Storage; objects are durable when put."""

    def remove(self, path: str) -> None:
        """See Storage."""
        try:
            self._try(path, lambda: self.fs.rm_file(self._path(path)))
        except FileNotFoundError:
            return

    def remove_folder(self, folder: str) -> None:
        """See Storage; most object stores have no folders to remove."""
        if not self._folders or self.sizes(folder):
            return
        try:
            self.fs.rmdir(self._path(folder))
        except (OSError, NotImplementedError):
            return


def _knows_exclusive_put(fs: Any) -> bool:
    """Whether `pipe_file(..., mode="create")` means something to `fs`, or to the filesystem that it wraps."""
    while hasattr(fs, "fs"):
        fs = fs.fs
    return "mode" in inspect.signature(getattr(fs, "_pipe_file", fs.pipe_file)).parameters


def _time(entry: dict[str, Any]) -> float | None:
    """When the file of a listing's entry was written, in seconds since 1970, None where the listing does not say."""
    for key in ("LastModified", "last_modified", "mtime", "updated", "created"):  # S3, Azure, files, Google, memory
        value = entry.get(key)
        with contextlib.suppress(ValueError):
            if isinstance(value, str):
                value = datetime.datetime.fromisoformat(value)
        if isinstance(value, datetime.datetime):
            return value.replace(tzinfo=value.tzinfo or datetime.UTC).timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None
