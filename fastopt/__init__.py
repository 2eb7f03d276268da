"""Optimizers composed of small Python functions.

`Optimizer(params, cbs, **hypers)` runs a chain of callbacks; `SGD` to `Lamb`, `Lookahead` and `ranger` are such chains.
`fastopt.distributed` shards them over the ranks of a job, `fastopt.checkpoint` saves and resumes them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import *  # noqa: F403
else:
    # Importing torch takes seconds: the command line answers without it where it can.

    def __getattr__(name: str) -> object:
        """The names of `api`, from the first use of one on."""
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        api = import_module(".api", __name__)  # not by `from`, which would ask here
        found = {each: getattr(api, each) for each in api.__all__}
        globals().update(found, __all__=list(api.__all__))
        try:
            return globals()[name]  # also a module of the package that was imported on the way
        except KeyError:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None

    def __dir__() -> list[str]:
        return sorted({*globals(), *import_module(".api", __name__).__all__})
