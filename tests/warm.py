"""Runs scripts as `__main__`, in processes that have not to import torch first (see tests/ranks.py).

An interpreter with torch and an optimizer costs five seconds of a core, and torchrun has one for itself and for each
rank. So what a script does is tested here, and that it starts with the real commands by one test of `commands.py` each.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from .ranks import run_ranks

_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def run_script(
    script: str | Path,
    *arguments: str | Path,
    ranks: int = 0,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Runs `script` on that many ranks, with the environment that torchrun gives them; with 0 in one process without.

    `stdout` of the result has what Python code printed, one rank after the other, and `returncode` is the first
    that is not 0. Raises `RanksFailed` with the output when a rank raises, or, with `check`, leaves with another code.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    argv = [str(script), *map(str, arguments)]
    # All of it, as the fork server has the environment of its start.
    environ = {**os.environ, **(env or {})}
    ended = run_ranks(_as_main, ranks or 1, argv, str(cwd), store.port if ranks else None, environ, check)
    code = next((code for code, _ in ended if code), 0)
    return subprocess.CompletedProcess(argv, code, "".join(text for _, text in ended), "")


def _as_main(
    rank: int, world_size: int, argv: list[str], cwd: str, port: int | None, environ: dict[str, str], check: bool
) -> tuple[int, str]:
    """The exit code and the output of the script on this rank."""
    dist.barrier()  # a rank that is still connecting would find the connection closed
    dist.destroy_process_group()
    seat = {name: os.environ.pop(name) for name in _OF_RANKS}
    os.environ.update(environ)
    if port is not None:  # the store of the launcher, as under torchrun
        launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        os.environ.update({**seat, **launched, "TORCHELASTIC_RESTART_COUNT": "0"})
    os.chdir(cwd)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    output = io.StringIO()
    code = 0
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                runpy.run_path(argv[0], run_name="__main__")
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else int(left.code is not None)
        if check and code:
            raise RuntimeError(f"{argv[0]}: exit code {code}")
    except BaseException:
        print(output.getvalue())
        raise
    return code, output.getvalue()
