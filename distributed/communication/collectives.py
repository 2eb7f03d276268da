"""The collectives that sharding uses, each behind one small method, and the same methods where there is one rank.

Tensors of parameters and gradients go over the group's own backend (NCCL or Gloo). What the ranks tell each other about
themselves (do we agree, which gradients exist) goes over Gloo on CPU memory: it never waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from ..wires.packing import own_part, own_spans, unpack
from ..wires.wire import Wire
from .hybrid import ThenAcross
from .transport import GroupTransport, Transport, Work, over_gloo
from .watch import Watch

ProcessGroup = dist.ProcessGroup

# How many `Ranks` there have been of each group: the same on all its ranks.
_made: dict[str, int] = {}


class Pending:
    """A collective under way; `wait` returns when its result may be used (on CUDA: by what is enqueued next).

    `then` is called once, when the collective is done, to bring the result to its place. `waiting` is entered around
    waits.
    """

    def __init__(
        self,
        work: Work | None = None,
        then: Callable[[], None] | None = None,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._work = work
        self._then = then
        self.waiting = waiting

    def arrive(self) -> None:
        """Wait for what has been received, as it is."""
        if self._work is not None:
            with self.waiting():
                self._work.wait()

    def wait(self) -> None:
        """Wait for all of it."""
        self.arrive()
        self.finish()

    def finish(self) -> None:
        """Bring to its place what has been waited for."""
        self._work = None
        then, self._then = self._then, None
        if then is not None:
            then()


class Reduction:
    """A bucket's gradient being summed over the ranks.

    Attributes:
        mine: this rank's part of the sum, header included, once waited for.
    """

    def __init__(
        self,
        mine: Tensor,
        work: Work | None = None,
        received: Tensor | None = None,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.mine = mine
        self._received = received
        self._pending = Pending(work, self._add_up, waiting)

    def _add_up(self) -> None:
        """Sum what every rank has sent, in the order of the ranks: the result does not depend on who came first."""
        if self._received is not None:
            add_in_order(self._received, self.mine)
            self._received = None

    def arrive(self) -> None:
        """Wait until what was to be summed has been sent and what it takes here has come."""
        self._pending.arrive()

    def wait(self) -> None:
        """Wait for the sum."""
        self._pending.wait()

    def finish(self) -> None:
        """Add up what has been waited for."""
        self._pending.finish()

    def read(self, start: int, stop: int) -> Reading:
        """Numbers `start` to `stop` of the sum for the host, without making the device's stream wait for them."""
        return Reading(self._pending, lambda: self._numbers(start, stop), self.mine.device)

    def _numbers(self, start: int, stop: int) -> Tensor:
        if self._received is None:
            return self.mine[start:stop].float()
        return self._received.view(-1, self.mine.numel())[:, start:stop].float().sum(0)


def add_in_order(received: Tensor, total: Tensor) -> None:
    """Sum what every rank has sent, one after the other in `received`, into `total` in the order of the ranks."""
    by_rank = received.view(-1, total.numel())
    total.copy_(by_rank[0])
    for other in by_rank[1:]:
        total.add_(other)


class Reading:
    """A few numbers on their way to the host."""

    def __init__(self, pending: Pending, numbers: Callable[[], Tensor], device: torch.device) -> None:
        self._pending, self._numbers = pending, numbers
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            stream = _side_stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                pending.arrive()
                found = numbers()
                self._host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
                self._host.copy_(found, non_blocking=True)
                self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._event.record()

    def get(self) -> list[float]:
        """The numbers; waits for them."""
        if self._event is None:
            self._pending.arrive()
            self._host = self._numbers()
        else:
            with self._pending.waiting():
                self._event.synchronize()
        values: list[float] = self._host.tolist()
        return values


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which numbers are brought to the host."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@dataclass
class Ranks:
    """This process's seat among the ranks that share an optimizer: its number, their number, and how to reach them.

    `group` is None where no process group is initialised: one rank, and no method communicates. There may be several
    `copies` of these ranks, see [Note: hybrid sharding] in meshes.py: then `replicas` are the ranks that have the same
    part as this one, `control` reaches the ranks of all copies, and `beside` moves CPU memory inside this one.
    `transport` moves buckets, and `watch` knows who did not come.
    """

    rank: int = 0
    world_size: int = 1
    group: ProcessGroup | None = None
    control: ProcessGroup | None = field(default=None, repr=False)
    copies: int = 1
    replicas: ProcessGroup | None = field(default=None, repr=False)
    beside: ProcessGroup | None = field(default=None, repr=False)
    transport: Transport = field(init=False, repr=False)
    watch: Watch = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.transport = GroupTransport(self.group)
        store = None if self.group is None or self.alone else _store(self.group)
        self.watch = Watch(self.rank, self.world_size, store)

    @classmethod
    def of(cls, group: ProcessGroup | None = None) -> Ranks:
        """The ranks of `group` (of all processes by default). Collective over `group`."""
        if not (dist.is_available() and dist.is_initialized()):
            if group is not None:
                raise ValueError("a process group was given, but torch.distributed is not initialised")
            return cls()
        group = dist.group.WORLD if group is None else group
        assert group is not None
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(f"rank {dist.get_rank()} is not a member of the process group given to shard()")
        world_size = dist.get_world_size(group)
        if world_size == 1:
            return cls(0, 1, group)
        return cls(rank, world_size, group, control_group(group))

    @property
    def alone(self) -> bool:
        """Whether there is nobody to talk to."""
        return self.world_size == self.copies == 1

    @property
    def copy(self) -> int:
        """Which of the copies this rank belongs to."""
        return 0 if self.replicas is None else dist.get_rank(self.replicas)

    @property
    def total(self) -> int:
        """The number of ranks of all copies, over which gradients are averaged."""
        return self.world_size * self.copies

    def reaches(self, device: torch.device) -> bool:
        """Whether the group's backend moves tensors of `device`."""
        return self.alone or device.type in _device_types(self.group)

    def _global(self, rank: int) -> int:
        """The number that `torch.distributed` knows rank `rank` of the group by."""
        assert self.group is not None
        return dist.get_global_rank(self.group, rank)

    def _group_for(self, tensor: Tensor) -> ProcessGroup | None:
        """The group that moves `tensor`: counts and buffers may be on the CPU beside a model on GPUs."""
        return self.group if self.reaches(tensor.device) else self.beside or self.control

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite `tensor` with rank 0's."""
        if self.alone or not tensor.numel():
            return
        data = tensor.detach()
        whole = data if data.is_contiguous() else data.contiguous()
        if self.replicas is not None and not self.reaches(data.device):
            assert self.control is not None
            dist.broadcast(whole, dist.get_global_rank(self.control, 0), group=self.control)
        else:
            if self.replicas is not None:
                dist.broadcast(whole, dist.get_global_rank(self.replicas, 0), group=self.replicas)
            if self.world_size > 1:
                dist.broadcast(whole, self._global(0), group=self._group_for(data))
        if whole is not data:
            data.copy_(whole)

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the ranks, in place."""
        if self.world_size > 1:
            with self._talking("a sum of norms"):
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def largest(self, tensor: Tensor) -> Tensor:
        """`tensor` maximised over the ranks, in place."""
        if self.world_size > 1:
            with self._talking("a maximum of norms"):
                dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def reduce(
        self, wire: Wire, full: Tensor, dtype: torch.dtype | None = None, label: str = "a reduction"
    ) -> Reduction:
        """Sum `full` `[wire.numel]` over the ranks; each gets its part. One collective.

        Args:
            wire: how `full` is cut into parts.
            full: must live until the reduction has been waited for; its contents are undefined afterwards.
            dtype: of the sum, which is then made in the order of the ranks; None leaves the summing to the backend, if
                all parts are equally long.
            label: what to call it.
        """
        size = wire.sizes[self.rank]
        if self.alone:
            return Reduction(full if dtype is None else full.to(dtype))
        self.watch.began(label)
        waiting = partial(self.watch.waiting, label)
        if self.world_size == 1:
            mine = full if dtype is None else full.to(dtype)
            return Reduction(mine, self._across(None, mine), waiting=waiting)
        mine = full.new_empty(size, dtype=dtype)
        if dtype is None and wire.even:
            return Reduction(mine, self._across(self.transport.reduce_scatter(mine, full), mine), waiting=waiting)
        received = full.new_empty(size * self.world_size)
        work = self.transport.all_to_all(received, full, [size] * self.world_size, wire.sizes)
        if self.replicas is None:
            return Reduction(mine, work, received, waiting)
        return Reduction(mine, self._across(work, mine, partial(add_in_order, received, mine)), waiting=waiting)

    def _across(self, work: Work | None, mine: Tensor, then: Callable[[], None] | None = None) -> Work | None:
        """`work` and, where there are copies of these ranks, the sum of `mine` over them."""
        return work if self.replicas is None else ThenAcross(work, mine, then, self.replicas)

    def gather(self, wire: Wire, flat: Tensor, label: str = "a gather") -> Pending:
        """Fill the flat buffer `flat` of a bucket with the parts of their owners. One collective.

        What is not on the wire is left alone.
        """
        if self.world_size == 1 or not wire.numel:
            return Pending()
        self.watch.began(label)
        waiting = partial(self.watch.waiting, label)
        if wire.even:
            spans = [flat[start:stop] for start, stop in wire.spans or ()]
            return Pending(self.transport.all_gather(spans, own_spans(wire, flat, self.rank)), waiting=waiting)
        mine = own_part(wire, flat, self.rank)
        received = flat.new_empty(wire.numel) if wire.spans is None else flat
        then = partial(unpack, wire, received, flat) if wire.spans is None else None
        sizes = [mine.numel()] * self.world_size
        work = self.transport.all_to_all(received, mine.repeat(self.world_size), wire.sizes, sizes)
        return Pending(work, then, waiting)

    def largest_bytes(self, message: Tensor) -> Tensor:
        """The byte-wise maximum over the ranks of a uint8 CPU tensor, in place (the control message of a step)."""
        if not self.alone:
            with self._talking():
                dist.all_reduce(message, op=dist.ReduceOp.MAX, group=self.control)
        return message

    @contextmanager
    def _talking(self, label: str = "a message") -> Iterator[None]:
        """Around a collective that is waited for at once."""
        self.watch.began(label)
        with self.watch.waiting(label):
            yield

    def gather_everywhere(self, thing: Any) -> list[Any]:
        """Every rank's `thing`, in the order of the ranks, those of all copies one copy after the other."""
        if self.alone:
            return [thing]
        things: list[Any] = [None] * self.total
        with self._talking():
            dist.all_gather_object(things, thing, group=self.control)
        return things

    def gather_objects(self, thing: Any) -> list[Any]:
        """The `thing` of every rank of this copy, in the order of the ranks."""
        if self.replicas is None:
            return self.gather_everywhere(thing)
        first = self.copy * self.world_size
        return self.gather_everywhere(thing)[first : first + self.world_size]

    def gather_parts(self, mine: Tensor, sizes: list[int], to: int) -> list[Tensor] | None:
        """The 1-d tensors of all ranks (`sizes[r]` elements on rank `r`) on rank `to`, None on the others."""
        if self.world_size == 1:
            return [mine]
        longest = max(sizes)
        if not longest:
            return [mine] * self.world_size if self.rank == to else None
        padded = mine.new_zeros(longest)
        padded[: mine.numel()] = mine
        parts = [torch.empty_like(padded) for _ in sizes] if self.rank == to else None
        dist.gather(padded, parts, dst=self._global(to), group=self._group_for(mine))
        return None if parts is None else [part[:n] for part, n in zip(parts, sizes, strict=True)]

    def move(self, tensor: Tensor, source: int, to: int) -> None:
        """Bring `tensor` from rank `source` into `tensor` of rank `to`; both call it, nobody else has to."""
        if source == to:
            return
        # Gloo sends what lies at an address, and can read none of a GPU's.
        by_host = tensor.device.type != "cpu" and over_gloo(self._group_for(tensor), tensor.device)
        if self.rank == source:
            sent = tensor.contiguous().cpu() if by_host else tensor.contiguous()
            dist.send(sent, self._global(to), group=self._group_for(sent))
        elif self.rank == to:
            received = torch.empty_like(tensor, device="cpu") if by_host else tensor
            dist.recv(received, self._global(source), group=self._group_for(received))
            if by_host:
                tensor.copy_(received)


def _device_types(group: ProcessGroup | None) -> set[str]:
    """The device types that `group` has a backend for."""
    config = dist.get_backend_config(group)
    return {part.partition(":")[0] for part in config.split(",")}


def _store(group: ProcessGroup) -> Store | None:
    """A place in the store of the process group that is used by one `Ranks` of these ranks."""
    try:
        store = dist.distributed_c10d._get_default_store()
    except (AttributeError, RuntimeError):  # a private name
        return None
    number = _made[group.group_name] = _made.get(group.group_name, 0) + 1
    return PrefixStore(f"fastopt/{group.group_name}/{number}", store)


def control_group(group: ProcessGroup, members: Sequence[int] | None = None) -> ProcessGroup:
    """A group of the ranks of `group`, or of `members`, that moves CPU memory: `group` if it can, else one of Gloo."""
    if members is None and "cpu" in _device_types(group):
        return group
    members = dist.get_process_group_ranks(group) if members is None else list(members)
    # some ranks alone find each other by how many groups a rank is in, which need not be the same on all of them
    made = dist.new_group(members, backend="gloo", use_local_synchronization=len(members) < dist.get_world_size())
    assert isinstance(made, ProcessGroup)
    return made
