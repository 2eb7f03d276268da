"""Parameters come back from their owners while the next forward pass runs.

[Note: gathering]
After a step the bucket that the first layers need is gathered first, then the next one, and `step` returns. A hook
before the forward of each module waits for exactly the buckets that it reads: those of its own parameters, and of
the modules within it that are not called by themselves (a container, or the output projection that
`nn.MultiheadAttention` reads without calling it). Which modules are called is seen in the forward pass before the step;
a bucket with a parameter that no called module would wait for is waited for in `step`. So are the model's own
parameters, which methods beside `forward` read, too: they are in the first bucket, which the next pass needs first. Our
hooks come before those of others, which may read parameters (`nn.utils.weight_norm`).

A hook inside of `torch.compile` leaves nothing in the graph, but notes while it is traced that its module does not wait
by itself: the nearest module around it that is called eagerly does. Outside of training (`model.eval()`) modules may
take other ways through their parameters, so that the first one called waits for everything, and which they are says
nothing about training.

Whoever reads or writes parameters otherwise (`model.state_dict()` and `load_state_dict`, copying and pickling a module,
freezing, the next step) calls `synchronize` first, and `model.parameters()` waits for what it hands out (readers.py).
Code that has the tensors themselves does so by itself, or there is no overlap: nothing tells of a kernel that reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ..communication.collectives import Pending, Ranks
from ..communication.profiler_label import label
from ..wires.wire import Wire
from .buckets import Buffers

_numbers = itertools.count()
_numbered: WeakValueDictionary[int, Gathering] = WeakValueDictionary()


class Gathering:
    """The buckets under way, and who waits for which.

    Args:
        ranks: who takes part.
        buffers: the parameters.
        model: the module that has them.
        averages: whether gradients are averaged here, so that DistributedDataParallel must not do it too.
        on_load: called before a module loads a state dict.
    """

    def __init__(
        self,
        ranks: Ranks,
        buffers: Buffers,
        model: nn.Module,
        averages: bool = False,
        on_load: Callable[[], None] = lambda: None,
    ) -> None:
        self._averages, self._on_load = averages, on_load
        self._ranks, self._buffers = ranks, buffers
        self._pending: dict[int, Pending] = {}
        self._on_gpu = any(p.is_cuda for p in buffers.params)
        self._stream: Any = None  # that of the last step, which trains with what comes back
        self.number = next(_numbers)
        _numbered[self.number] = self
        self._modules = list(model.modules())
        number = {id(module): k for k, module in enumerate(self._modules)}
        self._children = [[number[id(child)] for child in module.children()] for module in self._modules]
        self._own: list[set[int]] = []
        self._needs: list[frozenset[int]] = []
        self._loose: frozenset[int] = frozenset()
        self._known: frozenset[int] | None = None
        self._called: set[int] = set()
        self._traced: set[int] = set()
        self._hooks: list[RemovableHandle] = []
        self.watch()
        if not ranks.alone:
            for earlier in _gatherings_of(model):
                earlier.leave()
            for k, module in enumerate(self._modules):
                # What is copied and pickled comes in this order: the hook, which waits, and then the parameters.
                module.__dict__["_parameters"] = module.__dict__.pop("_parameters")
                self._hooks += [
                    module.register_forward_pre_hook(_Before(self, k), prepend=True),
                    module.register_state_dict_pre_hook(_Everything(self)),  # type: ignore[no-untyped-call]
                    module.register_load_state_dict_pre_hook(_Load(self)),  # type: ignore[no-untyped-call]
                ]

    def leave(self) -> None:
        """Leave the modules, and the memory with them, if all parameters have gone to another optimizer's buffers."""
        if not self._buffers.deserted:
            return
        self.synchronize()
        while self._hooks:
            self._hooks.pop().remove()

    def watch(self) -> None:
        """Take in the parameters that the buffers have."""
        places = {id(p): self._buffers.layout.place(i)[0].index for i, p in enumerate(self._buffers.params)}
        self._own = [
            {places[id(p)] for p in module.parameters(recurse=False) if id(p) in places} for module in self._modules
        ]
        self._places = places
        self._known = None

    def begin(self, wire: Wire) -> None:
        """Begin to bring a bucket from its owners to all ranks. Collective."""
        flat = self._buffers.buckets[wire.bucket.index]
        with label(f"fastopt gather {flat.label}"):
            self._pending[wire.bucket.index] = self._ranks.gather(wire, flat.flat, f"gather {flat.label}")

    def begun(self) -> None:
        """All buckets that have stepped are under way: wait for those that no module will wait for."""
        self._stream = torch.cuda.current_stream() if self._on_gpu else None
        self._called.clear()
        self._wait(self._loose)

    def synchronize(self) -> None:
        """Wait until every parameter is complete (on CUDA: for what is enqueued next)."""
        self._wait(frozenset(self._pending))

    def complete(self, p: Tensor) -> None:
        """Wait for one parameter, if it is among those under way; on another stream than that of the step, both do."""
        bucket = self._places.get(id(p))
        if bucket not in self._pending:
            return
        here = None if self._stream is None else torch.cuda.current_stream(self._stream.device)
        if here is None or here == self._stream:
            self._wait(frozenset([bucket]))
            return
        with torch.cuda.stream(self._stream):
            self._wait(frozenset([bucket]))
        here.wait_stream(self._stream)

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        return bool(self._pending)

    def before(self, k: int, module: nn.Module) -> None:
        """Module number `k` is about to run."""
        if module is not self._modules[k]:
            self.synchronize()  # a shallow copy, which has the same parameters
            return
        if k == 0:
            self._check_around(module)
        if module.training:
            self._called.add(k)
            if self._pending:
                self._wait(self._needs[k])
        else:
            self.synchronize()

    def _check_around(self, model: nn.Module) -> None:
        """Refuse DistributedDataParallel where gradients are averaged here, and where it goes on without some ranks."""
        wrapped = isinstance(model, DistributedDataParallel)
        around: Any = model if wrapped else getattr(DistributedDataParallel, "_active_ddp_module", None)
        if around is None:
            return
        if self._averages:
            raise RuntimeError(
                "the model is called inside DistributedDataParallel, which averages the gradients that shard(stage=2) "
                "averages: call the model itself, or use shard(..., stage=1)"
            )
        join = getattr(around, "_join_config", None)  # a private name
        if join is not None and join.enable and not join.throw_on_early_termination:
            raise RuntimeError(
                "inside DistributedDataParallel.join() a rank that has no more data leaves the others alone in step(), "
                "which needs all of them: give every rank as many batches (DistributedSampler does), or use "
                "join(throw_on_early_termination=True), which ends the loop on all ranks together"
            )

    def before_load(self) -> None:
        """A module is about to load a state dict."""
        self.synchronize()
        self._on_load()

    def traced(self, k: int) -> None:
        """Module number `k` is being compiled into something that will not call its hook."""
        self._traced.add(k)
        self.synchronize()

    def _wait(self, buckets: frozenset[int]) -> None:
        for index in sorted(buckets & self._pending.keys()):
            with label(f"fastopt wait for {self._buffers.buckets[index].label}"):
                self._pending.pop(index).wait()

    def plan(self) -> None:
        """Who waits for which buckets in the next forward pass, going by the modules that the last one called."""
        called = frozenset(self._called - self._traced)
        self._called.clear()
        if called == self._known:
            return
        # Children come after their parents in the list of modules, except for those that are shared.
        needs: list[frozenset[int] | None] = [None] * len(self._modules)
        loose: set[int] = set()

        def needed(k: int) -> frozenset[int]:
            found = needs[k]
            if found is None:
                inner = [needed(child) for child in self._children[k] if child not in called]
                found = needs[k] = frozenset(self._own[k]).union(*inner)
            return found

        def visit(k: int) -> None:
            """Collect what is read below a module that nobody waits for."""
            if k in called:
                return
            loose.update(self._own[k])
            for child in self._children[k]:
                visit(child)

        self._needs = [needed(k) for k in range(len(self._modules))]
        visit(0)
        loose.update(self._own[self._outermost()])
        held_by_modules = set[int]().union(*self._own)
        loose.update(flat.bucket.index for flat in self._buffers.buckets if flat.bucket.index not in held_by_modules)
        self._known, self._loose = called, frozenset(loose)

    def _outermost(self) -> int:
        """The model itself, within what wraps it."""
        k = 0
        while not self._own[k] and len(self._children[k]) == 1:
            k = self._children[k][0]
        return k


def _note_trace(number: int, k: int) -> int:
    """Runs while a graph is traced, and is a constant in it. Takes nothing but constants."""
    _numbered[number].traced(k)
    return k


# What `torch.compiler.assume_constant_result` does, but for importing Dynamo, which takes a second of every start.
_note_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]


def under_way() -> list[Gathering]:
    """All of this process that bring parameters now."""
    return [gathering for gathering in list(_numbered.values()) if gathering.busy]


def synchronize_model(model: nn.Module) -> None:
    """Wait for every parameter of `model`, which may wrap one that has been sharded or have parts of one."""
    for gathering in _gatherings_of(model):
        gathering.synchronize()


def _gatherings_of(model: nn.Module) -> list[Gathering]:
    """All that serve modules of `model`."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return list({hook.gathering: None for hook in hooks if isinstance(hook, _Before) and hook.gathering is not None})


class _Before:
    """The hook before the forward of a module. A copy of the model waits, and does not copy what it serves."""

    def __init__(self, gathering: Gathering | None, k: int) -> None:
        self.gathering, self.k = gathering, k
        self.number = -1 if gathering is None else gathering.number

    def __call__(self, module: nn.Module, _: Any) -> None:
        """Wait for what the module reads."""
        if self.gathering is None:
            return
        if torch.compiler.is_compiling():
            _note_trace(self.number, self.k)
            return
        self.gathering.before(self.k, module)

    def __reduce__(self) -> tuple[Callable[..., _Before], tuple[None, int]]:
        if self.gathering is not None:
            self.gathering.synchronize()
        return _Before, (None, self.k)


class _Everything:
    """The hook before a module's state is read or written."""

    def __init__(self, gathering: Gathering | None) -> None:
        self.gathering = gathering

    def __call__(self, *_: Any) -> None:
        """Wait for every parameter."""
        if self.gathering is not None:
            self.gathering.synchronize()

    def __reduce__(self) -> tuple[type[_Everything], tuple[None]]:
        return type(self), (None,)


class _Load(_Everything):
    """The hook before a module loads a state dict."""

    def __call__(self, *_: Any) -> None:
        """Wait for every parameter."""
        if self.gathering is not None:
            self.gathering.before_load()
