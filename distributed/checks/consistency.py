"""Do the ranks agree? A difference becomes the same exception on all of them, before anything is changed.

[Note: agreement]
Collectives depend on what the ranks have *agreed* on: which parameters are active, that is, step if they have a
gradient. In stage 2 the agreement costs no collective of its own. Each round of reductions begins with a collective
whose shape follows from what was agreed on last, and whose header (header.py) says where each rank is and has digests
of what is active now and of the hypers.

  - All in a backward pass, all digests alike: this is what every step of an ordinary training is.
  - A rank on which another set is active now than was agreed on sends an empty bucket in the old shape, and waits for
    the headers. If all ranks have changed to the same set, it is agreed on, and they begin anew. If some have not, it
    takes part in their round, and all ranks raise the same `RanksDiffer`.
  - A rank that steps (or clips) without having made a round makes one, empty where it has no gradient. If it finds
    others in a backward pass, all of them exchange a *message* of its own before whatever they do next, until all are
    at the same place: a rank may have made no backward pass where others have made several.
  - Hypers that differ are a matter of the step, and raise there. Those that were changed between the round and the step
    are told with the next round, and raise at the next step, which names the one before. From then on all ranks know
    that hypers are set late, and each step begins with a message, until there have been `LATE` steps without.

In stage 1 there is no reduction that could carry this: each step, and each clipping, exchanges one message. A message
is the digest of what must be equal, and a byte per thing to be told (which gradients there are, say). Only if the
digests differ do the ranks exchange *reports*, the same in words, and every rank raises the same exception.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch

from ..communication.collectives import Ranks

DIGEST_BYTES = 16
BOTH_WAYS = 2 * DIGEST_BYTES

SHOWN = 12
"""Differences in one message."""

Report = Mapping[str, Any]


class RanksDiffer(RuntimeError):
    """The ranks disagree on something that must be equal; raised on all of them, with the subject, values and ranks."""


def agree(ranks: Ranks, facts: Any, told: Sequence[int], report: Callable[[], Report]) -> list[int]:
    """Check that `facts` are equal on all ranks, and give the largest of what each tells. One small collective.

    Args:
        ranks: who takes part.
        facts: what must be equal; compared by its `repr`.
        told: numbers from 0 to 255, as many on every rank.
        report: makes the facts readable, subject to value; called only if they differ.

    Raises:
        RanksDiffer: on all ranks, with the subjects, values and ranks that differ.
    """
    if ranks.alone:
        return list(told)
    message = torch.tensor([*both_ways(facts), *told], dtype=torch.uint8)
    heard: list[int] = ranks.largest_bytes(message).tolist()
    if not equal_everywhere(heard[:BOTH_WAYS]):
        disagree(ranks, report())
    return heard[BOTH_WAYS:]


def both_ways(facts: Any) -> list[int]:
    """The digest of `facts` and its complement, `BOTH_WAYS` numbers to be told."""
    told = digest(facts)
    return [*told, *(255 - b for b in told)]


def equal_everywhere(largest: Sequence[int]) -> bool:
    """Whether all ranks told the same digest: the largest complement is the complement of the smallest digest."""
    half = len(largest) // 2
    return all(a == 255 - b for a, b in zip(largest[:half], largest[half:], strict=True))


def disagree(ranks: Ranks, report: Report) -> NoReturn:
    """Raise what differs between the reports of the ranks, all of which must call this."""
    compare(ranks.gather_everywhere(dict(report)))


def agree_fully(ranks: Ranks, report: Report) -> None:
    """As `agree`, for set-up, where nothing is known of the other ranks yet: reports may differ in length."""
    if not ranks.alone and len(set(ranks.gather_everywhere(digest(list(report.items()))))) > 1:
        disagree(ranks, report)


def digest(facts: Any) -> bytes:
    """`DIGEST_BYTES` that are the same on two ranks if `facts` are (bytes, or anything by its `repr`)."""
    data = facts if isinstance(facts, bytes) else repr(facts).encode()
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def compare(reports: Sequence[Report], numbers: Sequence[int] | None = None, advice: str = "") -> NoReturn:
    """Raise `RanksDiffer` with the differences between the ranks' reports, and `advice` at its end.

    `numbers` are those of the ranks, from 0 without.

    If a rank reports a problem, it is that which has to be mended: the rest is left out. A problem that all ranks have
    alike is no difference: a RuntimeError.
    """
    subjects = list(dict.fromkeys(subject for report in reports for subject in report))
    if "problem" in subjects:
        subjects = ["problem"]
        problems = {report.get("problem") for report in reports}
        if len(problems) == 1:
            raise RuntimeError(*problems)
    lines = []
    for subject in subjects:
        values: dict[str, list[int]] = {}
        for rank, report in zip(numbers or range(len(reports)), reports, strict=True):
            values.setdefault(_shown(report[subject]) if subject in report else "nothing", []).append(rank)
        if len(values) > 1:
            told = "; ".join(f"{value} on {_name_ranks(where)}" for value, where in values.items())
            lines.append(f"{subject}: {told}")
    more = [f"and {len(lines) - SHOWN} more differences"] if len(lines) > SHOWN else []
    told = "the ranks disagree\n  " + "\n  ".join(lines[:SHOWN] + more)
    raise RanksDiffer(f"{told}\n{advice}" if advice else told)


def _shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 300 else text[:300] + "..."


def _name_ranks(where: Sequence[int]) -> str:
    """`rank 3`, `ranks 0, 1`; many are cut short."""
    if len(where) == 1:
        return f"rank {where[0]}"
    return f"ranks {', '.join(map(str, where[:8]))}" + (f" and {len(where) - 8} more" if len(where) > 8 else "")
