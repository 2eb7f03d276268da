"""Checksums of tensors, made where they are: equal if, and hardly but if, all bits are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CHUNK = 2**22
"""Elements of which a checksum is made at a time."""

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For each tensor a text that depends on its dtype, its shape, and every bit of it; waits for each device once."""
    found: dict[str, str] = {}
    for device in dict.fromkeys(x.device for x in tensors.values()):
        here = {what: x for what, x in tensors.items() if x.device == device}
        numbers: list[int] = torch.stack([_checksum(x) for x in here.values()]).tolist()
        for (what, x), number in zip(here.items(), numbers, strict=True):
            found[what] = f"{number % 2**64:016x} of {x.dtype} {tuple(x.shape)}"
    return found


def _checksum(x: Tensor) -> Tensor:
    """The sum of all elements' bits, each times an odd number of its place, modulo 2**64."""
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    if not x.numel():
        return total
    words = x.contiguous().view(-1).view(_WORDS[x.element_size()])
    for start in range(0, words.numel(), CHUNK):
        chunk = words[start : start + CHUNK]
        # Odd, so that no change of one element cancels.
        factors = torch.arange(2 * start + 1, 2 * (start + chunk.numel()) + 1, 2, device=x.device)
        total += factors.mul_(chunk).sum()
    return total
