"""The benchmark of checkpoints, on a narrow model: that it runs and what it counts, not the times."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fastopt.bench.checkpoint.planning import plan
from fastopt.bench.checkpoint.state import llama
from tests.commands import ROOT, run_command

SCRIPT = ROOT / "scripts" / "bench_checkpoint.py"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run has written."""
    out = tmp_path_factory.mktemp("bench") / "checkpoint.json"
    quick = ("--only", "rounds", "--scale", "0.03", "--rounds", "1", "--folder", out.parent)
    run_command(sys.executable, SCRIPT, *quick, "--out", out, cwd=out.parent)
    assert [path.name for path in out.parent.iterdir()] == ["checkpoint.json"]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_everybody_has_saved_and_loaded(result: dict[str, Any]) -> None:
    for name in ("raw", "torch.save", "DCP", "DCP HF", "fastopt"):
        assert result[f"{name} save"]["seconds"] > 0
        assert result[f"{name} load"]["seconds"] > 0
    for way in (" in place", ", checked during", " by copies"):
        assert result[f"fastopt load{way}"]["seconds"] > 0
    assert result["raw save"]["of floor"] == 1


def test_the_bytes_of_a_rank(result: dict[str, Any]) -> None:
    d = 16  # 768 * 0.03, rounded down to a multiple of 16
    block = 4 * d + (d * 3 * d + 3 * d) + (d * d + d) + (d * 4 * d + 4 * d) + (4 * d * d + d)
    elements = (50257 + 1024) * d + 12 * block + 2 * d
    assert result["bytes of a rank"] == pytest.approx(3 * 4 * elements / 2, rel=1e-3)  # half of three float32 states


def test_the_plan_reads_what_a_rank_holds() -> None:
    found = plan(4)
    assert sum(a * b for _, (a, b) in ((n, (*s, 1)[:2]) for n, s in llama().items())) == 1_364_297_728
    assert found["ranks"] == 4
    assert found["files"] >= 2 * 4
    assert found["requests of a rank"] >= 1


def test_loads_into_live_tensors_and_another_model(tmp_path: Path) -> None:
    quick = ("--only", "live", "--model", "llama-1.36b", "--scale", "0.01", "--rounds", "1", "--folder", tmp_path)
    run_command(sys.executable, SCRIPT, *quick, "--out", tmp_path / "live.json", cwd=tmp_path)
    found = json.loads((tmp_path / "live.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["live.json"]
    assert found["model"] == "llama-1.36b"
    assert all(found["live"][name]["seconds"] > 0 for name in ("raw", "fastopt in place", "fastopt, checked during"))
    d, hidden = 16, 48
    elements = 2 * 32000 * d + 24 * (4 * d * d + 3 * hidden * d + 2 * d) + d
    assert found["live"]["bytes of a rank"] == pytest.approx(3 * 4 * elements / 2, rel=1e-3)
