"""Sharding: `shard(opt, model)` spreads an optimizer's state over the ranks of a `torchrun` job (ZeRO 1 and 2)."""

from .collectives import Ranks
from .consistency import RanksDiffer
from .layout import Layout
from .places import Bucket, Entry, ParamSpec, Region
from .replicas import check_replicas
from .shard import shard
from .sharded import ShardedOptimizer
from .watch import RanksMissing

__all__ = [
    "Bucket",
    "Entry",
    "Layout",
    "ParamSpec",
    "Ranks",
    "RanksDiffer",
    "RanksMissing",
    "Region",
    "ShardedOptimizer",
    "check_replicas",
    "shard",
]
