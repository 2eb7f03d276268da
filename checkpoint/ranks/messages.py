"""Python values between the ranks of a group that moves CPU memory: in one collective if they are small.

torch's own functions for objects always make two, one for the lengths and one for the rest. A training loop waits for
these messages, and most of them are a few bytes: so the first collective has room for them beside the lengths.
They are pickled, as by torch: they come from processes of the same job and are never written to a file.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

SLOT = 4096
"""Bytes of the first message of each rank: the length, and what is not longer than the rest."""

_LENGTH = 8
_ROOM = SLOT - _LENGTH


def from_all(thing: Any, group: dist.ProcessGroup) -> list[Any]:
    """The `thing` of each rank, in their order. Collective."""
    data = pickle.dumps(thing)
    messages = _everyones(_message(data, SLOT), group)
    longest = _longest(messages)
    if longest > _ROOM:
        messages = _everyones(_message(data, _LENGTH + longest), group)
    return [_thing(message) for message in messages]


def to_first(thing: Any, group: dist.ProcessGroup) -> list[Any] | None:
    """The `thing` of each rank on the first one, None on the others. Collective.

    What is not small goes to nobody else.
    """
    data = pickle.dumps(thing)
    messages = _everyones(_message(data, SLOT), group)
    first = group.rank() == 0
    longest = _longest(messages)
    if longest > _ROOM:
        messages = _empty(group.size() if first else 0, _LENGTH + longest)
        group.gather([messages] if first else [], [_message(data, _LENGTH + longest)], dist.GatherOptions()).wait()
    return [_thing(message) for message in messages] if first else None


def from_first(thing: Any, group: dist.ProcessGroup) -> Any:
    """The `thing` of the first rank, on all. Collective."""
    first = group.rank() == 0
    data = pickle.dumps(thing) if first else b""
    message = _message(data, SLOT)
    group.broadcast([message], dist.BroadcastOptions()).wait()
    longest = _longest([message])
    if longest > _ROOM:
        message = _message(data, _LENGTH + longest)
        group.broadcast([message], dist.BroadcastOptions()).wait()
    return thing if first else _thing(message)


def _message(data: bytes, size: int) -> Tensor:
    """The length of `data`, and `data` if there is room for it in `size` bytes."""
    message = np.zeros(size, dtype=np.uint8)
    message[:_LENGTH].view(np.int64)[0] = len(data)
    if len(data) <= size - _LENGTH:
        message[_LENGTH : _LENGTH + len(data)] = np.frombuffer(data, dtype=np.uint8)
    return torch.from_numpy(message)


def _thing(message: Tensor) -> Any:
    length = _longest([message])
    return pickle.loads(message.numpy()[_LENGTH : _LENGTH + length].data)


def _longest(messages: Sequence[Tensor]) -> int:
    """Bytes of the longest of what the messages are to tell."""
    return max(int(message[:_LENGTH].view(torch.int64)) for message in messages)


def _everyones(message: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """The messages of all ranks, all of them as long as this rank's."""
    messages = _empty(group.size(), message.numel())
    group.allgather([messages], [message]).wait()
    return messages


def _empty(size: int, nbytes: int) -> list[Tensor]:
    return [torch.empty(nbytes, dtype=torch.uint8, device="cpu") for _ in range(size)]
