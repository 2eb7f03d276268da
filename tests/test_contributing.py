"""CONTRIBUTING.md names files, names in files and commands that exist."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from .commands import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
FOLDERS = {"fastopt", "engine", "distributed", "checkpoint", "scripts", "tests", "docs", ".ci"}
PATHS = {word for word in re.findall(r"[\w./-]+", TEXT) if "/" in word and word.split("/")[0] in FOLDERS}
NAMES = {
    "fastopt/cbs.py": ["def declare", "like_param"],
    "fastopt/engine/choice.py": ["EXECUTORS"],
    "fastopt/engine/run.py": ["def executor_for", "def _execute"],
    "fastopt/engine/executors/blocks.py": ["def run_blocks"],
    "fastopt/optimizers.py": ["hp_map", "class Adam"],
    "checkpoint/io/storage.py": ["class Storage(Protocol)", "def open_storage"],
    "checkpoint/io/remote.py": ["class RemoteStorage", "_OBJECT_STORES"],
    "tests/fastopt/samples.py": ["NATIVE", "class Case"],
    "tests/distributed/problems.py": ["EVERY"],
    "tests/checkpoint/test_every_optimizer.py": ["KINDS"],
    "tests/engine/compare.py": ["def side_by_side"],
    "tests/ranks.py": ["def run_ranks"],
    "tests/warm.py": ["def run_script"],
}


@pytest.mark.parametrize("name", sorted(PATHS))
def test_a_path_is_there(name: str) -> None:
    name = name.rstrip(".")
    path = ROOT / "fastopt" / name if name.startswith("engine/") else ROOT / name
    assert path.exists()
    if path.parent.name in {"scripts", ".ci"} and not path.suffix:
        assert os.access(path, os.X_OK)


@pytest.mark.parametrize("file", sorted(NAMES))
def test_a_name_is_in_its_file(file: str) -> None:
    text = (ROOT / file).read_text()
    assert [name for name in NAMES[file] if name not in text] == []


def test_the_versions_are_those_that_are_pinned_and_declared() -> None:
    pins = (ROOT / "constraints.txt").read_text()
    (torch,) = re.findall(r"^torch==(.*)$", pins, re.MULTILINE)
    assert f"| 3.11 | {torch} |" in TEXT
    project = (ROOT / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.11,<3.14"' in project
    assert '"torch>=2.11"' in project
    assert "Python 3.11 to 3.13 and torch from 2.11 on" in TEXT


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https:)([^)]+)\)", TEXT)
    assert [target for target in targets if not Path(ROOT, target).exists()] == []
