"""Starts ranks on this machine under torchrun, and says what became of them."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from ..launch import environment, ranks
from .findings import Finding

HINTS = {
    "gloo": "if it is the network, GLOO_SOCKET_IFNAME names the interface to use (lo for one machine)",
    "nccl": "NCCL_DEBUG=INFO in the environment makes it tell what it does",
}
GRACE = 10.0
"""Seconds that torchrun has to end after its ranks have given up."""

_RAISED = re.compile(r"^(?:\[rank\d+\]:\s*)?(?:\w+\.)*(\w*(?:Error|Exception)): (.+)$", re.MULTILINE)
_OF_TORCHRUN = {"ChildFailedError"}
_LOG = re.compile(r"^[WE]\d{4} .*torch/distributed/elastic", re.MULTILINE)
_SHOWN = 20


def collectives(n: int, seconds: float) -> Iterator[Finding]:
    """The test on `n` ranks, over Gloo and, where there are as many GPUs, over NCCL."""
    yield check("gloo", n, seconds)
    gpus = torch.cuda.device_count()
    if gpus >= n and dist.is_nccl_available():
        yield check("nccl", n, seconds)
    elif gpus:
        yield Finding("ranks", "nccl", "note", f"not tried: {n} ranks take {n} GPUs, and here is {gpus}")


def check(backend: str, n: int, seconds: float) -> Finding:
    """Run `ranks.py` on `n` ranks that have `seconds`."""
    name = f"{backend} on {n} ranks"
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        start = time.perf_counter()
        code, output = _run(ranks(n, "fastopt.doctor.ranks", backend, str(result), str(seconds)), seconds + GRACE)
        took = time.perf_counter() - start
        found = json.loads(result.read_text()) if code == 0 and result.exists() else None
    if found is None:
        return Finding("ranks", name, "broken", f"{cause(output, seconds)}; {HINTS[backend]}", last_words(output))
    if found["wrong"]:
        return Finding("ranks", name, "broken", ", ".join(found["wrong"]))
    speed = f"all-reduce {found['us']:.0f} us, of 4 MiB {found['gb_per_s']:.2g} GB/s"
    return Finding("ranks", name, "ok", f"sums and a sharded step are right; {speed}; {took:.0f} s with the start")


def cause(output: str, seconds: float) -> str:
    """Why ranks failed, in one line, from what they and torchrun have printed."""
    if "Timeout (" in output:  # what faulthandler prints
        return f"the ranks were not done after {seconds:g} s"
    raised = [f"{kind}: {text}" for kind, text in _RAISED.findall(output) if kind not in _OF_TORCHRUN]
    lines = output.strip().splitlines()
    return raised[0] if raised else lines[-1] if lines else "the ranks ended without a word"


def last_words(output: str) -> str:
    """The last lines that ranks have printed, without what torchrun says about it."""
    return "\n".join(_LOG.split(output)[0].rstrip().splitlines()[-_SHOWN:])


def _run(command: list[str], seconds: float) -> tuple[int | None, str]:
    """Exit code and output of a command; it is ended, with code None, when it takes longer."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        code: int | None = None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                _end(process)
        log.seek(0)
        return code, log.read().decode(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End torchrun so that it ends its ranks, which are in sessions of their own."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    process.kill()
    process.wait()
