"""The code blocks of the README and of the pages in docs/, and how they run."""

from __future__ import annotations

import contextlib
import io
import runpy
from dataclasses import dataclass
from pathlib import Path

from .commands import ROOT, torchrun
from .warm import run_script

# Ranks with Gloo sometimes abort while the interpreter shuts down: the example runs as it is, then leaves before that.
_LEAVE = """
import os, runpy, sys
runpy.run_path(sys.argv[1], run_name="__main__")
sys.stdout.flush()
os._exit(0)
"""


@dataclass(frozen=True)
class Block:
    """A block of Python under its heading of the second level. `kind` is what follows the language: "torchrun"."""

    section: str
    kind: str
    code: str

    def title(self) -> str:
        """Its first line, where that is a comment."""
        return self.code.splitlines()[0].strip("# ")

    def run(self, folder: Path, ranks: int = 2) -> str:
        """What it prints as a script in `folder`, its working directory; one for torchrun on that many ranks."""
        if self.kind == "torchrun":
            return on_ranks(self.code, ranks, folder)
        (folder / "example.py").write_text(self.code)
        return run_script(folder / "example.py", cwd=folder).stdout

    def run_here(self, folder: Path) -> str:
        """The same in this process, where it needs no ranks: libraries that are slow to import are imported once."""
        if self.kind == "torchrun":
            return under_torchrun(self.code, 2, folder)
        (folder / "example.py").write_text(self.code)
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
            runpy.run_path("example.py", run_name="__main__")
        return printed.getvalue()


def blocks(page: str, section: str | None = None) -> list[Block]:
    """All blocks of Python on a page, which is named by its path in the repository, or those of one section."""
    found: list[Block] = []
    heading, code = "", None
    for line in (ROOT / page).read_text().splitlines(keepends=True):
        if code is None:
            if line.startswith("## "):
                heading = line[3:].strip()
            elif line.startswith("```python"):
                kind, code = line[len("```python") :].strip(), ""
        elif line.rstrip() == "```":
            found.append(Block(heading, kind, code))
            code = None
        else:
            code += line
    return [block for block in found if section in (None, block.section)]


def examples(page: str, section: str) -> list[Block]:
    """The blocks of a section that run as they stand there, which excerpts do not."""
    return [block for block in blocks(page, section) if block.kind != "excerpt"]


def on_ranks(code: str, ranks: int, folder: Path) -> str:
    """What `code` prints on that many ranks, with the environment that torchrun gives them."""
    (folder / "example.py").write_text(code)
    return run_script(folder / "example.py", ranks=ranks, cwd=folder).stdout


def under_torchrun(code: str, ranks: int, folder: Path) -> str:
    """The same by torchrun itself, which takes seconds more."""
    (folder / "example.py").write_text(code)
    (folder / "leave.py").write_text(_LEAVE)
    return torchrun(ranks, folder / "leave.py", folder / "example.py", cwd=folder).stdout
