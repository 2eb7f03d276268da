"""The console blocks of docs/commands.md: `python -m tests.commands_page` runs their commands and writes the page anew.

A block is the command after `$ ` and what it printed. The commands run in a folder with a checkpoint in `run`.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from fastopt import Adam
from fastopt.checkpoint import save

from .commands import ROOT

PAGE = ROOT / "docs" / "commands.md"
_BLOCK = re.compile(r"^```console\n\$ (.*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> dict[str, str]:
    """What each command of the page prints, according to the page."""
    return dict(_BLOCK.findall(page))


def written(page: str, output_of: Callable[[str], str]) -> str:
    """The page with the output of all its commands."""
    return _BLOCK.sub(lambda match: f"```console\n$ {match[1]}\n{output_of(match[1])}```", page)


def tidied(output: str) -> str:
    """Without the blanks at the ends of lines."""
    return "".join(f"{line.rstrip()}\n" for line in output.rstrip().splitlines())


def without_numbers(text: str) -> str:
    """What does not differ from run to run of a benchmark, nor with the width of a column."""
    return re.sub(r"-{2,}:?", "-", re.sub(r" +", " ", re.sub(r"\d[\d.,]*", "N", text)))


def prepare(folder: Path) -> None:
    """Save the checkpoints that the page looks at."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    opt = Adam([model[0].parameters(), model[2].parameters()], lr=[1e-3, 1e-2])
    for step in (100, 200):
        model(torch.ones(4, 8)).sum().backward()
        opt.step()
        save(folder / "run", step=step, model=model, opt=opt, extra={"note": "any JSON"})


def really(command: str, folder: Path) -> str:
    """What a command prints, in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    argv = [sys.executable, "-m", *shlex.split(command)]
    print(command, flush=True)
    return tidied(subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        PAGE.write_text(written(PAGE.read_text(), lambda command: really(command, Path(name))))
