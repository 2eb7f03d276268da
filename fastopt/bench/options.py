"""Kinds of options that the benchmarks have in common. A mistake is named before anything is measured."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from pathlib import Path


def whole(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text} is no whole number of at least 1")
    return int(text)


def positive(text: str) -> float:
    """A number above 0, not infinite."""
    if not 0 < number(text) < math.inf:
        raise ArgumentTypeError(f"{text} is no number above 0")
    return float(text)


def number(text: str) -> float:
    """A number, perhaps infinite."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if math.isnan(found):
        raise ArgumentTypeError(f"{text} is no number")
    return found


def new_file(text: str) -> Path:
    """A file to be written, in a folder that is made if need be."""
    path = Path(text)
    if path.is_dir():
        raise ArgumentTypeError(f"{text} is a folder, expected a file")
    return path


def folder(text: str) -> Path:
    """A folder that is there."""
    path = Path(text)
    if not path.is_dir():
        raise ArgumentTypeError(f"there is no folder {text}")
    return path
