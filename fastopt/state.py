"""The state of an optimizer: a mapping from parameter to a dict, which reading never fills."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any, Self

#: Marks that a user sets on a parameter by `opt.state[p] = {...}`; they are no training state.
FLAGS = frozenset({"force_train", "do_wd"})


class _Unborn(dict[str, Any]):
    """What reading `state[p]` of a parameter without state gives: an empty dict that enters `state` when written to."""

    __slots__ = ("_owner", "_param")

    def __init__(self, owner: ParamState, param: Any) -> None:
        super().__init__()
        self._owner, self._param = owner, param

    def _enter(self) -> None:
        if self._param not in self._owner:
            self._owner[self._param] = self

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self._enter()

    def update(self, *args: Any, **kwargs: Any) -> None:
        super().update(*args, **kwargs)
        if self:
            self._enter()

    def __ior__(self, other: Any) -> Self:  # type: ignore[override,misc]
        self.update(other)
        return self

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return {key: deepcopy(value, memo) for key, value in self.items()}


class ParamState(defaultdict[Any, Any]):
    """`state[p]` is the live dict of parameter `p`.

    Unlike a plain `defaultdict`, looking up a parameter without state leaves no entry behind: the dict that is handed
    out enters the mapping when it is written to. An optimizer with nothing but the marks `force_train` and `do_wd` in
    its state is false in a condition, because PyTorch's checkpoint helpers ask `if optim.state:` for training state.
    """

    def __init__(self, entries: Mapping[Any, dict[str, Any]] | Iterable[tuple[Any, dict[str, Any]]] = ()) -> None:
        super().__init__(dict)
        self._unborn: dict[Any, _Unborn] = {}
        #: Counts the changes of which parameter has which dict; changes inside a dict do not count.
        self.version = 0
        self.update(entries)

    def __missing__(self, param: Any) -> dict[str, Any]:
        return self._unborn.setdefault(param, _Unborn(self, param))

    def __setitem__(self, param: Any, entry: dict[str, Any]) -> None:
        super().__setitem__(param, entry)
        if self._unborn.pop(param, None) is not entry:
            self.version += 1

    def __delitem__(self, param: Any) -> None:
        super().__delitem__(param)
        self.version += 1

    def update(self, *args: Any, **kwargs: Any) -> None:
        super().update(*args, **kwargs)
        self.version += 1

    def pop(self, *args: Any) -> Any:
        self.version += 1
        return super().pop(*args)

    def popitem(self) -> tuple[Any, Any]:
        self.version += 1
        return super().popitem()

    def clear(self) -> None:
        super().clear()
        self.version += 1

    def __bool__(self) -> bool:
        return any(entry.keys() - FLAGS for entry in self.values())

    def copy(self) -> Self:
        """A new mapping with the same entries."""
        return type(self)(self)

    __copy__ = copy

    def __reduce__(self) -> tuple[Any, ...]:
        return ParamState, (), None, None, iter([(p, entry) for p, entry in self.items() if entry])


def flags_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The marks in the state of one parameter, without its training state."""
    return {key: value for key, value in entry.items() if key in FLAGS}
