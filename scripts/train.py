"""Train a small GPT on bytes of text with any optimizer of fastopt, on one process or under torchrun.

    python scripts/train.py --opt adam --steps 300
    torchrun --nproc-per-node=2 scripts/train.py --stage 2 --checkpoint /tmp/run --every 50 --resume

`--help` lists the flags. Exit codes: 0 trained, or stopped by SIGTERM or SIGINT; 2 something to put right (one
sentence says what); 1 anything else.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence

from job.config import Config, parse
from job.errors import JobError


def main(arguments: Sequence[str]) -> int:
    """Run the job that the command line describes; returns the exit code."""
    try:
        config = parse(arguments)
        if config.check:
            check_places(config)
        else:
            train(config)
    except JobError as error:
        complain(str(error))
        return 2
    return 0


def check_places(config: Config) -> None:
    """Look at the text and at what is written to, so that mistakes are told before any rank starts."""
    if config.metrics:
        from job.metrics import MetricsFile

        MetricsFile(config.metrics)
    if not (config.checkpoint or config.data or config.data_limit != Config.data_limit):
        return
    from job.data import read_corpus
    from job.ranks import alone
    from job.saving import Checkpoints

    corpus = read_corpus(config.data, config.data_limit, config.context)
    from fastopt.checkpoint import CheckpointError

    try:
        Checkpoints(config, alone(), corpus.fingerprint).find()
    except CheckpointError as error:
        raise JobError(str(error)) from error


def train(config: Config) -> None:
    """Train as `config` says. Every rank calls it."""
    from job.ranks import StopRequest, connect
    from job.trainer import Trainer

    from fastopt.checkpoint import CheckpointError

    stop = StopRequest()
    ranks = connect()
    try:
        Trainer(config, ranks, stop).run()
    except CheckpointError as error:
        raise JobError(str(error)) from error


def complain(text: str) -> None:
    """Print one sentence, once: every rank sees the same mistake."""
    if os.environ.get("RANK", "0") == "0":
        print(f"train.py: {text}", file=sys.stderr, flush=True)


def run_and_leave(arguments: Sequence[str]) -> None:
    """Run `main`, then leave the way that ranks should."""
    try:
        code = main(arguments)
    except SystemExit as leaving:  # --help
        sys.exit(leaving.code)
    except KeyboardInterrupt:  # before there was a step to finish
        code = 128 + signal.SIGINT
    except Exception:
        print(f"rank {os.environ.get('RANK', '0')}:", traceback.format_exc(), file=sys.stderr)
        code = 1
    if "torch" not in sys.modules:
        sys.exit(code)
    from job.ranks import leave

    leave(code)


if __name__ == "__main__":
    run_and_leave(sys.argv[1:])
