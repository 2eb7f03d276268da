"""Do the ranks agree that share parameters beside those of `shard`, along the other dimensions of a mesh?

[Note: along]
A tensor parallel plan lets the ranks of a line compute one thing together. What `shard` sends goes along the other
dimension, so nothing that is sent anyhow could tell the ranks of a line from each other. They compare hypers and
freezing when `shard` is called, and then with a message every `EVERY` steps, in which a digest stands for what all
steps since the last one have used: a difference is an error on all ranks after `EVERY` steps at most, and costs no
message in the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from ..communication.collectives import ProcessGroup, control_group
from .consistency import Report, both_ways, compare, digest, equal_everywhere

EVERY = 100
"""Steps between two messages."""


class Along:
    """Compares what the ranks of some process groups use.

    Args:
        groups: those that share parameters of this rank. Making it is collective over each of them.
    """

    def __init__(self, groups: Sequence[ProcessGroup] = ()) -> None:
        self.groups = tuple(groups)
        self._control = [control_group(group) for group in groups]
        self._used = b""
        self._steps = 0

    def stepped(self, used: bytes, report: Callable[[], Report]) -> None:
        """Note a step that has used what `used` is the digest of; every `EVERY` steps compare. Collective then.

        Raises:
            RanksDiffer: on all ranks along a dimension, with what `report` says.
        """
        if not self.groups:
            return
        self._used = digest(self._used + used)
        self._steps += 1
        if self._steps % EVERY == 0:
            self.compare(report)

    def compare(self, report: Callable[[], Report]) -> None:
        """Compare what has been used since the last time, and what `report` says now. Collective.

        Raises:
            RanksDiffer: on all ranks along a dimension.
        """
        if not self.groups:
            return
        used, self._used = self._used, b""
        facts = {**report(), f"hypers and freezing in steps {self._steps - EVERY} to {self._steps}": used.hex()[:8]}
        for group in self._control:
            message = torch.tensor(both_ways(sorted(facts.items())), dtype=torch.uint8)
            dist.all_reduce(message, op=dist.ReduceOp.MAX, group=group)
            if not equal_everywhere(message.tolist()):
                reports: list[Report] = [{}] * dist.get_world_size(group)
                dist.all_gather_object(reports, facts, group=group)
                compare(reports, dist.get_process_group_ranks(group))
