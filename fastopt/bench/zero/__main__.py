"""`python -m fastopt.bench.zero` is `fastopt bench zero`."""

from .command import main

if __name__ == "__main__":
    main(prog="python -m fastopt.bench.zero")
