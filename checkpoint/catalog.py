"""What is under a root: which checkpoints are complete, which is the newest, and which may go."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch.distributed as dist

from .errors import CheckpointError
from .manifest import FILE_NAME, MANIFEST, Manifest, from_bytes
from .records import INDEX, step_folder
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


def latest(url: str | os.PathLike[str]) -> Entry | None:
    """The newest complete checkpoint under `url`, or None. Not collective.

    Complete means: the manifest is sound and every file it names is there with its full size.
    """
    storage = open_storage(url)
    for step in _folders(storage):
        manifest = _complete(storage, step)
        if manifest:
            return _entry(storage, manifest)
    return None


def steps(url: str | os.PathLike[str]) -> list[int]:
    """The steps of all complete checkpoints under `url`, oldest first. Not collective."""
    storage = open_storage(url)
    return [step for step in reversed(_folders(storage)) if _complete(storage, step)]


def prune(url: str | os.PathLike[str], keep: int) -> list[int]:
    """Remove all complete checkpoints but the newest `keep` (at least 1); the steps removed.

    Only rank 0 of the default group does anything. Not collective. The manifest of a checkpoint goes first, so that a
    half removed one is no checkpoint. What is not a complete checkpoint is left alone.
    """
    if keep < 1:
        raise ValueError(f"prune keeps at least 1 checkpoint, got keep={keep}")
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return []
    storage = open_storage(url)
    gone = sorted(steps(url)[:-keep])
    for step in gone:
        folder = step_folder(step)
        storage.remove(f"{folder}/{MANIFEST}")
        storage.sync_folder(folder)
        for name in storage.sizes(folder):
            if FILE_NAME.fullmatch(name) or name == INDEX or name.startswith((f".{MANIFEST}.", f".{INDEX}.")):
                storage.remove(f"{folder}/{name}")
        storage.remove_folder(folder)
    return gone


def find(storage: Storage, step: int | None) -> tuple[str, bytes]:
    """The folder and the manifest's bytes of `step`, or of the newest complete checkpoint.

    Raises CheckpointError that says what is wrong with the step, or with every step there is.
    """
    if step is not None:
        return step_folder(step), inspect(storage, step)[1]
    reasons = []
    for number in _folders(storage):
        try:
            return step_folder(number), inspect(storage, number)[1]
        except CheckpointError as error:
            reasons.append(str(error))
    raise CheckpointError("\n".join([f"there is no complete checkpoint at {storage.url}", *reasons[:5]]))


def inspect(storage: Storage, step: int) -> tuple[Manifest, bytes]:
    """The manifest of `step`, checked together with the sizes of its files. CheckpointError naming file and reason."""
    folder = step_folder(step)
    place = f"{storage.url}/{folder}"
    sizes = storage.sizes(folder)
    size = sizes.get(MANIFEST)
    if size is None:
        there = "was not completed: it has no" if sizes else "does not exist: there is no"
        raise CheckpointError(f"the checkpoint of step {step} {there} {place}/{MANIFEST}")
    if size > _LARGEST_MANIFEST:
        raise CheckpointError(f"{place}/{MANIFEST}: {size} bytes are too many for a manifest")
    try:
        data = storage.read_all(f"{folder}/{MANIFEST}")
        manifest = from_bytes(data)
    except (CheckpointError, FileNotFoundError) as error:
        raise CheckpointError(f"{place}/{MANIFEST}: {error}") from error
    if manifest.step != step:
        raise CheckpointError(f"{place}/{MANIFEST}: it is the manifest of step {manifest.step}")
    found = {step: sizes}
    for file in manifest.files:
        if file.step not in found:
            found[file.step] = storage.sizes(step_folder(file.step))
        size = found[file.step].get(file.name)
        if size is None:
            raise CheckpointError(f"{storage.url}/{file.path}, which step {step} needs, is missing")
        if size != file.bytes:
            raise CheckpointError(f"{storage.url}/{file.path} has {size} bytes instead of {file.bytes}")
    return manifest, data


def newest_before(storage: Storage, step: int) -> bytes | None:
    """The manifest's bytes of the newest complete checkpoint before `step`, or None."""
    for number in _folders(storage):
        if number < step:
            try:
                return inspect(storage, number)[1]
            except CheckpointError:
                continue
    return None


def _folders(storage: Storage) -> list[int]:
    """The steps that have a folder, newest first."""
    found = (_STEP.fullmatch(name) for name, size in storage.sizes("").items() if size is None)
    return sorted((int(match[1]) for match in found if match and step_folder(int(match[1])) == match[0]), reverse=True)


def _complete(storage: Storage, step: int) -> Manifest | None:
    try:
        return inspect(storage, step)[0]
    except CheckpointError:
        return None


def _entry(storage: Storage, manifest: Manifest) -> Entry:
    url = f"{storage.url}/{step_folder(manifest.step)}"
    return Entry(manifest.step, url, manifest.created, manifest.world_size, manifest.nbytes)
