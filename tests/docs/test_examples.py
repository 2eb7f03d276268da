"""The files in docs/examples run as they are."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from ..checkpoint.s3_server import BUCKET, S3Server
from ..commands import ROOT, run_command
from ..pages import on_ranks

EXAMPLES = ROOT / "docs" / "examples"
ON_PAGES = {"single.py", "own_optimizer.py"}
"""Run while the site is built."""
ELSEWHERE = {"read_checkpoint.py", "fastai_learner.py", "lightning_trainer.py"}
"""Run by tests/checkpoint/test_interop.py and tests/clients."""


def run(example: str, ranks: int, folder: Path, url: str | Path) -> str:
    """What an example prints on that many ranks of torchrun, with `url` as its argument."""
    return on_ranks((EXAMPLES / example).read_text().replace("sys.argv[1]", repr(str(url))), ranks, folder)


def test_many_ranks_prints_what_the_page_says(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "getting-started.md").read_text()
    for ranks in (2, 3):
        printed = re.findall(r"^rank \d of .*$", run("many_ranks.py", ranks, tmp_path, tmp_path / "run"), re.M)
        assert sorted(printed) == re.findall(rf"^rank \d of {ranks}: .*$", page, re.M)


def test_fully_sharded(tmp_path: Path) -> None:
    for ranks, rows, step in ((2, (33, 32), 5), (1, (65,), 10)):
        printed = run("fully_sharded.py", ranks, tmp_path, tmp_path / "run")
        assert sorted(re.findall(r"rank (\d): step (\d+), (\d+) of 65 rows", printed)) == [
            (str(rank), str(step), str(n)) for rank, n in enumerate(rows)
        ]


def test_s3_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        url = f"s3://{BUCKET}/run"
        printed = run_command(sys.executable, EXAMPLES / "s3_resume.py", url).stdout
        assert "steps 1 to 5, lr 0.005; on S3: [5]" in printed
        printed = run("s3_resume.py", 2, tmp_path, url)
        assert printed.count("steps 6 to 10, lr 0.0025; on S3: [5, 10]") == 2


def test_every_example_is_run_and_shown_somewhere() -> None:
    files = {path.name for path in EXAMPLES.glob("*.py")}
    assert files == {"many_ranks.py", "fully_sharded.py", "s3_resume.py"} | ON_PAGES | ELSEWHERE
    pages = "".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    assert [name for name in files if not re.search(rf"^\[.*\]\((\.\./)?examples/{name}\)$", pages, re.M)] == []
