"""The benchmark of a step, on a model of a few hundred parameters: that it runs and what it writes, not the times."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from fastopt.bench.step.first import first_step
from tests.commands import ROOT
from tests.warm import run_script

SCRIPT = ROOT / "scripts" / "bench_step.py"
QUICK = ("--device", "cpu", "--models", "tiny", "--rounds", "1", "--seconds", "0.001", "--no-first")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of a run, in a folder with what was written beside it."""
    out = tmp_path_factory.mktemp("bench") / "step.json"
    run_script(SCRIPT, *QUICK, "--rules", "Adam,ranger", "--out", out, cwd=out.parent)
    return out


def test_a_row_for_each_optimizer_and_number_of_groups(written: Path) -> None:
    rows: list[dict[str, Any]] = json.loads(written.read_text())["rows"]
    found = {
        (row["groups"], row["rule"], row["who"]) for row in rows if row["who"] not in ("HeavyBall", "pytorch-optimizer")
    }
    assert found == {
        *((1, "Adam", who) for who in ("fastopt", "torch fused", "torch foreach", "loop")),
        *((10, "Adam", who) for who in ("fastopt", "torch fused")),
        *((1, "ranger", who) for who in ("fastopt", "loop")),
        (10, "ranger", "fastopt"),
    }
    assert all(row["step_ms"] > 0 and row["host_us"] > 0 and row["host_new_us"] > 0 for row in rows)


def test_the_floor_is_what_the_formula_reads_and_writes(written: Path) -> None:
    result = json.loads(written.read_text())
    elements = 6 * (8 * 8 + 8)
    adam = 4 * (4 + 3)  # reads p, g, m, v and writes p, m, v, in float32
    ranger = (5 * adam + 4 * (5 + 4)) / 6  # and in every sixth step the slow weights
    for rule, bytes_per_element in (("Adam", adam), ("ranger", ranger)):
        floors = {row["floor_ms"] for row in result["rows"] if row["rule"] == rule}
        floor_ms = bytes_per_element * elements / result["copy_gb_per_s"] / 1e6
        assert list(floors) == [pytest.approx(floor_ms)]


def test_first_steps_are_those_of_fresh_processes() -> None:
    first = first_step("tiny", "Adam", "cpu")
    assert first.empty_ms > 0
    assert first.cached_ms > 0


def test_the_table_is_written_beside(written: Path) -> None:
    table = written.with_suffix(".md").read_text()
    assert "| tiny | 10 | Adam | fastopt (" in table


def test_the_chart_is_the_same_for_the_same_result(written: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.svg"
    run_script(SCRIPT, "--chart", written, "-o", again, cwd=tmp_path)
    assert again.read_bytes() == written.with_suffix(".svg").read_bytes()
    assert all(text in again.read_text() for text in ("fastopt", "torch fused", "floor", "tiny, 12 tensors"))


def test_a_package_that_is_not_there_is_a_note(written: Path) -> None:
    notes = json.loads(written.read_text())["notes"]
    for package, name in (("heavyball", "HeavyBall"), ("pytorch_optimizer", "pytorch-optimizer")):
        is_there = importlib.util.find_spec(package) is not None
        assert is_there == (f"{name} is not installed here: no rows." not in notes)


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [("--models", "huge", "'huge' is none of llama-1.3b"), ("--compile", "tiny:Atom", "'tiny:Atom' is no MODEL:RULE")],
)
def test_a_wrong_name_is_told(option: str, value: str, sentence: str, tmp_path: Path) -> None:
    done = run_script(SCRIPT, option, value, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert f"{option}: {sentence}" in done.stdout


def test_rows_that_there_was_no_time_for_are_a_note(tmp_path: Path) -> None:
    run_script(SCRIPT, *QUICK, "--limit", "0", "--out", tmp_path / "step.json", cwd=tmp_path)
    assert "Out of time: rows of tiny from Adam in 1 groups on are missing." in (tmp_path / "step.md").read_text()
