"""Everything public says what it is, and what its examples show is true."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import fastopt
import fastopt.checkpoint
import fastopt.distributed

PACKAGES = (fastopt, fastopt.distributed, fastopt.checkpoint)


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Every public name of `module` with its object, and the public members that its classes define in this project."""
    for name in module.__all__:
        found = getattr(module, name)
        if not callable(found):
            continue
        yield name, found
        for member, value in inspect.getmembers(found) if inspect.isclass(found) else ():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            ours = str(getattr(function, "__module__", "")).startswith("fastopt")
            if not member.startswith("_") and ours and (inspect.isfunction(function) or isinstance(value, property)):
                yield f"{name}.{member}", function


@pytest.mark.parametrize("module", PACKAGES, ids=lambda module: module.__name__)
def test_everything_public_is_described(module: ModuleType) -> None:
    names = dict(public(module))
    assert len(names) > 10
    assert [name for name, found in names.items() if not (inspect.getdoc(found) or "").strip()] == []


@pytest.mark.parametrize("module", PACKAGES, ids=lambda module: module.__name__)
def test_parameters_that_are_described_are_there(module: ModuleType) -> None:
    wrong = []
    for name, found in public(module):
        doc = inspect.getdoc(found) or ""
        _, has, rest = doc.partition("\nArgs:\n")
        if not has:
            continue
        block = rest.split("\n\n")[0].splitlines()
        described = [line.strip().split(":")[0] for line in block if line.startswith("    ") and line[4] != " "]
        parameters = inspect.signature(found).parameters
        known = {f"{'*' * (p.kind.value == 2) + '**' * (p.kind.value == 4)}{p.name}" for p in parameters.values()}
        wrong += [f"{name}: {each}" for line in described for each in line.split(", ") if each not in known]
    assert wrong == []


def test_examples_in_docstrings() -> None:
    tried = 0
    for module in PACKAGES:
        names = dict(public(module))
        for name, found in names.items():
            for test in doctest.DocTestFinder(recurse=False).find(found, name, globs=dict(names)):
                result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
                assert not result.failed, name
                tried += result.attempted
    assert tried >= 15
