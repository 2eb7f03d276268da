"""The tests of this folder run in an environment of their own."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

if find_spec("lightning") is None:
    raise pytest.UsageError("tests/clients drives libraries that are not installed here: use scripts/test --clients")
