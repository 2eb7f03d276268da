"""Dicts that count their changes, so that a step can tell quickly that nothing has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, Self


class Watch:
    """Counts the changes of all dicts that belong to it.

    Attributes:
        changes: how many there have been.
        written: name of an entry to the number of the last change that set it; a change of another sort is under None.
    """

    def __init__(self) -> None:
        self.changes = 0
        self.written: dict[str | None, int] = {}

    def written_since(self, changes: int) -> list[str | None]:
        """The names of the entries that were set after the first `changes` changes, None for changes of other sorts."""
        return [name for name, number in self.written.items() if number > changes]


class Watched(dict[str, Any]):
    """A dict that counts every change of its entries in `watch`. Copies of it are plain dicts."""

    __slots__ = ("watch",)

    def __init__(self, watch: Watch, entries: Any = ()) -> None:
        super().__init__(entries)
        self.watch = watch

    def _before(self) -> None:
        """Called before anything changes."""

    def _after(self, key: str | None = None) -> None:
        """Called after a change; `key` is the entry that was set, if it was that."""
        watch = self.watch
        watch.changes += 1
        watch.written[key] = watch.changes

    def __setitem__(self, key: str, value: Any) -> None:
        self._before()
        super().__setitem__(key, value)
        self._after(key)

    def __delitem__(self, key: str) -> None:
        self._before()
        super().__delitem__(key)
        self._after()

    def update(self, *args: Any, **kwargs: Any) -> None:
        self._before()
        super().update(*args, **kwargs)
        self._after()

    def __ior__(self, other: Any) -> Self:  # type: ignore[override,misc]
        self.update(other)
        return self

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, *args: Any) -> Any:
        self._before()
        value = super().pop(*args)
        self._after()
        return value

    def popitem(self) -> tuple[str, Any]:
        self._before()
        item = super().popitem()
        self._after()
        return item

    def clear(self) -> None:
        self._before()
        super().clear()
        self._after()

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return {key: deepcopy(value, memo) for key, value in self.items()}


def watch_of(dicts: Sequence[Any], kind: type[Watched] = Watched) -> Watch | None:
    """The watch that counts the changes of all `dicts`, None if there is no such one."""
    if not dicts or not all(type(each) is kind for each in dicts):
        return None
    watch: Watch = dicts[0].watch
    return watch if all(each.watch is watch for each in dicts) else None


def settled(method: Callable[..., Any], before: Callable[[Any], None]) -> Callable[..., Any]:
    """`method` of a dict, with `before(self)` called first."""

    def call(self: Any, *args: Any) -> Any:
        before(self)
        return method(self, *args)

    call.__name__, call.__doc__ = method.__name__, method.__doc__
    return call
