"""`python -m fastopt.bench.step` is `fastopt bench step`."""

from .command import main

if __name__ == "__main__":
    main(prog="python -m fastopt.bench.step")
