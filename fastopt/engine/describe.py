"""What a callback says about itself, also when wrapped in `functools.partial`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any, Literal, get_args

Needs = Literal["elementwise", "norm", "whole"]
_ORDER: tuple[Needs, ...] = get_args(Needs)


def attribute(cb: Callable[..., Any], name: str, default: Any) -> Any:
    """Attribute `name` of a cb or of the function inside its partials."""
    while True:
        found = getattr(cb, name, None)
        if found is not None:
            return found
        if not isinstance(cb, partial):
            return default
        cb = cb.func


def cb_name(cb: Callable[..., Any]) -> str:
    """A name to print: the function's own, or the type of a callable object."""
    return str(attribute(cb, "__name__", type(cb).__name__))


def keywords(cb: Callable[..., Any]) -> dict[str, bool]:
    """The arguments after the parameter that `cb` names, and whether it cannot do without them."""
    return _keywords(cb) if getattr(type(cb), "__hash__", None) else _keywords.__wrapped__(cb)


@lru_cache(maxsize=1024)
def _keywords(cb: Callable[..., Any]) -> dict[str, bool]:
    try:
        arguments = list(inspect.signature(cb).parameters.values())[1:]
    except (TypeError, ValueError):  # a builtin without a signature
        return {}
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {q.name: q.default is q.empty for q in arguments if q.kind in kinds}


def required(cb: Callable[..., Any]) -> tuple[str, ...]:
    """The arguments that `cb` cannot do without."""
    return tuple(name for name, needed in keywords(cb).items() if needed)


@lru_cache(maxsize=1024)
def _takes_more(cb: Callable[..., Any]) -> bool:
    return any(q.kind is q.VAR_KEYWORD for q in inspect.signature(cb).parameters.values())


def not_taken(cb: Callable[..., Any], given: Iterable[str]) -> list[str]:
    """Those of the names `given` that `cb` has no argument for, having no `**kwargs` either."""
    try:
        more = _takes_more(cb)
    except (TypeError, ValueError):  # not hashable, or a builtin without a signature
        return []
    return [] if more else [name for name in given if name not in keywords(cb)]


def needs_of(cb: Callable[..., Any]) -> Needs:
    """What a cb must see of a sharded parameter; `whole` if it does not say."""
    needs = attribute(cb, "needs", "whole")
    if needs not in _ORDER:
        raise ValueError(f"{cb_name(cb)}.needs is {needs!r}, expected one of {', '.join(map(repr, _ORDER))}")
    return needs  # type: ignore[no-any-return]


def undeclared(cbs: Iterable[Callable[..., Any]]) -> list[str]:
    """The names of the cbs that do not say what they need."""
    return [cb_name(cb) for cb in cbs if attribute(cb, "needs", None) is None]


def larger(a: Needs, b: Needs) -> Needs:
    """The larger of two needs."""
    return max(a, b, key=_ORDER.index)


def chain_needs(cbs: Iterable[Callable[..., Any]]) -> Needs:
    """The largest need along a chain, where a cb that does not say needs whole parameters."""
    return max((needs_of(cb) for cb in cbs), key=_ORDER.index, default="elementwise")


def chain_defaults(cbs: Iterable[Callable[..., Any]]) -> dict[str, Any]:
    """The hyper-parameters that a chain brings, a later cb's value winning; arguments bound by a partial are none."""
    hypers: dict[str, Any] = {}
    for cb in cbs:
        bound = cb.keywords if isinstance(cb, partial) else {}
        hypers.update({k: v for k, v in attribute(cb, "defaults", {}).items() if k not in bound})
    return hypers
