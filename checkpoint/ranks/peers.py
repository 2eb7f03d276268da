"""The processes that save or load together, and the rule by which none of them is left waiting.

See [Note: nobody waits].
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

from ..errors import CheckpointError
from .messages import from_all, from_first, to_first

# [Note: nobody waits]
# Every rank enters the same collectives in the same order, whatever goes wrong locally. So everything that can fail
# runs inside `agree` (or `on_first`): its exception is caught, travels with the results, and every rank raises the same
# CheckpointError naming the rank and the cause. Between two collectives nothing may raise.

T = TypeVar("T")
_cpu_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_PATIENCE = timedelta(minutes=30)
_made: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


class LostContact(CheckpointError):
    """A collective itself failed: what the other ranks did is not known."""


class Peers:
    """A process group, or this process alone. `rank` and `size` count within the group."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._base: dist.ProcessGroup | None = None
        self._group: Any = None
        self.rank, self.size = 0, 1
        if not (dist.is_available() and dist.is_initialized()):
            return
        chosen = group if group is not None else dist.group.WORLD
        if dist.get_rank(chosen) < 0:
            raise CheckpointError("this process is not a member of the group that it saves or loads with")
        self.rank, self.size = dist.get_rank(chosen), dist.get_world_size(chosen)
        self._base, self._group = chosen, _cpu_group(chosen)

    def apart(self) -> Peers:
        """The same processes with a Gloo group of their own, for collectives in another thread. Collective.

        The group lives as long as the answer does.
        """
        other = object.__new__(Peers)
        other.rank, other.size, other._base, other._group = self.rank, self.size, self._base, None
        if self._base is not None:
            other._group = _gloo_group(self._base)
        return other

    def agree(self, doing: str, work: Callable[[], T]) -> list[T]:
        """The results of `work` of all ranks; CheckpointError on every rank where it failed on any. Collective."""
        own, caught = _attempt(work)
        if self._group is None:
            if caught is not None:
                raise (
                    caught if isinstance(caught, CheckpointError) else CheckpointError(_text(doing, caught))
                ) from caught
            return [cast(T, own)]
        group, record = self._group, (own, None if caught is None else _text(doing, caught))
        results = self._collective(doing, lambda: from_all(record, group))
        self._raise([error for _, error in results], caught)
        return [result for result, _ in results]

    def to_first(self, doing: str, work: Callable[[], T], then: Callable[[list[T]], Any]) -> Any:
        """Run `work` on every rank, give the results of all to `then` on rank 0, and its result to every rank.

        A failure of any of them is a CheckpointError on every rank. Collective.
        """
        if self._group is None:
            return self.agree(doing, lambda: then([work()]))[0]
        own, caught = _attempt(work)
        group, record = self._group, (own, None if caught is None else _text(doing, caught))
        records = self._collective(doing, lambda: to_first(record, group))
        outcome = None
        if records is not None:
            errors = [error for _, error in records]
            answer, at_first = None, None
            if not any(errors):
                answer, at_first = _attempt(lambda: then([result for result, _ in records]))
                errors[0] = None if at_first is None else _text(doing, at_first)
                caught = caught or at_first
            outcome = (answer, errors)
        answer, errors = self._collective(doing, lambda: from_first(outcome, group))
        self._raise(errors, caught)
        return answer

    def on_first(self, doing: str, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and give its result to every rank, or its failure. Collective."""
        if self._group is None:
            return self.agree(doing, work)[0]
        own, caught = _attempt(work) if self.rank == 0 else (None, None)
        group, outcome = self._group, (own, None if caught is None else _text(doing, caught))
        answer, error = self._collective(doing, lambda: from_first(outcome, group))
        self._raise([error, *[None] * (self.size - 1)], caught)
        return cast(T, answer)

    def _collective(self, doing: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            raise LostContact(
                f"rank {self.rank} lost touch with the others while {doing} (every rank must call this; has one died, "
                f"or is it stuck?): {error}"
            ) from error

    def _raise(self, errors: list[str | None], own: Exception | None) -> None:
        failed = [(rank, error) for rank, error in enumerate(errors) if error is not None]
        if not failed:
            return
        texts = list(dict.fromkeys(error for _, error in failed))
        if len(texts) == 1 and len(failed) == self.size:
            raise CheckpointError(texts[0]) from own
        shown = "\n".join(f"rank {rank}: {error}" for rank, error in failed[:8])
        more = f"\n(and {len(failed) - 8} more ranks)" if len(failed) > 8 else ""
        raise CheckpointError(shown + more) from own


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _text(doing: str, error: Exception) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{type(error).__name__} while {doing}: {error}"


def _cpu_group(group: Any) -> Any:
    """`group` if it moves CPU data, else a Gloo group of the same ranks, made once. Collective the first time."""
    if "cpu:" in dist.get_backend_config(group):
        return group
    if group not in _cpu_groups:
        _cpu_groups[group] = _gloo_group(group)
    return _cpu_groups[group]


def _gloo_group(group: Any) -> Any:
    """A new Gloo group of the ranks of `group`, which alone make it. Collective.

    Not by `dist.new_group`: it waits for ranks that are no members, or else finds the others by the number of groups
    that a rank has, which need not be the same on all of them; and it keeps each group until the very end.
    """
    number = _made[group] = _made.get(group, 0) + 1
    default = dist.distributed_c10d._get_default_store()
    store = dist.distributed_c10d.PrefixStore(f"fastopt.checkpoint/{group.group_name}/{number}", default)
    return dist.ProcessGroupGloo(store, group.rank(), group.size(), _PATIENCE)
