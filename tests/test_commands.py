"""The harness for commands: output, exit codes, time-outs, and that nothing outlives a command."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from .commands import TORCHRUN, Command, run_command, torchrun
from .ranks import RanksFailed
from .test_ranks import gone_soon

RANK = """
import os, sys
import torch.distributed as dist
dist.init_process_group("gloo")
rank, attempt = dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
print(f"rank {rank} of {dist.get_world_size()}, attempt {attempt}")
if "crash" in sys.argv and attempt == 0 and rank == 1:
    os.kill(os.getpid(), 9)
dist.barrier()
dist.destroy_process_group()
print("done")
sys.stdout.flush()
os._exit(0)
"""

HANGING = """
import os, sys, time
def waits_for_ever():
    time.sleep(3600)
rank = os.environ["RANK"]
print(f"rank {rank} gets in")
with open(f"{sys.argv[1]}/{rank}", "w") as file:
    file.write(f"{os.getpid()} {os.getppid()}")
waits_for_ever()
"""


def test_output_and_exit_code() -> None:
    program = "import os, sys, fastopt.pieces; print('out', os.environ['X']); sys.exit('err')"
    done = run_command(sys.executable, "-c", program, env={"X": "y"}, cwd=Path("/"), check=False)
    assert done.returncode == 1
    assert done.stdout == "out y\nerr\n"
    with pytest.raises(RanksFailed, match="exit code 1\nout y\nerr"):
        run_command(sys.executable, "-c", program, env={"X": "y"})


def test_what_a_command_leaves_behind_is_killed(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys\n"
        "child = subprocess.Popen(['sleep', '3600'], start_new_session=True)\n"
        "open(sys.argv[1], 'w').write(str(child.pid))\n"
    )
    run_command(sys.executable, "-c", program, tmp_path / "pid")
    assert gone_soon([int((tmp_path / "pid").read_text())])


def test_a_command_is_watched_while_it_runs() -> None:
    program = "import time; print('ready'); time.sleep(3600)"
    with Command(sys.executable, "-c", program) as command:
        assert command.wait(60, until=lambda: "ready" in command.output) is None
        assert command.processes == [command.process.pid]
        command.process.terminate()
        assert command.wait(60) == -signal.SIGTERM
        assert command.output == "ready\n"


def test_torchrun_restarts_a_killed_rank(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    done = torchrun(2, tmp_path / "rank.py", "crash", max_restarts=1)
    for rank in range(2):
        assert f"rank {rank} of 2, attempt 1" in done.stdout
    assert done.stdout.count("done") == 2


def test_a_hang_under_torchrun_is_killed_and_shows_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(HANGING)
    with Command(*TORCHRUN, "--nproc-per-node=2", tmp_path / "rank.py", tmp_path) as command:
        command.wait(60, until=lambda: len(list(tmp_path.glob("[01]"))) == 2)
        with pytest.raises(RanksFailed, match="not done after 1 s") as failure:
            command.wait(1)
    text = str(failure.value)
    assert text.count("in waits_for_ever") == 2
    for rank in range(2):
        assert f"rank {rank} gets in" in text
    pids = [int(pid) for rank in range(2) for pid in (tmp_path / str(rank)).read_text().split()]
    assert gone_soon(pids)
