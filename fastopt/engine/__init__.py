"""How a chain of callbacks runs over the tensors of a step: recorded as a program where it can be, else as it is."""

from .choice import Choice, requested
from .describe import Needs, cb_name, chain_defaults, chain_needs, keywords, undeclared
from .executors.eager import run_eager
from .recording.program import Program, Programs
from .run import Engine, executor_for
from .work import GroupWork, Reduce

__all__ = [
    "Choice",
    "Engine",
    "GroupWork",
    "Needs",
    "Program",
    "Programs",
    "Reduce",
    "cb_name",
    "chain_defaults",
    "chain_needs",
    "executor_for",
    "keywords",
    "requested",
    "run_eager",
    "undeclared",
]
