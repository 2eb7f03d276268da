"""What a cb reads beside its arguments: a recording is good only while that stays the same.

A recording is used for many steps, so whatever a cb takes from its module, its closure or its object must be known.
Functions, numbers and strings are noted with their values and compared in every step. A cb that reads something whose
contents can change unseen (a list, an object, a clock, random numbers), or that keeps something outside of its
arguments, is not recorded: it runs as it is.
"""

from __future__ import annotations

import builtins
import dis
import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NoReturn

import torch

from ..describe import cb_name
from .recorder import NotRecordable

_PURE_MODULES = frozenset({"math", "cmath", "operator", "_operator", "torch", "numpy", "typing", "builtins"})
_PURE_BUILTINS = frozenset(
    [
        "abs",
        "all",
        "any",
        "bool",
        "complex",
        "dict",
        "divmod",
        "enumerate",
        "float",
        "getattr",
        "hasattr",
        "int",
        "isinstance",
        "issubclass",
        "len",
        "list",
        "map",
        "max",
        "min",
        "pow",
        "range",
        "reversed",
        "round",
        "slice",
        "sorted",
        "str",
        "sum",
        "tuple",
        "zip",
    ]
)
#: Parts of names in modules that draw random numbers.
_RANDOM = (
    "rand", "bernoulli", "normal", "multinomial", "poisson", "dropout", "seed", "exponential", "geometric", "uniform",
    "cauchy", "gumbel", "rrelu", "distributions",
)  # fmt: skip
#: Methods of any object that do.
_DRAWS = frozenset(
    [
        "bernoulli",
        "bernoulli_",
        "cauchy_",
        "exponential_",
        "geometric_",
        "log_normal_",
        "multinomial",
        "normal_",
        "random_",
        "rsample",
        "sample",
        "uniform_",
    ]
)
_MISSING = object()

#: (mapping, key, value): `mapping[key]` must be `value`.
Read = tuple[Mapping[str, Any], str, Any]


def reads_of(cb: Callable[..., Any]) -> list[Read]:
    """What must stay the same for a recording of `cb` to be good.

    Raises:
        NotRecordable: the cb reads or keeps something else; the text says what.
    """
    reads: list[Read] = []
    _Scan(cb_name(cb), reads).callable(cb)
    return reads


def unchanged(reads: list[Read]) -> bool:
    """Whether everything that was read still has its value."""
    for mapping, key, value in reads:
        now = mapping.get(key, _MISSING)
        if now is not value and (type(now) is not type(value) or now != value or isinstance(value, types.FunctionType)):
            return False
    return True


class _Cells(Mapping[str, Any]):
    """The closure of a function as a mapping."""

    def __init__(self, function: types.FunctionType) -> None:
        self._cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))

    def __getitem__(self, name: str) -> Any:
        try:
            return self._cells[name].cell_contents
        except ValueError:  # not filled yet
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._cells)

    def __len__(self) -> int:
        return len(self._cells)


class _Body(Mapping[str, Any]):
    """What of a function can be exchanged while it stays the same object, as a reload in a notebook does."""

    def __init__(self, function: types.FunctionType) -> None:
        self._function = function

    def __getitem__(self, name: str) -> Any:
        return self._function.__code__, self._function.__defaults__, dict(self._function.__kwdefaults__ or {})

    def __iter__(self) -> Iterator[str]:
        return iter(["body"])

    def __len__(self) -> int:
        return 1


class _Scan:
    """Walks through the code of a cb and of the functions that it calls."""

    def __init__(self, name: str, reads: list[Read]) -> None:
        self.name, self.reads = name, reads
        self._seen: set[int] = set()

    def refuse(self, what: str) -> NoReturn:
        raise NotRecordable(f"{self.name}: {what}")

    def callable(self, cb: Any) -> None:
        if isinstance(cb, partial):
            self.callable(cb.func)
            for i, value in enumerate(cb.args):
                self.note({str(i): value}, str(i), value, f"argument {i} bound by a partial")
            for key, value in cb.keywords.items():
                self.note(cb.keywords, key, value, f"{key!r} bound by a partial")
        elif isinstance(cb, types.FunctionType):
            self.function(cb)
        elif isinstance(cb, types.MethodType) and isinstance(cb.__func__, types.FunctionType):
            self.function(cb.__func__, owner=cb.__self__)
        else:
            call: Any = getattr(type(cb), "__call__", None)  # noqa: B004 (its type is what counts)
            if isinstance(call, types.FunctionType):
                return self.function(call, owner=cb)
            self.refuse(f"is a {type(cb).__name__}, whose code cannot be read")

    def function(self, function: types.FunctionType, owner: Any = None) -> None:
        if id(function) in self._seen:
            return
        self._seen.add(id(function))
        if function.__module__ == "fastopt.engine.reductions":
            return
        if _root(function.__module__ or "") != "fastopt":
            body = _Body(function)
            self.reads.append((body, "body", body["body"]))
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            if not _constant(value):
                self.refuse(f"a default argument is a {type(value).__name__}, which can change unseen")
        code = function.__code__
        myself = code.co_varnames[0] if owner is not None and code.co_argcount else ""
        self.code(code, function.__globals__, _Cells(function), owner, myself)

    def code(
        self,
        code: types.CodeType,
        scope: dict[str, Any],
        cells: Mapping[str, Any],
        owner: Any,
        myself: str,
        hidden: frozenset[str] = frozenset(),
    ) -> None:
        """Walk through the code of a function, and of those in it.

        Args:
            code, scope, cells: of the function; a function within another has the cells of that.
            owner, myself: the object whose method it is, and the name of the argument that this is.
            hidden: names of variables of functions around it.
        """
        steps = [s for s in dis.get_instructions(code) if s.opname not in ("CACHE", "PRECALL", "PUSH_NULL")]
        for step in steps:
            if step.opname in ("STORE_ATTR", "DELETE_ATTR") and step.argval not in ("data", "grad"):
                self.refuse(f"sets the attribute {step.argval!r}")
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval in _DRAWS:
                self.refuse(f"{step.argval} draws random numbers")
        for i, step in enumerate(steps):
            path = [str(s.argval) for s in _attributes(steps[i + 1 :])]
            if step.opname == "LOAD_GLOBAL":
                self.global_read(scope, str(step.argval), path)
            elif step.opname == "LOAD_DEREF" and step.argval not in hidden:
                self.name_read(cells, str(step.argval), path)
            elif step.opname == "LOAD_BUILD_CLASS":
                self.refuse("defines a class")
            elif step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") or (
                step.opname in ("STORE_DEREF", "DELETE_DEREF")
                and step.argval in code.co_freevars
                and step.argval in cells
            ):
                self.refuse(f"keeps {step.argval!r} outside of its arguments")
            elif step.opname == "IMPORT_NAME" and str(step.argval).partition(".")[0] not in _PURE_MODULES:
                self.refuse(f"imports {step.argval}")
            elif owner is not None and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                self.attribute_read(owner, str(step.argval))
            if myself and ("LOAD_FAST" in step.opname or step.opname == "LOAD_DEREF"):
                self.object_read(owner, myself, step.argval, path)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                inside = hidden | {*code.co_varnames, *code.co_cellvars}
                self.code(constant, scope, cells, owner, myself, inside)

    def attribute_read(self, owner: Any, name: str) -> None:
        """An attribute of some object was read; if `owner` has one of that name, take it as read."""
        own = getattr(owner, "__dict__", {})
        if name in own:
            return self.note(own, name, own[name], f"self.{name}")
        home = next((cls for cls in type(owner).__mro__ if name in vars(cls)), None)
        if home is None or home is object:
            return None
        self.reads += [(own, name, _MISSING), (vars(home), name, vars(home)[name])]  # another may come to stand there
        found = getattr(type(owner), name, None)
        if isinstance(found, types.FunctionType):
            self.function(found, owner)
        elif isinstance(found, property) and isinstance(found.fget, types.FunctionType):
            self.function(found.fget, owner)
        else:
            self.note(vars(home), name, found, f"{home.__name__}.{name}")
        return None

    def object_read(self, owner: Any, myself: str, loaded: Any, path: list[str]) -> None:
        """Variables were loaded, by some steps two at once, and of the last one the attributes `path`.

        Of `owner`, the variable `myself`, only attributes may be read that can be found again.
        """
        *others, last = loaded if isinstance(loaded, tuple) else (loaded,)
        if myself in others or (last == myself and not path):
            self.refuse(f"hands {myself} on, whose attributes can change unseen")
        known = last != myself or path[0] in getattr(owner, "__dict__", {}) or hasattr(type(owner), path[0])
        if not known and hasattr(type(owner), "__getattr__"):
            self.refuse(f"reads {myself}.{path[0]}, which comes from a __getattr__")

    def global_read(self, scope: dict[str, Any], name: str, path: list[str]) -> None:
        """A global name was read, one of Python's own where the module has none."""
        if name in scope:
            return self.name_read(scope, name, path)
        if _root(scope.get("__name__", "")) != "fastopt":
            self.reads.append((scope, name, _MISSING))  # a cell of a notebook may define it later
        if name in vars(builtins):
            self.name_read(vars(builtins), name, path)
        return None

    def name_read(self, mapping: Mapping[str, Any], name: str, path: list[str]) -> None:
        """A global or closed-over name was read, and from what it is the attributes `path`."""
        value, shown = mapping.get(name, _MISSING), name
        if value is _MISSING:
            self.reads.append((mapping, name, _MISSING))
            return
        while isinstance(value, types.ModuleType) and path and hasattr(value, path[0]):
            if _root(value.__name__) in _PURE_MODULES:
                if _is_random(value.__name__, *path):
                    self.refuse(f"{'.'.join([shown, *path])} draws random numbers")
                return self.note(mapping, name, mapping[name], shown)
            self.reads.append((mapping, name, value))
            mapping, name, shown, path = vars(value), path[0], f"{shown}.{path[0]}", path[1:]
            value = mapping[name]
        self.note(mapping, name, value, shown)
        if isinstance(value, types.FunctionType) and path and path[0] in vars(value):
            self.note(vars(value), path[0], vars(value)[path[0]], f"{shown}.{path[0]}")

    def note(self, mapping: Mapping[str, Any], key: str, value: Any, shown: str) -> None:
        """Take over one value that the cb reads, or refuse it."""
        if isinstance(value, types.FunctionType):
            if _root(value.__module__ or "") not in _PURE_MODULES:
                self.function(value)
            elif _is_random(value.__module__, value.__name__):
                self.refuse(f"{shown} draws random numbers")
        elif isinstance(value, types.BuiltinFunctionType | type) or type(value).__name__ in (
            "ufunc",
            "_ArrayFunctionDispatcher",
        ):
            self.builtin(value, shown)
        elif isinstance(value, partial):
            self.callable(value)
        elif isinstance(value, types.ModuleType):
            if _root(value.__name__) not in _PURE_MODULES:
                self.refuse(f"uses the module {shown}")
        elif not _constant(value):
            self.refuse(f"reads {shown}, a {type(value).__name__}, which can change unseen; make it a hyper-parameter")
        self.reads.append((mapping, key, value))

    def builtin(self, value: Any, shown: str) -> None:
        owner = type(getattr(value, "__self__", None))
        home: str = getattr(value, "__module__", None) or owner.__module__
        name = getattr(value, "__name__", shown)
        if _is_random(home, name):
            self.refuse(f"{shown} draws random numbers")
        if home == "builtins":
            exception = isinstance(value, type) and issubclass(value, BaseException)
            if name not in _PURE_BUILTINS and not exception:
                self.refuse(f"calls {shown}")
        elif _root(home) not in _PURE_MODULES:
            self.refuse(f"calls {shown} of {home or 'an unknown module'}")


def _attributes(steps: list[dis.Instruction]) -> Iterator[dis.Instruction]:
    """The attribute look-ups at the beginning of `steps`."""
    for step in steps:
        if step.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            return
        yield step


def _is_random(*names: str) -> bool:
    """Whether the names of a module and of something in it tell of random numbers."""
    return any(word in name.lower() for name in names for word in _RANDOM)


def _root(module: str) -> str:
    return module.partition(".")[0]


def _constant(value: Any) -> bool:
    """Whether a value cannot change."""
    if isinstance(value, tuple | frozenset):
        return all(map(_constant, value))
    return value is None or isinstance(
        value, bool | int | float | complex | str | bytes | torch.dtype | torch.device | torch.memory_format | slice
    )
