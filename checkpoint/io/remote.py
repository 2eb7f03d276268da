"""Any fsspec filesystem that is not the local one: S3 and other object stores, `memory://`.

On an object store an object appears whole, by one put that refuses to replace one. Names are never reused and nothing
is renamed, and no stream is opened for writing: closing one after an exception would publish half an object.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import inspect
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from ..errors import CheckpointError, StorageError
from .pagecache import IN_CACHE, Cached, stretches
from .retries import retry

T = TypeVar("T")

_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss"})
_COMPARED = 16 << 20  # bytes read at once when an object is compared


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
