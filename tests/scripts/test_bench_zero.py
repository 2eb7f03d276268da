"""The benchmark of sharding: that it runs on two small ranks and counts what it should, not the times."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from fastopt.bench.values import in_a_line
from fastopt.bench.zero import command, rivals, run, trace
from fastopt.bench.zero.processes import run_ranks
from tests.commands import ROOT, run_command
from tests.warm import run_script

SCRIPT = ROOT / "scripts" / "bench_zero.py"
WAYS = "stage2,groups,stage1,ddp,zero-redundancy,fully-shard-2"

DEEPSPEED = """
import os, sys, time

def initialize(**given):
    if os.environ["RANK"] == "1":
        print("no such kernel", file=sys.stderr, flush=True)
        os._exit(3)
    time.sleep(600)
"""
"""A package that ends one rank and lets the other hang."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of a run, in a folder with what was written beside it. One of the packages to compare with fails."""
    out = tmp_path_factory.mktemp("bench") / "zero.json"
    peers = tmp_path_factory.mktemp("peers")
    (peers / "deepspeed.py").write_text(DEEPSPEED)
    quick = ("--device", "cpu", "--model", "tiny", "--rounds", "1", "--iterations", "1")
    asked = ("--ranks", "2", "--only", f"deepspeed1,{WAYS}", "--peers", peers, "--out", out)
    run_command(sys.executable, SCRIPT, *quick, *asked, cwd=out.parent)
    return out


@pytest.fixture(scope="module")
def rows(written: Path) -> dict[str, dict[str, Any]]:
    """The rows by name."""
    return {row["who"]: row for row in json.loads(written.read_text())["rows"]}


def test_a_row_for_each_way(rows: dict[str, dict[str, Any]]) -> None:
    assert set(rows) == {
        "compute only",
        "fastopt stage 2",
        "fastopt stage 2, clipping",
        "fastopt stage 2, 21 groups",
        "fastopt stage 1",
        "fastopt stage 1, clipping",
        "DDP float32, torch fused",
        "DDP float32, ZeroRedundancyOptimizer",
        "fully_shard without resharding, torch fused",
    }
    assert all(row["iteration_ms"] > 0 and row["compute_ms"] > 0 for row in rows.values())


def test_the_bytes_that_are_sent(rows: dict[str, dict[str, Any]], written: Path) -> None:
    n = json.loads(written.read_text())["parameters"]
    d, hidden, layers, words = 32, 64, 2, 64
    assert n == 2 * words * d + layers * (4 * d * d + 3 * d * hidden + 2 * d) + d
    half = 1 / 2  # (N-1)/N of two ranks
    assert rows["DDP float32, torch fused"]["sent_bytes"] == 2 * half * 4 * n
    assert rows["DDP float32, ZeroRedundancyOptimizer"]["sent_bytes"] == (2 + 1) * half * 4 * n
    gathered_and_scattered = half * (2 + 4) * n
    assert rows["fully_shard without resharding, torch fused"]["sent_bytes"] == gathered_and_scattered
    least = half * (2 + 2) * n  # gradients and parameters in bfloat16; padding and control messages come on top
    assert least <= rows["fastopt stage 2"]["sent_bytes"] < 1.2 * least


def test_a_package_that_ends_a_rank_is_a_note_and_the_rest_is_there(written: Path) -> None:
    notes = json.loads(written.read_text())["notes"]
    (note,) = [note for note in notes if note.startswith("deepspeed1")]
    assert note == "deepspeed1: rank 1 ended with exit code 3, and not all others within 5 s: no such kernel."
    assert note in written.with_suffix(".md").read_text()


def test_tables_and_chart_are_written_beside(written: Path, tmp_path: Path) -> None:
    assert "| fastopt stage 2, clipping |" in written.with_suffix(".md").read_text()
    again = tmp_path / "again.svg"
    run_script(SCRIPT, "--chart", written, "-o", again, cwd=tmp_path)
    assert again.read_bytes() == written.with_suffix(".svg").read_bytes()
    assert "ZeroRedundancyOptimizer" in again.read_text()


def kernel(name: str, start: float, stop: float) -> dict[str, Any]:
    return {"name": name, "cat": "kernel", "ts": start, "dur": stop - start}


def test_time_of_kernels_by_kind_and_what_is_hidden() -> None:
    events = [
        {"name": "aten::mm", "cat": "cpu_op", "ts": 0, "dur": 9000},
        kernel("nvjet_tst_128x256", 0, 1000),
        kernel("sm90_xmma_gemm_bf16", 2000, 3000),
        kernel("ncclDevKernel_ReduceScatter", 500, 2500),  # hidden from 500 to 1000 and from 2000 to 2500
        kernel("pass_0", 3500, 4000),
        {"name": "Memcpy DtoD", "cat": "gpu_memcpy", "ts": 3900, "dur": 200},
    ]
    found = trace.kernels(events, iterations=2)
    assert found.by_kind == {"copy": 0.1, "matmul": 1.0, "nccl": 1.0, "step": 0.25}
    assert found.busy_ms == pytest.approx((3000 + 600) / 2e3)
    assert found.idle_ms == pytest.approx(500 / 2e3)
    assert found.hidden == pytest.approx(0.5)


def test_collectives_with_lists_of_tensors_take_the_dtype_from_the_backend() -> None:
    events = [
        {"name": "nccl:all_reduce", "args": {"Input Dims": [[10, 3]], "Input type": ["c10::BFloat16"]}},
        {"name": "c10d::allreduce_", "args": {"Input Dims": [[[10, 3]], []], "Input type": ["TensorList", ""]}},
        {"name": "c10d::_allgather_base_", "args": {"Input Dims": [[8], [2]], "Input type": ["float", "float"]}},
        {"name": "aten::add", "args": {"Input Dims": [[8]], "Input type": ["float"]}},
    ]
    found = trace.wire(events, world_size=4)
    assert found.collectives == 2
    assert found.sent == pytest.approx(3 / 4 * (2 * 30 * 2 + 8 * 4))
    events[0]["args"] = {"Input Dims": [[7]], "Input type": ["c10::BFloat16"]}  # of another one
    assert trace.wire(events, world_size=4).sent is None


def test_what_goes_wrong_in_a_package_is_one_line_even_where_it_says_nothing() -> None:
    assert in_a_line(AssertionError()) == "AssertionError"
    assert in_a_line(SystemExit(1)) == "SystemExit: 1"
    assert in_a_line(RuntimeError("\nno such op\nsee there")) == "RuntimeError: no such op"


# Ranks that leave by themselves have all the time they want, however slow the machine is.
@pytest.mark.parametrize(
    ("does", "grace", "seconds", "said"),
    [
        ("pass", 60, 60, None),
        ("raise SystemExit(1)", 60, 60, "rank 0 ended with exit code 1"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 60, 60, "rank 0 ended with exit code -11"),
        ("if rank == 1: raise ValueError('no')", 60, 60, "rank 1 ended with exit code 1: "),
        (
            "if rank == 1: raise ValueError('no')\nimport time; time.sleep(1000)",
            0.3,
            60,
            "rank 1 ended with exit code 1, and not all others within 0 s: ",
        ),
        (
            "import time; time.sleep(1000 * rank)",
            0.3,
            60,
            "rank 0 ended with exit code 0, and not all others within 0 s",
        ),
        ("import subprocess, sys; subprocess.run([sys.executable, '-c', NAP])", 60, 2, "no end within 2 s"),
    ],
)
def test_whatever_ranks_do_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, grace: float, seconds: float, said: str | None
) -> None:
    """Also where what they do does not end: then they, and what they have started, are ended."""
    (tmp_path / "a_rank.py").write_text(f"import os\nNAP, rank = {NAP!r}, int(os.environ['RANK'])\n{does}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("fastopt.bench.zero.processes.GRACE", grace)
    start = time.monotonic()
    found = run_ranks(2, "a_rank", [], port=0, seconds=seconds)
    assert time.monotonic() - start < 100  # none has slept to the end
    assert found is None if said is None else found is not None and found.startswith(said)
    if "ValueError" in does:
        assert str(found).endswith("ValueError: no")
    while time.monotonic() - start < 100 and _napping():  # what is killed takes a moment to be gone
        time.sleep(0.05)
    assert not _napping()


NAP = "import time; time.sleep(999)"


def _napping() -> list[Path]:
    """The processes that take a nap."""
    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if _reads(path, NAP)]


def _reads(path: Path, text: str) -> bool:
    try:
        return text.encode() in path.read_bytes().split(b"\0")
    except OSError:
        return False


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_no_row_is_lost_where_not_all_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("a", "b", "c")
    ways = {name: (lambda setting, name=name: {name: lambda: None}) for name in names}
    references = {"compute only": lambda: None}, {"fastopt stage 2": lambda: None}
    monkeypatch.setattr(run, "compute_only", lambda setting: references[0])
    monkeypatch.setattr(run, "stage_2", lambda setting: references[1])
    monkeypatch.setattr(run, "_fits", lambda device, n: False)
    monkeypatch.setattr(rivals, "builders", lambda device: ways)
    monkeypatch.setenv("LOCAL_RANK", "0")
    out = tmp_path / "zero.json"
    options = ["--ranks", "1", "--device", "cpu", "--model", "tiny", "--rounds", "1", "--only", ",".join(names)]
    args = command.arguments([*options, "--out", str(out)], None)
    found = command.measure(args)
    assert [row.who for row in found.rows] == ["compute only", "fastopt stage 2", *names]
    assert [row["who"] for row in json.loads(out.read_text())["rows"]] == [row.who for row in found.rows]
