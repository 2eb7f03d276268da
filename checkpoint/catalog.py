"""What is under a root: which checkpoints are there, which are complete, and which is the newest."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from .errors import CheckpointError, StorageError
from .manifest import MANIFEST, Manifest, from_bytes
from .records import step_folder
from .storage import Storage, open_storage

_STEP = re.compile(r"step-(\d{8,19})")
_LARGEST_MANIFEST = 1 << 30  # bytes


@dataclass(frozen=True)
class Entry:
    """A complete checkpoint: its step, the URL of its folder, when and by how many ranks it was saved, its bytes."""

    step: int
    url: str
    created: str
    world_size: int
    nbytes: int

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True)
class Found:
    """A step folder: what lies in it, its manifest where that is sound, and what keeps it from being complete."""

    step: int
    url: str
    sizes: dict[str, int | None]
    manifest: Manifest | None
    data: bytes
    problem: str | None

    @property
    def complete(self) -> bool:
        """The manifest is sound and every file it names is there with its full size."""
        return self.problem is None

    @property
    def verified(self) -> bool:
        """All its bytes have been read and checked once, as it is now, and that was noted."""
        return bool(self.data) and verified_mark(self.data) in self.sizes

    def raise_problem(self) -> Manifest:
        """The manifest; CheckpointError where the checkpoint is not complete."""
        if self.problem is not None or self.manifest is None:
            raise CheckpointError(self.problem or f"{self.url} has no manifest")
        return self.manifest


def verified_mark(data: bytes) -> str:
    """The name of the file beside the manifest `data` which notes that everything it names was read and was sound."""
    return f"verified-{data[11:27].decode()}"


def latest(url: str | os.PathLike[str]) -> Entry | None:
    """The newest complete checkpoint under `url`, or None. Not collective.

    Complete means: the manifest is sound and every file it names is there with its full size. StorageError where the
    storage is out of reach.
    """
    storage = open_storage(url)
    for step in step_numbers(storage):
        found = look(storage, step)
        if found.complete:
            return _entry(found)
    return None


def steps(url: str | os.PathLike[str]) -> list[int]:
    """The steps of all complete checkpoints under `url`, oldest first. Not collective."""
    return [found.step for found in survey(open_storage(url)) if found.complete]


def survey(storage: Storage) -> list[Found]:
    """All step folders, oldest first."""
    return [look(storage, step) for step in reversed(step_numbers(storage))]


def find(storage: Storage, step: int | None) -> tuple[str, bytes]:
    """The folder and the manifest's bytes of `step`, or of the newest complete checkpoint.

    Raises CheckpointError that says what is wrong with the step, or with every step there is; StorageError where that
    cannot be told: an older checkpoint is no answer to a network that is down.
    """
    if step is not None:
        return step_folder(step), inspect(storage, step)[1]
    reasons = []
    for number in step_numbers(storage):
        found = look(storage, number)
        if found.complete:
            return step_folder(number), found.data
        reasons.append(str(found.problem))
    raise CheckpointError("\n".join([f"there is no complete checkpoint at {storage.url}", *reasons[:5]]))


def inspect(storage: Storage, step: int) -> tuple[Manifest, bytes]:
    """The manifest of `step`, checked together with the sizes of its files. CheckpointError naming file and reason."""
    found = look(storage, step)
    return found.raise_problem(), found.data


def look(storage: Storage, step: int) -> Found:
    """What there is of `step`. StorageError where that cannot be told."""
    folder = step_folder(step)
    place = f"{storage.url}/{folder}"
    sizes = storage.sizes(folder)
    manifest, data = None, b""
    try:
        data = _read_manifest(storage, step, sizes)
        manifest = from_bytes(data)
        _check(storage, step, manifest, sizes)
        problem = None
    except StorageError:
        raise
    except (CheckpointError, FileNotFoundError) as error:
        problem = str(error) if place in str(error) else f"{place}/{MANIFEST}: {error}"
    return Found(step, place, sizes, manifest, data, problem)


def _read_manifest(storage: Storage, step: int, sizes: dict[str, int | None]) -> bytes:
    folder = step_folder(step)
    place = f"{storage.url}/{folder}/{MANIFEST}"
    size = sizes.get(MANIFEST)
    if size is None:
        there = "was not completed: it has no" if sizes else "does not exist: there is no"
        raise CheckpointError(f"the checkpoint of step {step} {there} {place}")
    if size > _LARGEST_MANIFEST:
        raise CheckpointError(f"{place}: {size} bytes are too many for a manifest")
    return storage.read_all(f"{folder}/{MANIFEST}")


def _check(storage: Storage, step: int, manifest: Manifest, sizes: dict[str, int | None]) -> None:
    place = f"{storage.url}/{step_folder(step)}"
    if manifest.step != step:
        raise CheckpointError(f"{place}/{MANIFEST}: it is the manifest of step {manifest.step}")
    there = {step: sizes}
    for file in manifest.files:
        if file.step not in there:
            there[file.step] = storage.sizes(step_folder(file.step))
        size = there[file.step].get(file.name)
        if size is None:
            raise CheckpointError(f"{storage.url}/{file.path}, which step {step} needs, is missing")
        if size != file.bytes:
            raise CheckpointError(f"{storage.url}/{file.path} has {size} bytes instead of {file.bytes}")


def newest_before(storage: Storage, step: int) -> bytes | None:
    """The manifest's bytes of the newest complete checkpoint before `step`, or None. Not collective."""
    for number in step_numbers(storage):
        found = look(storage, number) if number < step else None
        if found is not None and found.complete:
            return found.data
    return None


def step_numbers(storage: Storage) -> list[int]:
    """The steps that have a folder, newest first."""
    found = (_STEP.fullmatch(name) for name, size in storage.sizes("").items() if size is None)
    return sorted((int(match[1]) for match in found if match and step_folder(int(match[1])) == match[0]), reverse=True)


def _entry(found: Found) -> Entry:
    manifest = found.raise_problem()
    return Entry(found.step, found.url, manifest.created, manifest.world_size, manifest.nbytes)
