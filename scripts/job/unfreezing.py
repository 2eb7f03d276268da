"""Which layer groups are frozen at which step: a pure function, so that a resumed run needs no memory of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import JobError


@dataclass(frozen=True)
class Unfreezing:
    """Freeze levels: groups below the level are frozen. `changes` holds (step, level), steps rising."""

    first: int
    changes: Sequence[tuple[int, int]] = ()

    def level(self, step: int) -> int:
        """The level while step `step` (counted from 0) is made."""
        level = self.first
        for start, then in self.changes:
            if step >= start:
                level = then
        return level


def parse_unfreezing(freeze_to: int, unfreeze: str, unfreeze_at: int | None, groups: int) -> Unfreezing:
    """The schedule that `--freeze-to`, `--unfreeze` and `--unfreeze-at` describe for a model of `groups` groups."""
    if unfreeze and unfreeze_at is not None:
        raise JobError("--unfreeze and --unfreeze-at say the same thing twice: pass one of them")
    text = f"{unfreeze_at}:0" if unfreeze_at is not None else unfreeze
    changes: list[tuple[int, int]] = []
    for part in filter(None, text.split(",")):
        try:
            step, level = (int(number) for number in part.split(":"))
        except ValueError:
            raise JobError(f"--unfreeze takes STEP:LEVEL pairs such as 100:1,200:0, got {part!r}") from None
        if step < 0 or (changes and step <= changes[-1][0]):
            raise JobError(f"--unfreeze needs rising steps from 0 on, got step {step} in {text!r}")
        changes.append((step, _level(level, groups, "--unfreeze")))
    return Unfreezing(_level(freeze_to, groups, "--freeze-to"), tuple(changes))


def _level(level: int, groups: int, flag: str) -> int:
    if not -groups <= level < groups:
        raise JobError(f"{flag} {level} leaves nothing to train or names no group: the model has {groups} groups")
    return level if level >= 0 else groups + level
