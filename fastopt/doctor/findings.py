"""What the doctor finds out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["ok", "note", "broken"]


@dataclass(frozen=True)
class Finding:
    """One fact about this machine.

    Attributes:
        area: what it is about: `software`, `hardware`, `steps`, `ranks` or `stores`.
        name: of the thing.
        state: `note` for what is missing and not needed, or worth a look.
        text: a sentence for people.
        detail: more lines, of what is broken.
    """

    area: str
    name: str
    state: State
    text: str
    detail: str = ""


def summary(findings: Sequence[Finding]) -> dict[str, Any]:
    """All of it as JSON takes it."""
    broken = [finding.name for finding in findings if finding.state == "broken"]
    return {"well": not broken, "broken": broken, "findings": [asdict(finding) for finding in findings]}


def sentence(error: BaseException) -> str:
    """An exception in one line."""
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
