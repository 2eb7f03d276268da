"""Sharding: `shard(opt, model)` spreads an optimizer's state over the ranks of a `torchrun` job (ZeRO 1 and 2)."""

from .checks.consistency import RanksDiffer
from .communication.collectives import Ranks
from .communication.watch import RanksMissing
from .ownership.layout import Layout
from .ownership.places import Bucket, Entry, ParamSpec, Region
from .replicas import check_replicas
from .shard import shard
from .sharded import ShardedOptimizer

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
