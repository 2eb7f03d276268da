"""Results read back from JSON."""

from __future__ import annotations

from dataclasses import fields
from typing import Any


def made(kind: Any, values: dict[str, Any]) -> Any:
    """The dataclass `kind` from those of `values` that are its fields."""
    return kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})
