"""Executors: how a chain of callbacks runs over the tensors of a step."""

from .choice import Choice, choose
from .describe import Needs, cb_name, chain_defaults, chain_needs, keywords
from .eager import run_eager
from .work import GroupWork, Reduce

__all__ = [
    "Choice",
    "GroupWork",
    "Needs",
    "Reduce",
    "cb_name",
    "chain_defaults",
    "chain_needs",
    "choose",
    "keywords",
    "run_eager",
]
