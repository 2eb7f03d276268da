"""Local files and the page cache: what it holds already is looked at there; writing makes that cheap later.

See [Note: without a copy].
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..errors import CheckpointError
from .hostmemory import advise

# [Note: without a copy]
# A checksum needs to see bytes, not to have them: through a mapping that costs a third of reading them. Mappings have
# a trap: a page that cannot be brought in, of a disk that fails or a file that somebody has cut, kills the process. So
# only what lies in the page cache is mapped, as a read that must not wait (RWF_NOWAIT) says. Network filesystems,
# where others may cut a file, do not know such reads. And pages are brought in by MADV_POPULATE_READ, whose failure is
# an error like any other. Whatever is not so is read as usual, and so is everything on systems that lack either.
# Pages count as this process's memory as long as they are mapped, hence one window at a time. Where bytes are needed
# and not only looked at, reading them is cheaper than copying them out of a mapping.

WINDOW = 4 << 20
IN_CACHE = 1 << 20  # bytes read at once: a processor's second-level cache still has them when they are looked at
_VIEWS = 1024  # that one system call takes
_PROBED = 4 << 20  # bytes between two looks into the page cache
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)
_POPULATE_READ = 22  # since Linux 5.14; Python's mmap module does not name it


class Cached:
    """Bytes `start` to `stop` of the file `path`, all or nearly all of them in the page cache."""

    def __init__(self, path: str, memory: mmap.mmap, start: int, stop: int) -> None:
        self.path, self._memory = path, memory
        self._before = start % mmap.ALLOCATIONGRANULARITY
        self._size = stop - start

    def windows(self) -> Iterator[Tensor]:
        """The bytes, at most WINDOW of them at once, to be looked at before the next are asked for.

        Raises CheckpointError where the disk cannot read them.
        """
        data = torch.frombuffer(self._memory, dtype=torch.uint8)
        start = data.data_ptr()
        for at in range(self._before, self._before + self._size, WINDOW):
            stop = min(at + WINDOW, self._before + self._size)
            first = at // mmap.PAGESIZE * mmap.PAGESIZE
            if not advise(start + first, stop - first, _POPULATE_READ):
                raise CheckpointError(f"{self.path} is damaged: the disk cannot read it")
            yield data[at:stop]
            advise(start + first, stop - first, mmap.MADV_DONTNEED)


def in_page_cache(handle: int, start: int, stop: int) -> bool:
    """Whether bytes of the open file `handle` are in the page cache, as far as a look at some of them tells."""
    if not _NOWAIT or start >= stop:
        return False
    byte = bytearray(1)
    try:
        return all(os.preadv(handle, [byte], at, _NOWAIT) == 1 for at in (*range(start, stop, _PROBED), stop - 1))
    except OSError:  # it would have to wait; a system or filesystem that does not know of this
        return False


def cached(path: str, handle: int, start: int, stop: int) -> Cached | None:
    """Bytes `start` to `stop` of the open file `handle`; None where they cannot be had without a copy or a disk."""
    if not in_page_cache(handle, start, stop):
        return None
    try:
        base = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        # a private mapping may be written to, which nobody does; torch wants none that may not
        memory = mmap.mmap(handle, stop - base, access=mmap.ACCESS_COPY, offset=base)
        memory.madvise(_POPULATE_READ, 0, mmap.PAGESIZE)
    except (OSError, ValueError):
        return None
    return Cached(path, memory, start, stop)


def stretches(chunks: Iterable[bytes | memoryview], size: int) -> Iterator[list[memoryview]]:
    """The chunks in lists for one system call each, which ends at a multiple of `size` bytes.

    What is written in large ones lies in the page cache in large pieces, which makes writing and mapping it cheaper.
    """
    stretch: list[memoryview] = []
    room = size
    for chunk in chunks:
        view = memoryview(chunk)
        while view:
            stretch.append(view[:room])
            view = view[len(stretch[-1]) :]
            room -= len(stretch[-1])
            if not room or len(stretch) == _VIEWS:
                yield stretch
                stretch, room = [], room or size
    if stretch:
        yield stretch


def fill(handle: int, views: list[memoryview]) -> int:
    """Fill the views from where the open file `handle` is; the number of bytes that it lacks for that."""
    left = sum(map(len, views))
    while left:
        done = os.readv(handle, views)
        if not done:
            break
        left -= done
        if left:
            views = _rest(views, done)
    return left


def write(handle: int, views: list[memoryview]) -> None:
    """Write all of the views to the open file `handle`."""
    while views:
        views = _rest(views, os.writev(handle, views))


def _rest(views: list[memoryview], done: int) -> list[memoryview]:
    """The views without their first `done` bytes."""
    for number, view in enumerate(views):
        if done < len(view):
            return [view[done:], *views[number + 1 :]]
        done -= len(view)
    return []
