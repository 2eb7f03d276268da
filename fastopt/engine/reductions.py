"""Norms of whole parameters, also where a process holds only a slice.

A cb calls `whole_norm` or `whole_rms`. In one process they are plain reductions. In a sharded step the engine runs such
cbs inside `across_processes`: it calls the cb for every parameter; the first reduction whose total is not known yet
notes its partial sum and leaves the cb, all partial sums are added up over the processes in one collective, and the cb
is called again with the totals. A cb must therefore ask for norms before it changes anything, which is checked nowhere
but true of `larc_layer_lr` and `lamb_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from .recording.methods import recorded_norm
from .recording.recorder import RecordedTensor
from .work import Reduce

# Per thread: two threads may train two models.
_answers: ContextVar[_Answers | None] = ContextVar("answers", default=None)


class _Pending(Exception):
    """Leaves a cb that asked for a total which is not known yet."""


class _Answers:
    """The totals of the reductions of one call of a cb, in the order it asks for them."""

    def __init__(self) -> None:
        self.totals: list[Tensor] = []
        self.partial: Tensor | None = None
        self.asked = 0

    def total(self, partial: Tensor) -> Tensor:
        """The sum over processes of `partial` `[n]`, or `_Pending` after noting it."""
        self.asked += 1
        if self.asked <= len(self.totals):
            return self.totals[self.asked - 1]
        self.partial = partial
        raise _Pending


def whole_norm(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The L2 norm of each parameter-shaped tensor over the whole parameter, as 0-d tensors (at least float32)."""
    if isinstance(tensors[0], RecordedTensor):
        return _recorded(tensors, mean=False)
    answers = _answers.get()
    if answers is None:
        return tuple(_local_norm(x) for x in tensors)
    total = answers.total(torch.stack([_local_norm(x).double().square() for x in tensors]))
    return tuple(t.to(_accumulation_dtype(x)) for x, t in zip(tensors, total.sqrt(), strict=True))


def whole_rms(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The root mean square of each parameter-shaped tensor over the whole parameter, as 0-d tensors."""
    if isinstance(tensors[0], RecordedTensor):
        return _recorded(tensors, mean=True)
    answers = _answers.get()
    if answers is None:
        return tuple(_local_norm(x) / max(x.numel(), 1) ** 0.5 for x in tensors)
    sums = [_local_norm(x).double().square() for x in tensors]
    count = torch.tensor(float(tensors[0].numel()), dtype=torch.float64, device=tensors[0].device)
    *totals, n = answers.total(torch.stack([*sums, count]))
    return tuple((t / n.clamp(min=1)).sqrt().to(_accumulation_dtype(x)) for x, t in zip(tensors, totals, strict=True))


def _recorded(tensors: Sequence[Tensor], mean: bool) -> tuple[Tensor, ...]:
    return tuple(recorded_norm(x, mean) for x in tensors if isinstance(x, RecordedTensor))


def _local_norm(x: Tensor) -> Tensor:
    """L2 norm of the tensor at hand; of the whole tensor if it is a DTensor."""
    norm = torch.linalg.vector_norm(x, dtype=_accumulation_dtype(x))
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@contextmanager
def _answering(answers: _Answers) -> Iterator[None]:
    answers.asked, answers.partial = 0, None
    token = _answers.set(answers)
    try:
        yield
    finally:
        _answers.reset(token)


def across_processes(calls: Sequence[Callable[[], None]], reduce: Reduce) -> None:
    """Make every call, whose reductions are then totals over all processes. One `reduce` per round of all calls."""
    waiting = [(call, _Answers()) for call in calls]
    while waiting:
        pending = []
        for call, answers in waiting:
            with _answering(answers):
                try:
                    call()
                except _Pending:
                    pending.append((call, answers))
        _add_totals([answers for _, answers in pending], reduce)
        waiting = pending


def _add_totals(pending: list[_Answers], reduce: Reduce) -> None:
    """Sum the noted partial sums of all pending calls over the processes, in one collective per device."""
    partials = [answers.partial for answers in pending if answers.partial is not None]
    if not partials:
        return
    device = partials[0].device
    totals = reduce(torch.cat([p.to(device) for p in partials]))
    by_call = torch.tensor_split(totals, torch.tensor([p.numel() for p in partials]).cumsum(0)[:-1])
    for answers, partial, total in zip(pending, partials, by_call, strict=True):
        answers.totals.append(total.to(partial.device))
