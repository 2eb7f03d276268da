"""The demonstration: kill a rank, resume on another number of ranks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .jobs import ROOT


def run_demo(*flags: str, timeout: float = 150) -> tuple[int, str]:
    """Exit code and output of scripts/demo.py; an AssertionError with the output when it takes too long."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/demo.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it ends its jobs on the way out
        output, _ = process.communicate()
        raise AssertionError(f"the demo was not done after {timeout} seconds; it printed:\n{output}") from None
    return process.returncode, output


def test_demo_kills_resumes_and_reports(tmp_path: Path):
    code, output = run_demo("--keep", str(tmp_path / "kept"))
    assert code == 0, output
    assert "got SIGKILL" in output
    losses = re.findall(r"step (\d+): on 2 ranks ([\d.]+), on 3 ranks ([\d.]+)", output)
    assert len(losses) >= 5
    for _, two, three in losses:
        assert float(two) == pytest.approx(float(three), abs=0.02)
    parameters = int(re.search(r"held, of ([\d,]+) parameters", output)[1].replace(",", ""))  # type: ignore[index]
    held = re.findall(r"on (\d) ranks: (.*)", output)
    assert [int(world) for world, _ in held[-2:]] == [2, 3]
    for _, line in held[-2:]:
        # Adam holds two float32 numbers per parameter, on whichever rank.
        assert sum(int(n.replace(",", "")) for n in re.findall(r"([\d,]+) bytes", line)) == 8 * parameters
    assert (tmp_path / "kept/curves.png").exists()


def test_demo_wants_a_new_folder(tmp_path: Path):
    (tmp_path / "mine").write_text("keep me")
    code, output = run_demo("--keep", str(tmp_path))
    assert code == 1
    assert "is not empty" in output
