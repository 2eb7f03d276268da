"""The source of Triton kernels where there is no Triton: it is Python, and what it imports and calls exists."""

from __future__ import annotations

import ast
import inspect
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from fastopt.engine.executors import triton_source
from fastopt.engine.executors.triton_source import Layout, source_of

from ..fastopt.samples import NATIVE, Case


@pytest.mark.parametrize("case", NATIVE, ids=str)
def test_what_the_source_imports_and_calls_exists(case: Case) -> None:
    p = torch.nn.Parameter(torch.rand(5))
    p.grad = torch.rand(5)
    opt: Any = case([p], lr=0.1, engine="foreach")
    opt.step()
    (program,) = opt.runner.programs()
    tree = ast.parse(source_of(Layout(program)))
    (functions,) = (statement for statement in tree.body if isinstance(statement, ast.ImportFrom))
    found = find_spec(f"{functions.module}.{functions.names[0].name}")
    assert found is not None
    assert found.origin is not None
    defined = {
        each.name for each in ast.parse(Path(found.origin).read_text()).body if isinstance(each, ast.FunctionDef)
    }
    assert set(re.findall(r"\bm\.(\w+)\(", inspect.getsource(triton_source))) <= defined
