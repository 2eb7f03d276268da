"""What goes into a result and is read back from JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any


def write_beside(result: Any, page: str, path: Path) -> None:
    """Write the dataclass `result` as JSON to `path`, with its `page` of Markdown beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps(asdict(result), indent=1) + "\n")
    _write(path.with_suffix(".md"), page)


def _write(path: Path, text: str) -> None:
    """Write all of a file or nothing: a run may be ended at any time."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.replace(path)


def in_a_line(error: BaseException) -> str:
    """What went wrong, as a note of a result has it: many a package raises without a word."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def made(kind: Any, values: dict[str, Any]) -> Any:
    """The dataclass `kind` from those of `values` that are its fields."""
    return kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})
