"""What is under a root: which checkpoints are there, which are complete, and which is the newest."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from dataclasses import dataclass, replace

from .errors import CheckpointError, NewerFormat, StorageError
from .format.manifest import MANIFEST, Manifest, check_digest, from_bytes
from .format.records import step_folder
from .io import retries
from .io.storage import Storage, open_storage

_log = logging.getLogger("fastopt.checkpoint")
_STEP = re.compile(r"step-(\d{8,19})")
_LARGEST_MANIFEST = 1 << 30  # bytes


@dataclass(frozen=True)
class Entry:
    """A complete checkpoint.

    Attributes:
        step: of the checkpoint.
        url: of its folder.
        created: when it was saved, UTC, `2026-01-31T12:00:00Z`.
        world_size: by how many ranks.
        nbytes: bytes of all its data files.
    """

    step: int
    url: str
    created: str
    world_size: int
    nbytes: int

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True)
class Found:
    """A step folder: what lies in it, its manifest where that is sound, and what keeps it from being complete.

    manifest: also of one whose files are damaged or missing, which may be wanted, with all that it takes from others.
    newer: it is in a newer version of the format, so that nobody here can tell.
    """

    step: int
    url: str
    sizes: dict[str, int | None]
    manifest: Manifest | None
    data: bytes
    problem: str | None
    newer: bool = False

    @property
    def complete(self) -> bool:
        """The manifest is sound and every file it names is there with its full size."""
        return self.problem is None

    @property
    def verified(self) -> bool:
        """All its bytes have been read and checked once, as it is now, and that was noted."""
        return bool(self.data) and verified_mark(self.data) in self.sizes

    def refuse_newer(self) -> None:
        """Raise NewerFormat where it is of a newer version: no reason to take another one, or to remove anything."""
        if self.newer:
            raise NewerFormat(str(self.problem))

    def raise_problem(self) -> Manifest:
        """The manifest; CheckpointError where the checkpoint is not complete."""
        if self.problem is not None or self.manifest is None:
            raise CheckpointError(self.problem or f"{self.url} has no manifest")
        return self.manifest


def verified_mark(data: bytes) -> str:
    """The name of the file beside the manifest `data` which notes that everything it names was read and was sound."""
    return f"verified-{data[11:27].decode()}"


def damaged_mark(data: bytes) -> str:
    """The name of the file beside the manifest `data` which notes that something it names was read and was damaged."""
    return f"damaged-{data[11:27].decode()}"


def note_damage(storage: Storage, step: int, data: bytes, reason: str) -> None:
    """Leave a note, where the storage can be written to, so that nobody trusts the checkpoint because of its sizes.

    It is then not complete any more: nothing is taken from it for later checkpoints, and its step may be saved again.
    `verify` removes the note where it finds the checkpoint sound. Other checkpoints that use a file which `reason`
    names get the note too: the next one would be made from the newest of them.
    """
    with contextlib.suppress(OSError, CheckpointError):
        _note_one(storage, step, data, reason)
        damaged = {file.path for file in from_bytes(data).files if file.path in reason}
        for number in step_numbers(storage) if damaged else ():
            found = look(storage, number)
            if found.complete and found.manifest and damaged & {file.path for file in found.manifest.files}:
                _note_one(storage, number, found.data, reason)


def _note_one(storage: Storage, step: int, data: bytes, reason: str) -> None:
    with contextlib.suppress(FileExistsError):
        if MANIFEST in storage.sizes(step_folder(step)):  # else it has just been removed
            storage.publish(f"{step_folder(step)}/{damaged_mark(data)}", reason.encode())


def refuse_complete(storage: Storage, step: int) -> Found:
    """What there is of `step`, which is to be saved. Raises CheckpointError where it is a complete checkpoint."""
    found = look(storage, step)
    found.refuse_newer()
    if found.complete:
        raise CheckpointError(f"step {step} is already saved at {found.url}; nothing was overwritten")
    return found


def make_way(storage: Storage, step: int, data: bytes) -> None:
    """Remove the manifest `data` of a checkpoint that is not complete, for one which has been saved in its place.

    Raises CheckpointError where it has become complete. Another manifest, of another job, stays.
    """
    found = refuse_complete(storage, step)
    if MANIFEST in found.sizes and found.data == data:
        storage.remove(f"{step_folder(step)}/{MANIFEST}")


def latest(url: str | os.PathLike[str]) -> Entry | None:
    """The newest complete checkpoint under `url`, or None. Not collective.

    Complete means: the manifest is sound and every file it names is there with its full size. What was complete once
    and is so no more gets a warning. StorageError where the storage is out of reach, CheckpointError where a newer
    version of the format hides the answer.
    """
    storage = open_storage(url)
    for step in step_numbers(storage):
        found = look(storage, step)
        found.refuse_newer()
        if found.complete:
            return _entry(found)
        if MANIFEST in found.sizes:
            _log.warning("passed over step %d: %s", step, found.problem)
    return None


def newest_completed(storage: Storage) -> int | None:
    """The newest step that has its manifest, sound or damaged since, or None. Not collective."""
    return next((step for step in step_numbers(storage) if MANIFEST in storage.sizes(step_folder(step))), None)


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
        found.refuse_newer()
        if found.complete:
            return step_folder(number), found.data
        reasons.append(str(found.problem))
    raise CheckpointError("\n".join([nothing_at(storage.url), *reasons[:5]]))


def inspect(storage: Storage, step: int) -> tuple[Manifest, bytes]:
    """The manifest of `step`, checked together with the sizes of its files, whatever is noted about their content.

    CheckpointError naming file and reason.
    """
    found = look(storage, step, notes=False)
    return found.raise_problem(), found.data


def look(storage: Storage, step: int, notes: bool = True) -> Found:
    """What there is of `step`. One of which damage is noted is not complete, unless `notes` do not count.

    StorageError where that cannot be told.
    """
    found = glance(storage, step, notes)
    if not found.data:
        return found
    try:
        manifest = parsed(storage, step, found.data, None)
        found = replace(found, manifest=manifest)
        if found.complete:
            _check(storage, step, manifest, found.sizes)
    except StorageError:
        raise
    except (CheckpointError, FileNotFoundError) as error:
        return replace(found, problem=found.problem or str(error), newer=isinstance(error, NewerFormat))
    return found


def glance(storage: Storage, step: int, notes: bool = True) -> Found:
    """As `look`, but the manifest is not parsed: it is known to have its digest, and that is all."""
    folder = step_folder(step)
    place = f"{storage.url}/{folder}"
    sizes = storage.sizes(folder)
    data = b""
    try:
        data = _read_manifest(storage, step, sizes)
        check_digest(data)
        problem = _noted(storage, folder, sizes, data) if notes else None
    except StorageError:
        raise
    except (CheckpointError, FileNotFoundError) as error:
        problem = str(error) if place in str(error) else f"{place}/{MANIFEST}: {error}"
    return Found(step, place, sizes, None, data, problem)


def parsed(storage: Storage, step: int, data: bytes, sizes: dict[str, int | None] | None) -> Manifest:
    """The manifest `data` of `step`; CheckpointError where it is not sound, or files are not as large as it says.

    sizes: those in the folder of the step; without, nothing is looked up.
    """
    place = f"{storage.url}/{step_folder(step)}"
    try:
        manifest = from_bytes(data)
    except NewerFormat as error:
        raise NewerFormat(f"{place}/{MANIFEST}: {error}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{place}/{MANIFEST}: {error}") from None
    if manifest.step != step:
        raise CheckpointError(f"{place}/{MANIFEST}: it is the manifest of step {manifest.step}")
    if sizes is not None:
        _check(storage, step, manifest, sizes)
    return manifest


def _noted(storage: Storage, folder: str, sizes: dict[str, int | None], data: bytes) -> str | None:
    """What is noted about damage, if anything is."""
    note = damaged_mark(data)
    if note not in sizes:
        return None
    reason = bytearray(min(sizes[note] or 0, 1000))
    storage.read_into(f"{folder}/{note}", 0, [memoryview(reason)])
    text = reason.decode(errors="replace")
    return f"{storage.url}/{folder}/{note} says: {text} (`verify` removes the note where it finds nothing)"


def _read_manifest(storage: Storage, step: int, sizes: dict[str, int | None]) -> bytes:
    folder = step_folder(step)
    place = f"{storage.url}/{folder}/{MANIFEST}"
    size = sizes.get(MANIFEST)
    if size is None:
        there = "was not completed: it has no" if sizes else "does not exist: there is no"
        raise CheckpointError(f"the checkpoint of step {step} {there} {place}")
    if size > _LARGEST_MANIFEST:
        raise CheckpointError(f"{place}: {size} bytes are too many for a manifest")
    data = bytearray(size)
    storage.read_into(f"{folder}/{MANIFEST}", 0, [memoryview(data)])
    return bytes(data)


def _check(storage: Storage, step: int, manifest: Manifest, sizes: dict[str, int | None]) -> None:
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


def check_readable(data: bytes) -> None:
    """Raise CheckpointError unless `data`, a manifest that is to be published, will be read again without one."""
    if len(data) > _LARGEST_MANIFEST:
        raise CheckpointError(
            f"the manifest would have {len(data)} bytes, more than {_LARGEST_MANIFEST}: is there something large in "
            f"extra, or in the state of the scheduler or loader?"
        )
    try:
        from_bytes(data)
    except CheckpointError as error:
        raise CheckpointError(f"what is to be saved could not be loaded again: {error}") from error


def wait_for(storage: Storage, manifest: Manifest) -> None:
    """Return when all files of a manifest are seen at their full size; CheckpointError where that does not happen.

    What other ranks have written may take half a minute to appear in a listing, of NFS for one.
    """
    for wait in (*retries.WAITS, None):
        seen = {step: storage.sizes(step_folder(step)) for step in {file.step for file in manifest.files}}
        wrong = [file for file in manifest.files if seen[file.step].get(file.name) != file.bytes]
        if not wrong:
            return
        if wait is not None:
            time.sleep(wait)
    first = wrong[0]
    raise CheckpointError(
        f"{storage.url}/{first.path} was written with {first.bytes} bytes, but rank 0 sees "
        f"{seen[first.step].get(first.name, 'no such file')}: is the storage shared by all ranks?"
    )


def warn_of_newer(storage: Storage, step: int) -> None:
    """Warn where there are steps newer than one that has just been saved."""
    newer = [number for number in reversed(step_numbers(storage)) if number > step]
    if newer:
        shown = ", ".join(map(str, newer)) if len(newer) < 9 else f"{newer[0]} to {newer[-1]}"
        _log.warning(
            "step %d is saved, but %s has newer steps (%s): a load without step= takes the newest of these, so remove "
            "those that are to be forgotten",
            step,
            storage.url,
            shown,
        )


def check_root(url: str) -> None:
    """Raise CheckpointError where `url`, the root of checkpoints to be written, is the folder of a step by mistake."""
    root, _, name = url.rstrip("/").rpartition("/")
    if _STEP.fullmatch(name):
        raise CheckpointError(f"{url} would be the folder of a step, which belongs in that of a run: write to {root}")


def nothing_at(url: str) -> str:
    """What is said of a root without a complete checkpoint; `url` may be a step folder by mistake."""
    root, _, name = url.rstrip("/").rpartition("/")
    named = _STEP.fullmatch(name)
    hint = f": this is the folder of a step, pass {root} and step={int(named[1])}" if named else ""
    return f"there is no complete checkpoint at {url}{hint}"


def step_numbers(storage: Storage) -> list[int]:
    """The steps that have a folder, newest first."""
    found = (_STEP.fullmatch(name) for name, size in storage.sizes("").items() if size is None)
    return sorted((int(match[1]) for match in found if match and step_folder(int(match[1])) == match[0]), reverse=True)


def _entry(found: Found) -> Entry:
    manifest = found.raise_problem()
    return Entry(found.step, found.url, manifest.created, manifest.world_size, manifest.nbytes)
