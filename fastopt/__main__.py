"""`python -m fastopt` is the command `fastopt`."""

from .command import main

if __name__ == "__main__":
    main(prog_name="fastopt")
