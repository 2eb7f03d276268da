"""The list of what is proven, in this package's docstring, names tests that exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def test_every_proof_that_is_listed_exists() -> None:
    page = str(sys.modules[__package__].__doc__).partition("asks for:")[2]
    named = re.findall(r"(?:(distributed|scripts)\.)?(test_\w+)\.(test_\w+)", page)
    assert len(named) > 100
    for package, module, function in named:
        folder = Path(__file__).parents[1] / (package or "checkpoint")
        text = (folder / f"{module}.py").read_text()
        assert re.search(rf"^def {function}\(", text, re.MULTILINE), f"{module}.py has no {function}"
