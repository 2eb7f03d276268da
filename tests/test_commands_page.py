"""docs/commands.md shows what the commands really print; `python -m tests.commands_page` writes it anew."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from fastopt.bench.checkpoint.planning import plan
from fastopt.bench.zero import results
from fastopt.command import main

from .commands_page import PAGE, blocks, prepare, tidied, without_numbers

SHOWN = blocks(PAGE.read_text())
ELSEWHERE = ("fastopt doctor", "fastopt bench zero", "fastopt bench checkpoint")
"""Those that start ranks or measure: what they print is looked at in parts, that of the doctor in its own tests."""
RUN_HERE = [command for command in SHOWN if not command.startswith(ELSEWHERE)]


def test_the_page_shows_every_command() -> None:
    shown = {" ".join(command.split()[1:3]) for command in SHOWN}
    assert {"--help", "doctor", "bench step", "bench zero", "bench checkpoint", "checkpoint ls"} <= shown
    assert len(RUN_HERE) == 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run."""
    path = tmp_path_factory.mktemp("page")
    prepare(path)
    return path


@pytest.mark.parametrize("command", RUN_HERE)
def test_the_output_is_that_of_the_command(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(main, shlex.split(command)[1:], prog_name="fastopt", terminal_width=100)
    assert done.exit_code == 0
    shown, printed = (_without_what_changes(command, text) for text in (SHOWN[command], tidied(done.stdout)))
    assert printed == shown, "docs/commands.md is out of date: python -m tests.commands_page"


def _without_what_changes(command: str, text: str) -> str:
    if "bench" in command:
        return re.sub(r"\((llvm|foreach|eager)\)|^.* N threads; .*$|^# CPU.*$", "", without_numbers(text), flags=re.M)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z?", "TIME", text)
    text = re.sub(r"^rng .*$", "rng", text, flags=re.M)
    text = re.sub(r"(fastopt|torch|python) \d[\w.+]*", r"\1 VERSION", text)
    return re.sub(r"\S*/run/step", "run/step", text)


def test_the_benchmarks_with_ranks_print_such_tables() -> None:
    (zero,) = (text for command, text in SHOWN.items() if command.startswith("fastopt bench zero"))
    assert "\n".join(results.HEAD) in zero
    (checkpoint,) = (text for command, text in SHOWN.items() if command.startswith("fastopt bench checkpoint"))
    assert re.findall(r'^    "(.*?)":', checkpoint, re.MULTILINE) == list(plan(2))
