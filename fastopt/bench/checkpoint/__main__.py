"""`python -m fastopt.bench.checkpoint` is `fastopt bench checkpoint`."""

from .command import main

if __name__ == "__main__":
    main(prog="python -m fastopt.bench.checkpoint")
