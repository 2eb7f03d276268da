"""Try to lose a checkpoint: kill -9 at random moments of saves, and a flipped bit in random places.

    python scripts/torture_checkpoint.py --kills 200 --s3-kills 20 --flips 1000

Ends with an error at the first checkpoint that is a mix, is lost, or is damaged without being found out. The tests run
the same in small numbers. Needs the extra `dev`: the S3 server is that of the tests.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
if TYPE_CHECKING:
    from tests.checkpoint.torture import Tally

HEAD = """# Trying to lose a checkpoint

`python scripts/torture_checkpoint.py` prints this page. Everything that is saved as step n (parameters, buffers,
states, hyper-parameters, extra) is n, so that a mix of two steps cannot hide.
"""
KILLS = """
## kill -9

One to three ranks save step after step, in 2 of 5 rounds in the background. One of them, or all, are killed at a
random moment of the first to third save, every other time near its end; the next round saves the lost step again,
beside what the dead left behind.
Each time the newest checkpoint was loaded: it was whole, and the step whose save was interrupted or the one before.
Each rank that survived raised an error.

| storage | rounds | the new step | the one before | mixed or lost | errors on survivors | slowest error | minutes |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""
FLIPS = """
## A flipped bit

In a checkpoint of two ranks, one bit at a time. Where loading refused it, loading the newest gave the one before. Where
loading went through it gave every element as it was saved: the byte is not needed for it.
`fastopt checkpoint verify` found every one.

| where | bits | loading refused | not needed for loading | not found by verify |
| --- | ---: | ---: | ---: | ---: |
"""


def report(kills: list[tuple[str, Tally, float]], flips: Counter[tuple[str, str]], seed: int) -> str:
    """The results as a page."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    text = (
        f"{HEAD}\nCommit {commit.stdout.strip() or '?'}, torch {version('torch')}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, seed {seed}.\n"
    )
    if kills:
        text += KILLS
    for what, tally, seconds in kills:
        new, before, errors = (
            tally.outcomes[outcome]
            for outcome in ("the save came through", "the one before is there", "errors of surviving ranks")
        )
        text += f"| {what} | {tally.rounds} | {new} | {before} | 0 | {errors} | {tally.slowest:.1f} s "
        text += f"| {seconds / 60:.1f} |\n"
    if flips:
        text += FLIPS
    for region in sorted({region for region, _ in flips}):
        refused = flips[region, "loading refused, verify found it"]
        unneeded = flips[region, "not needed for loading, verify found it"]
        text += f"| {region} | {refused + unneeded} | {refused} | {unneeded} | 0 |\n"
    return text


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="rounds on the local disk (%(default)s)")
    parser.add_argument("--s3-kills", type=int, default=20, help="rounds on an S3 server on loopback (%(default)s)")
    parser.add_argument("--flips", type=int, default=1000, help="flipped bits (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of all random moments and places (%(default)s)")
    parser.add_argument("--folder", help="where the checkpoints go (default: a temporary folder)")
    parser.add_argument("--report", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    logging.disable(logging.WARNING)  # of each checkpoint that is passed over
    from tests.checkpoint.s3_server import BUCKET, S3Server
    from tests.checkpoint.torture import flip_rounds, kill_rounds

    kills: list[tuple[str, Tally, float]] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.kills:
            started = time.monotonic()
            tally = kill_rounds(f"{folder}/kills", arguments.kills, arguments.seed)
            kills.append(("local disk", tally, time.monotonic() - started))
        if arguments.s3_kills:
            with S3Server() as server:
                os.environ.update(server.env)
                started = time.monotonic()
                tally = kill_rounds(f"s3://{BUCKET}/kills", arguments.s3_kills, arguments.seed, server.env)
                kills.append(("S3 (moto)", tally, time.monotonic() - started))
        flips = flip_rounds(f"{folder}/flips", arguments.flips, arguments.seed) if arguments.flips else Counter()
    text = report(kills, flips, arguments.seed)
    print(text)
    if arguments.report:
        arguments.report.write_text(text)


if __name__ == "__main__":
    main()
