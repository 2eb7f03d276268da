"""What the ranks tell each other along with their gradients: a few numbers, each 0 or 1, at the end of every part.

They are summed like gradients, so a rank learns of each number whether *any* rank has sent 1; that is exact in every
dtype. A digest is sent bit by bit, each bit beside its complement: the ranks agree on a bit if not both have been sent.

Every header has a flag for each parameter of the bucket, whether the rank has a gradient of it. The first one of a
round also says where the rank is, what it steps, and with which hypers (see [Note: agreement] in consistency.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Place = Literal["backward", "unscale_", "clip_grad_norm_", "step"]
PLACES: tuple[Place, ...] = get_args(Place)

BITS = 32
"""Of each digest."""

FLAGS = 5
EXTRA = len(PLACES) + FLAGS + 2 * 2 * BITS
"""Numbers of the first header of a round beside the flags."""


@dataclass(frozen=True)
class Verdict:
    """What the first headers of all ranks say together.

    Attributes:
        places: where there are ranks.
        changed, unchanged: whether there are ranks whose activity is another one, or the same, as last agreed on.
        problem: whether any rank has one.
        late: whether any rank has stepped with hypers that were set after the header of their round had told others.
        loaded: whether any rank has loaded parameters or states since its last header.
        same_activity, same_hypers: whether all ranks sent the same digest.
    """

    places: frozenset[Place]
    changed: bool
    unchanged: bool
    problem: bool
    late: bool
    loaded: bool
    same_activity: bool
    same_hypers: bool


def encode(
    place: Place,
    changed: bool,
    problem: bool,
    activity: bytes,
    hypers: bytes,
    late: bool = False,
    loaded: bool = False,
) -> list[int]:
    """The `EXTRA` numbers that a rank sends; digests have at least `BITS` bits, the first of which are sent."""
    at = [int(place == each) for each in PLACES]
    flags = map(int, (changed, not changed, problem, late, loaded))
    return [*at, *flags, *_bits(activity), *_bits(hypers)]


def decode(sums: Sequence[float]) -> Verdict:
    """What the sums of `EXTRA` numbers over the ranks mean."""
    told = [value > 0 for value in sums]
    n = len(PLACES)
    return Verdict(
        places=frozenset(place for place, there in zip(PLACES, told[:n], strict=True) if there),
        changed=told[n],
        unchanged=told[n + 1],
        problem=told[n + 2],
        late=told[n + 3],
        loaded=told[n + 4],
        same_activity=_agreed(told[n + FLAGS :][: 2 * BITS]),
        same_hypers=_agreed(told[n + FLAGS + 2 * BITS :][: 2 * BITS]),
    )


def _bits(digest: bytes) -> list[int]:
    number = int.from_bytes(digest[: BITS // 8], "big")
    ones = [number >> i & 1 for i in range(BITS)]
    return ones + [1 - one for one in ones]


def _agreed(told: Sequence[bool]) -> bool:
    return not any(one and zero for one, zero in zip(told[:BITS], told[BITS:], strict=True))
