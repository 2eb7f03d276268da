"""What is under way in one round of reductions, and what a rank keeps of it. See [Note: rounds] in reduced.py."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..communication.collectives import Reading
from ..wires.header import Place
from ..wires.wire import Wire


class Round:
    """The reduction of one backward pass: which buckets take part, which gradients have come, what is under way.

    Attributes:
        to_launch: the wires that have not been launched, in order, each with the parameters that it waits for.
        waits_for: the same set of parameters, for each of them. What is frozen is not among them, though it may get a
            gradient, where somebody lets it require one.
        total: how many buckets there are.
    """

    def __init__(self, place: Place, wires: Sequence[Wire], expected: Sequence[set[int]], leading: list[int]) -> None:
        self.place = place
        self.to_launch = deque(zip(wires, expected, strict=True))
        self.leading = leading
        self.waits_for = {param: params for params in expected for param in params}
        self.total = len(wires)
        self.tasks: set[int] = set()
        self.reading: Reading | None = None
        self.may_step: bool | None = None

    @property
    def launched(self) -> int:
        """How many buckets have been launched."""
        return self.total - len(self.to_launch)

    @property
    def first(self) -> bool:
        """Whether nothing has been launched."""
        return self.launched == 0


class Part:
    """This rank's part of the gradient of one bucket, with the flags of its header.

    Args:
        wire: of the bucket.
        rank: this one.
        sums: over the ranks.
        total: the number of ranks that the sums are averaged over; 1 when they have been.
    """

    def __init__(self, wire: Wire, rank: int, sums: Tensor, total: int) -> None:
        self.wire = wire
        self.sums = sums
        self.payload = wire.payloads[rank]
        self.total = total
        self._factors: list[Tensor] = []
        self._views: dict[int, Tensor] | None = None
        self._runs = wire.parts[rank]

    def scale(self, by: Tensor) -> None:
        """Multiply with a 0-d tensor, when it is needed."""
        self._factors.append(by)

    def ready(self) -> Tensor:
        """The average, with all that it was to be multiplied with, without the header."""
        found = self.sums[: self.payload]
        average([self])
        for factor in self._factors:
            found.mul_(factor.to(found.device))
        self._factors.clear()
        return found

    @property
    def views(self) -> dict[int, Tensor]:
        """The elements of each parameter of the wire."""
        if self._views is None:
            views = self.sums[: self.payload].split_with_sizes([run.count for run in self._runs])
            self._views = dict.fromkeys(self.wire.params, self.sums[:0])
            for run, view in zip(self._runs, views, strict=True):
                if run.param is not None:
                    self._views[run.param] = view
        return self._views

    def flags(self) -> Tensor:
        """For each parameter of the wire how many gradients have come, of all ranks and rounds."""
        return self.sums[self.payload : self.payload + len(self.wire.params)]

    def add(self, earlier: Part) -> None:
        """Add the part of an earlier round, which may have had other active parameters."""
        self.ready()
        earlier.ready()
        if earlier.wire is self.wire:
            # Not the rest of the header, which may be on its way to the host.
            told = self.payload + len(self.wire.params)
            self.sums[:told].add_(earlier.sums[:told])
            return
        before = earlier.flags()
        at = {param: k for k, param in enumerate(earlier.wire.params)}
        for k, param in enumerate(self.wire.params):
            if param in at:
                self.views[param].add_(earlier.views[param])
                self.flags()[k].add_(before[at[param]])


def average(parts: Iterable[Part]) -> None:
    """Divide what has not been divided, in one launch."""
    due = [part for part in parts if part.total > 1]
    if due:
        torch._foreach_div_([part.sums[: part.payload] for part in due], due[0].total)
    for part in due:
        part.total = 1


def numbers_beside(like: Tensor, numbers: list[int], size: int) -> Tensor:
    """`numbers` and zeros, `[size]`, beside `like`, without a wait."""
    host = torch.zeros(size, dtype=like.dtype, pin_memory=like.is_cuda)
    host[: len(numbers)] = torch.tensor(numbers, dtype=like.dtype)
    return host.to(like.device, non_blocking=True)


def inside_another_backward() -> bool:
    """Whether the backward pass that is running was started by the backward of a function in another one."""
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        if frame.f_code.co_name == "apply" and frame.f_globals.get("__name__") == "torch.autograd.function":
            return True
    return False
