"""The state of an optimizer: a mapping from parameter to a dict, which reading never fills."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any, Self, cast

from .watched import Watch, Watched, settled

#: Marks that a user sets on a parameter by `opt.state[p] = {...}`; they are no training state.
FLAGS = frozenset({"force_train", "do_wd"})


class ParamState(defaultdict[Any, Any]):
    """`state[p]` is the live dict of parameter `p`.

    Unlike a plain `defaultdict`, looking up a parameter without state leaves no entry behind: the dict that is handed
    out enters the mapping when it is written to. An optimizer with nothing but the marks `force_train` and `do_wd` in
    its state is false in a condition, because PyTorch's checkpoint helpers ask `if optim.state:` for training state.

    The dicts that are handed out are watched: `changes` counts what is written to them and to the mapping. Numbers
    that every step changes (`step`) may be deferred: they are written when an entry is read, not in every step.
    """

    def __init__(self, entries: Mapping[Any, dict[str, Any]] | Iterable[tuple[Any, dict[str, Any]]] = ()) -> None:
        super().__init__(dict)
        self._unborn: dict[Any, Entry] = {}
        #: Counts the changes of the entries and of which parameter has which.
        self.changes = 0
        self._deferred: dict[Any, Callable[[], None]] = {}
        #: Counts the reads of entries, and those of them after which nobody but the engine has what was read.
        self.reads = self.own_reads = 0
        self.update(entries)

    @classmethod
    def of(cls, entries: Iterable[tuple[Any, Mapping[str, Any]]]) -> Self:
        """A state with copies of `entries`."""
        state = cls()
        for p, entry in entries:
            state[p].update(entry)
        return state

    def defer(self, key: Any, write: Callable[[], None]) -> None:
        """Call `write` before an entry is read or written the next time, instead of what was deferred under `key`."""
        self._deferred[key] = write

    @property
    def handed_out(self) -> bool:
        """Whether somebody may hold a tensor of an entry, and could change where it lies without a trace here."""
        return self.reads != self.own_reads

    def settle(self) -> None:
        """Write what was deferred."""
        while self._deferred:
            self._deferred.popitem()[1]()

    def __missing__(self, param: Any) -> dict[str, Any]:
        return self._unborn.setdefault(param, Entry(self, param))

    def __setitem__(self, param: Any, entry: dict[str, Any]) -> None:
        super().__setitem__(param, entry)
        self._unborn.pop(param, None)
        self.changes += 1

    def __delitem__(self, param: Any) -> None:
        super().__delitem__(param)
        self.changes += 1

    def update(self, *args: Any, **kwargs: Any) -> None:
        super().update(*args, **kwargs)
        self.changes += 1

    def pop(self, *args: Any) -> Any:
        self.changes += 1
        return super().pop(*args)

    def popitem(self) -> tuple[Any, Any]:
        self.changes += 1
        return super().popitem()

    def clear(self) -> None:
        super().clear()
        self.changes += 1

    def __bool__(self) -> bool:
        return any(entry.keys() - FLAGS for entry in self.values())

    def copy(self) -> Self:
        """A new mapping with the same entries."""
        return type(self)(self)

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)._copied((deepcopy(p, memo), deepcopy(entry, memo)) for p, entry in self._all())

    def __reduce__(self) -> tuple[Any, ...]:
        return ParamState._copied, ([(p, dict(entry)) for p, entry in self._all()],)

    def _all(self) -> list[tuple[Any, dict[str, Any]]]:
        """The entries with anything in them, those that wait for `admit_marks` too."""
        return [(p, entry) for p, entry in (*self.items(), *self._unborn.items()) if entry]

    @classmethod
    def _copied(cls, entries: Iterable[tuple[Any, Mapping[str, Any]]]) -> Self:
        """A state with copies of `entries`, in which those with nothing but marks wait for `admit_marks`: torch's
        optimizers, which look through their states when they are copied, take every entry for training state."""
        state = cls()
        for p, entry in entries:
            if entry.keys() - FLAGS:
                state[p].update(entry)
            else:
                dict.update(state[p], entry)
        return state

    def admit_marks(self) -> None:
        """Let the marks of parameters without training state enter the mapping."""
        for p, entry in [(p, entry) for p, entry in self._unborn.items() if entry]:
            self[p] = entry


class Entry(Watched):
    """The state of one parameter. One that was only read is not in the mapping; it enters it when it is written to."""

    __slots__ = ("_param",)

    def __init__(self, owner: ParamState, param: Any) -> None:
        super().__init__(cast(Watch, owner))
        self._param = param

    @property
    def owner(self) -> ParamState:
        """The mapping."""
        return cast(ParamState, self.watch)

    def _before(self) -> None:
        self.owner.settle()

    def _after(self, key: str | None = None) -> None:
        owner = self.owner
        if self and self._param not in owner:
            owner[self._param] = self
        owner.changes += 1


def _before_reading(entry: Entry) -> None:
    owner = entry.owner
    owner.reads += 1
    owner.settle()


# Whatever reads a value; the iterator is among them because C code copies a dict with an iterator of its own this way.
for _name in (
    "__getitem__", "__iter__", "__eq__", "__ne__", "__or__", "__ror__", "__repr__", "get", "items", "values", "copy"
):  # fmt: skip
    setattr(Entry, _name, settled(getattr(dict, _name), _before_reading))


def warn_of_states_left(groups: Iterable[Mapping[str, Any]], state: Mapping[Any, Mapping[str, Any]]) -> None:
    """Say so where states and marks are of parameters that somebody has replaced by others in the groups."""
    members = {id(p) for group in groups for p in group["params"]}
    left = [entry for p, entry in state.items() if id(p) not in members]
    marked = sum(1 for entry in left if flags_of(entry))
    if left:
        warnings.warn(
            f"the state has entries of {len(left)} parameters that are in no group any more, {marked} with marks "
            f"(do_wd, force_train), which have no effect: others have replaced those parameters in the groups, as "
            f"Accelerate's prepare does with FSDP2. Set marks and load states after that",
            stacklevel=7,
        )


def flags_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The marks in the state of one parameter, without its training state."""
    return {key: value for key, value in entry.items() if key in FLAGS}
