"""Which checkpoints may go, and the leftovers of saves that died.

See [Note: what stays].
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

from .catalog import Found, survey
from .format.records import FILE_NAME, INDEX, MANIFEST, step_folder
from .io.storage import Storage, open_storage

# [Note: what stays]
# The newest complete checkpoints; some of the older ones for good; the newest one of which every byte has been read and
# found sound, since nobody knows that of the others; and what any of these takes files from. Whatever is not a complete
# checkpoint does not count and is not touched: somebody may want to look at it.
# The manifest of a checkpoint goes first, so that one that is half removed is none.
# A data file that no manifest names is of a save that died, or of one that is running. Nobody can tell these apart but
# by time: files of one save are removed together, when the last of them is older by a grace time than the newest file
# under the root. So ages are differences of times of one clock, the storage's, unless that has been in the future.

_TEMPORARY = (f".{MANIFEST}.", f".{INDEX}.")

GRACE = 6 * 3600.0
"""Seconds for which the files of a save that has no manifest yet are left alone."""


@dataclass(frozen=True)
class Plan:
    """What `prune` would remove: steps, oldest first, and the paths of leftovers; `reasons` say why the others stay."""

    steps: tuple[int, ...]
    leftovers: tuple[str, ...]
    reasons: dict[int, str]

    def within(self, later: Plan) -> Plan:
        """What is to be removed by this plan and still by a `later` one."""
        steps = tuple(step for step in self.steps if step in later.steps)
        return Plan(steps, tuple(path for path in self.leftovers if path in later.leftovers), later.reasons)


def prune(
    url: str | os.PathLike[str],
    keep: int | None = None,
    *,
    keep_last: int | None = None,
    keep_every: int | None = None,
    grace: float = GRACE,
) -> list[int]:
    """Remove checkpoints that are no longer needed, and leftovers of saves that died; the steps removed.

    The newest one that `verify`, or the ranks of a load together, found sound stays, and all that those which stay
    take files from. What is not a complete checkpoint is left alone, and so is every file that is not ours. To be
    called after a save has returned. Only rank 0 of the default group does anything. Not collective.

    Args:
        url: the root of the checkpoints.
        keep: the same as `keep_last`.
        keep_last: so many of the newest complete checkpoints stay, at least 1.
        keep_every: so does, for good, the first one at or after every multiple of so many steps.
        grace: seconds; files of an unfinished save younger than that (by the storage's clock, counted back from the
            newest file under `url`) are left alone, since the save may be running.

    Raises:
        ValueError: none or both of `keep` and `keep_last`, or a number below 1.
        CheckpointError: one of them is in a newer version of the format; nothing was removed.
        StorageError: the storage is out of reach.
    """
    if (keep is None) == (keep_last is None):
        raise ValueError("prune needs keep_last, the number of newest checkpoints to keep")
    number = keep_last if keep is None else keep
    if number is None or number < 1:
        raise ValueError(f"prune keeps at least 1 checkpoint, got keep={number}")
    if keep_every is not None and keep_every < 1:
        raise ValueError(f"keep_every must be at least 1 step, got {keep_every}")
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return []
    storage = open_storage(url)
    plan = plan_prune(storage, number, keep_every, grace)
    carry_out(storage, plan)
    return list(plan.steps)


def plan_prune(
    storage: Storage, keep_last: int, keep_every: int | None = None, grace: float = GRACE, saved: int | None = None
) -> Plan:
    """What `prune` would remove; removes nothing. `saved`: the step just saved, which may not be the newest, stays."""
    everything = survey(storage)
    for found in everything:
        found.refuse_newer()  # it may need files that nobody here knows of
    complete = [found for found in everything if found.complete]
    needs = {f.step: {file.step for file in f.manifest.files} for f in everything if f.manifest}
    reasons = stay(
        [found.step for found in complete],
        keep_last,
        keep_every,
        [found.step for found in complete if found.verified],
        needs,
        [found.step for found in everything if not found.complete],
        saved,
    )
    gone = tuple(found.step for found in complete if found.step not in reasons)
    return Plan(gone, _leftovers(storage, everything, grace), reasons)


def stay(
    complete: list[int],
    keep_last: int,
    keep_every: int | None,
    verified: list[int],
    needs: Mapping[int, set[int]],
    others: list[int],
    saved: int | None = None,
) -> dict[int, str]:
    """The steps that stay, each with the reason.

    complete, verified: steps of complete and of verified checkpoints, ascending. needs: for each step those whose files
    it uses. others: steps that are not complete, which are not touched and whose files may still be wanted. saved: the
    step just saved.
    """
    reasons = dict.fromkeys(others, "not complete, left alone")
    for step in complete[-keep_last:]:
        reasons[step] = f"one of the newest {keep_last}" if keep_last > 1 else "the newest"
    if keep_every:
        seen = {0}
        for step in complete:
            if step == 0 or step // keep_every not in seen:
                reasons.setdefault(step, f"the first from step {step // keep_every * keep_every} on")
            seen.add(step // keep_every)
    if saved is not None:
        reasons.setdefault(saved, "just saved")
    for step in verified[-1:]:
        reasons.setdefault(step, "the newest that was verified")
    todo = list(reasons)
    while todo:
        step = todo.pop()
        for used in sorted(needs.get(step, set()) - reasons.keys()):
            reasons[used] = f"step {step} uses its files"
            todo.append(used)
    return reasons


def carry_out(storage: Storage, plan: Plan) -> None:
    """Remove what the plan says."""
    for step in plan.steps:
        folder = step_folder(step)
        storage.remove(f"{folder}/{MANIFEST}")
        with contextlib.suppress(FileNotFoundError):  # somebody else is removing the same
            storage.sync_folder(folder)
        for name in storage.sizes(folder):
            if _ours(name):
                storage.remove(f"{folder}/{name}")
        storage.remove_folder(folder)
    for path in plan.leftovers:
        storage.remove(path)
    for folder in sorted({path.rsplit("/", 1)[0] for path in plan.leftovers}):
        storage.remove_folder(folder)


def _ours(name: str) -> bool:
    """Whether a file in a step folder was written by this library, the manifest aside."""
    return name == INDEX or bool(FILE_NAME.fullmatch(name)) or name.startswith((*_TEMPORARY, "verified-", "damaged-"))


def _leftovers(storage: Storage, everything: list[Found], grace: float) -> tuple[str, ...]:
    used = {(file.step, file.name) for f in everything if f.manifest for file in f.manifest.files}
    times = {found.step: storage.modified(step_folder(found.step)) for found in everything}
    newest = max((when for folder in times.values() for when in folder.values()), default=0.0)
    now = min(newest, time.time())  # a file from the future, of a clock that has jumped, makes no other one old
    paths: list[str] = []
    for found in everything:
        if MANIFEST in found.sizes and not found.complete:
            continue
        saves: dict[str, list[str]] = {}
        for name in found.sizes:
            match = FILE_NAME.fullmatch(name)
            unused = match and (found.step, name) not in used
            if unused or name.startswith(_TEMPORARY) or (name == INDEX and MANIFEST not in found.sizes):
                saves.setdefault(match[1] if match else name, []).append(name)
        for names in saves.values():
            if all(now - times[found.step].get(name, now) > grace for name in names):
                paths += [f"{step_folder(found.step)}/{name}" for name in sorted(names)]
    return tuple(paths)
