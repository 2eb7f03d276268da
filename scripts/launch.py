"""torchrun without its tracebacks: what the ranks have said is enough.

    python scripts/launch.py --standalone --nproc-per-node=2 scripts/train.py ...

A signal goes on to the ranks, which end after the step under way. Exit codes: 0 all ranks ended well; else that of the
first one that did not; 128 and the number of the signal where one came.
"""

from __future__ import annotations

import signal
import sys


def launch() -> int:
    """Run torchrun with the arguments of this process; returns the exit code."""
    try:
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import main
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    try:
        main()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"rank {rank} ended with exit code {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(launch())
