"""Reading every byte of a checkpoint and comparing it with what was saved."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import xxhash

from .arguments import check_whole_number
from .catalog import Found, damaged_mark, look, newest_completed, note_damage, nothing_at, verified_mark
from .errors import CheckpointError, StorageError
from .format.dtypes import DTYPES
from .format.records import INDEX, MANIFEST, DataFile, Manifest, step_folder
from .io.storage import Storage, open_storage
from .saving.assemble import hugging_face_index

Progress = Callable[[int, int], Any]
"""Is called with the bytes done so far and in all."""

_AT_ONCE = 8
_READ_BYTES = 16 << 20


@dataclass(frozen=True)
class Verified:
    """What was found.

    Attributes:
        step: of the checkpoint.
        url: of its folder.
        files: how many were read.
        nbytes: bytes that were read.
        problems: what is wrong, a sentence each.
    """

    step: int
    url: str
    files: int
    nbytes: int
    problems: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Nothing is wrong."""
        return not self.problems


def verify(
    url: str | os.PathLike[str], step: int | None = None, progress: Progress | None = None, mark: bool = True
) -> Verified:
    """Read all of the checkpoint of `step` (default: the newest that has a manifest) under `url` and check every byte.

    A checkpoint that is not complete is a problem and no error. Not collective.

    Args:
        url: the root of the checkpoints.
        step: which one.
        progress: called with the bytes that have been read, and all there are.
        mark: leave a note beside a sound one, so that `prune` never removes the newest of these, and beside a damaged
            one, which then counts as not complete; where the storage cannot be written to there is none.

    Raises:
        CheckpointError: there is none.
        StorageError: the storage is out of reach.
    """
    check_whole_number("step", step, 0, "a whole number from 0")
    storage = open_storage(url)
    number = newest_completed(storage) if step is None else step
    if number is None:
        raise CheckpointError(nothing_at(storage.url))
    found = look(storage, number, notes=False)
    if step is None:
        found.refuse_newer()
    if MANIFEST not in found.sizes:
        found.raise_problem()
    if found.problem is not None or found.manifest is None:
        return Verified(number, found.url, 0, 0, (str(found.problem),))
    manifest = found.manifest
    problems = _Reader(storage, manifest, progress).problems()
    if mark:
        _note(storage, found, problems)
    problems += _index(storage, manifest, found.sizes)
    return Verified(number, found.url, len(manifest.files), manifest.nbytes, tuple(problems))


def note_sound(storage: Storage, manifest: Manifest, data: bytes) -> None:
    """Note that the checkpoint with the manifest `data` is sound, once all its blocks have been found so elsewhere.

    The headers, which loading needs not, are read here; nothing is noted if one is damaged, or where the storage
    cannot be written to. Any note of damage stays: nothing that has one is loaded but when its step was asked for.
    """
    try:
        there = storage.sizes(step_folder(manifest.step))
        if {verified_mark(data), damaged_mark(data)} & there.keys():
            return
        for file in manifest.files:
            head = bytearray(file.header)
            storage.read_into(file.path, 0, [memoryview(head)])
            if xxhash.xxh3_64_hexdigest(head) != file.digest:
                return
        storage.publish(f"{step_folder(manifest.step)}/{verified_mark(data)}", b"{}")
    except (OSError, CheckpointError):
        return


def _note(storage: Storage, found: Found, problems: list[str]) -> None:
    """Leave the note that belongs there and remove the other; the answer is worth more than the note."""
    folder = step_folder(found.step)
    if problems:
        note_damage(storage, found.step, found.data, "\n".join(problems))
        return
    with contextlib.suppress(OSError, StorageError):
        if damaged_mark(found.data) in found.sizes:
            storage.remove(f"{folder}/{damaged_mark(found.data)}")
        if not found.verified:
            storage.publish(f"{folder}/{verified_mark(found.data)}", b"{}")


class _Reader:
    """Reads the files of a checkpoint, some stretches at once, and collects what is wrong."""

    def __init__(self, storage: Storage, manifest: Manifest, progress: Progress | None) -> None:
        self.storage, self.manifest, self.progress = storage, manifest, progress
        self.done = 0

    def problems(self) -> list[str]:
        """Everything that does not have the checksum it was saved with."""
        found: list[str] = []
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for part, bad in pool.map(self._check, self._stretches()):
                found += bad
                self.done += part
                if self.progress:
                    self.progress(self.done, self.manifest.nbytes)
        return found

    def _stretches(self) -> Iterator[tuple[DataFile, int, int, int]]:
        """Number of a file, and bytes of it: its header, or whole blocks."""
        step = max(_READ_BYTES, self.manifest.block)
        for number, file in enumerate(self.manifest.files):
            yield file, number, 0, file.header
            for start in range(file.header, file.bytes, step):
                yield file, number, start, min(file.bytes, start + step)

    def _check(self, stretch: tuple[DataFile, int, int, int]) -> tuple[int, list[str]]:
        file, number, start, stop = stretch
        data = memoryview(bytearray(stop - start))
        try:
            self.storage.read_into(file.path, start, [data])
        except StorageError:
            raise
        except (CheckpointError, FileNotFoundError) as error:  # it was there a moment ago
            return stop - start, [str(error)]
        if not start:
            good = xxhash.xxh3_64_hexdigest(data) == file.digest
            return stop - start, [] if good else [f"{self._name(file)}: the header, bytes 0 to {stop}, is damaged"]
        block, bad = self.manifest.block, []
        for at in range(0, stop - start, block):
            first = start + at
            place = 16 * ((first - file.header) // block)
            if xxhash.xxh3_64_hexdigest(data[at : at + block]) != file.blocks[place : place + 16]:
                last = min(first + block, stop)
                of = " and ".join(repr(key) for key in self._keys(number, first, last)) or "no tensor"
                bad.append(f"{self._name(file)}: bytes {first} to {last}, of {of}, are damaged")
        return stop - start, bad

    def _name(self, file: DataFile) -> str:
        return f"{self.storage.url}/{file.path}"

    def _keys(self, number: int, first: int, last: int) -> list[str]:
        """The tensors that have elements in bytes `first` to `last` of a file."""
        found = []
        for key, tensor in self.manifest.tensors.items():
            shards = tensor.shards
            stop = shards.at + shards.sizes * DTYPES[tensor.dtype].itemsize
            if ((shards.file == number) & (shards.at < last) & (stop > first)).any():
                found.append(key)
        return found if len(found) <= 3 else [*found[:2], f"{len(found) - 2} more"]


def _index(storage: Storage, manifest: Manifest, sizes: dict[str, int | None]) -> list[str]:
    """What is wrong with the file by which Hugging Face's libraries find the weights: nothing of ours needs it."""
    wanted = hugging_face_index(manifest)
    path = f"{step_folder(manifest.step)}/{INDEX}"
    if wanted is None:
        return []
    if INDEX not in sizes:
        return [f"{storage.url}/{path} is missing; only programs of others need it"]
    same = storage.read_all(path) == wanted
    return [] if same else [f"{storage.url}/{path} is damaged; only programs of others need it"]
