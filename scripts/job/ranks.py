"""The processes of the job: how they find each other, agree, and leave."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn, Self, TypeVar

import torch
import torch.distributed as dist

from .errors import JobError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks of the job; a single process needs no process group."""

    rank: int
    world: int
    local_world: int
    device: torch.device
    attempt: int
    """How often torchrun has restarted the job."""

    def __str__(self) -> str:
        return "1 rank" if self.world == 1 else f"{self.world} ranks"

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums over all ranks, in float64. Every rank calls it with as many values."""
        vector = torch.tensor(list(values), dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(vector)
        return [float(value) for value in vector]

    def gather(self, value: Any) -> list[Any]:
        """Everybody's `value`, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank; where rank 0 raises, every rank raises a JobError with its words."""
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = make()
            except Exception as error:
                answer[1] = str(error)
        value, complaint = self.gather(answer)[0]
        if complaint is not None:
            raise JobError(complaint)
        made: T = value
        return made


def alone() -> Ranks:
    """This process by itself, on the CPU."""
    return Ranks(rank=0, world=1, local_world=1, device=torch.device("cpu"), attempt=0)


def connect() -> Ranks:
    """Join the process group that torchrun's environment describes, or be a single process without one.

    Raises JobError where this machine has GPUs, but fewer than ranks.
    """
    env = os.environ
    world, local_rank = int(env.get("WORLD_SIZE", "1")), int(env.get("LOCAL_RANK", "0"))
    local_world = int(env.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if local_world > gpus:
            raise JobError(
                f"{local_world} ranks need as many GPUs and this machine has {gpus}: start fewer ranks, or train on "
                f"its CPUs with CUDA_VISIBLE_DEVICES= (empty)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    ranks = Ranks(
        rank=int(env.get("RANK", "0")),
        world=world,
        local_world=local_world,
        device=device,
        attempt=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )
    if world > 1:
        # Small values that the ranks agree on travel as CPU tensors, so Gloo is there beside NCCL.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=_store(ranks), rank=ranks.rank, world_size=world)
    return ranks


def _store(ranks: Ranks) -> Any:
    """The store to meet at. See [Note: meeting again after a restart]."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    # torch exports neither store class to type checkers.
    store = dist.TCPStore(host, port, ranks.world, is_master=ranks.rank == 0 and not agents)  # type: ignore[attr-defined]
    one_node = ranks.local_world == ranks.world
    prefix = f"attempt{ranks.attempt if one_node else 0}"
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]


"""
[Note: meeting again after a restart]
When torchrun restarts a job (`--max-restarts`) it may hand the new processes the store of the old ones, at the same
address. Gloo would read the dead ranks' addresses there and hang, or fail to connect. So the keys of each attempt get
a prefix of their own. The number of the attempt is the agent's, so it is common to all ranks on one node only; on
several nodes, start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which gives every attempt a new store.
"""


def share_cores(ranks: Ranks, threads: int) -> int:
    """Set this rank's CPU threads: `threads`, or with 0 an even share of the cores of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = threads or max(1, cores // ranks.local_world)
    torch.set_num_threads(count)
    return count


class StopRequest:
    """Remembers that SIGTERM or SIGINT came, so that the step under way is finished first.

    With `with` it does so until the end of the block, otherwise until the process ends.
    """

    def __init__(self) -> None:
        self.name = ""
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def __bool__(self) -> bool:
        return bool(self.name)


def leave(code: int) -> NoReturn:
    """End this process. Ranks that end well leave together; a Gloo rank may abort in an ordinary interpreter exit."""
    if dist.is_initialized() and code == 0:
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
