"""Parameters come back under the next forward pass, and nobody reads one before it is there.

Gathers here are *late*: until somebody waits for a bucket its parameters are NaN. A model that reads one too early has
a loss that is no number.
"""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastopt
from fastopt.distributed import shard
from fastopt.distributed.communication import collectives
from fastopt.distributed.wires.wire import Wire


@contextmanager
def late_gathers() -> Iterator[None]:
    """Gathered parameters are NaN until they are waited for."""
    real = collectives.Ranks.gather

    def late(self: collectives.Ranks, wire: Wire, flat: Tensor, label: str) -> collectives.Pending:
        arrived = flat.clone()
        real(self, wire, arrived, label).wait()
        places = [slice(e.start, e.stop) for e in wire.bucket.entries if e.param in wire.params]
        for place in places:
            flat[place] = float("nan")

        def then() -> None:
            for place in places:
                flat[place] = arrived[place]

        return collectives.Pending(then=then)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives.Ranks, "gather", late)
        yield


WIDTH = 6


class Reversed(nn.Module):
    """Runs its layers in the opposite order of their registration."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            x = torch.tanh(layer(x))
        return x


class Twice(nn.Module):
    """Uses one layer twice, and shares its weight with another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.tied = nn.Linear(WIDTH, WIDTH)
        self.tied.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(torch.tanh(self.again(torch.tanh(self.first(self.again(x))))))


class ReadsWithin(nn.Module):
    """Reads parameters of modules that it does not call: a list, a dict, and another layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(WIDTH)) for _ in range(2)])
        self.shifts = nn.ParameterDict({"a": nn.Parameter(torch.zeros(WIDTH))})
        self.called, self.read = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x) * self.scales[0] * self.scales[1] + self.shifts["a"]
        return F.linear(x, self.read.weight, self.read.bias)


class Attention(nn.Module):
    """`nn.MultiheadAttention` reads its output projection without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x[:, None])[:, 0]
        return out


class Checkpointed(nn.Module):
    """Runs its layers again in backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        for layer in (*self.layers, self.layers[0]):
            x = checkpoint(lambda y, layer=layer: torch.tanh(layer(y)), x, use_reentrant=self.reentrant)
        return x


class CallsInEvaluation(nn.Module):
    """Calls a layer in evaluation, whose parameters it reads by itself in training."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(F.linear(x, self.read.weight, self.read.bias) if self.training else self.read(x))


class TwoWays(nn.Module):
    """Its own parameter is read by `forward`, and in other steps by a method that goes round it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(WIDTH)), nn.Linear(WIDTH, WIDTH)
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.scale)

    def pass_on(self, x: Tensor) -> Tensor:
        """Now through `forward`, now not."""
        self.passes += 1
        return self(x) if self.passes % 2 else self.forward(x)


def with_weight_norm() -> nn.Module:
    """The weight of a layer is made by a hook before its forward, which is older than the optimizer's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        norm = nn.utils.weight_norm  # type: ignore[attr-defined]
        return nn.Sequential(norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh(), norm(nn.Linear(WIDTH, WIDTH)))


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def with_compiled_blocks() -> nn.Module:
    return nn.Sequential(torch.compile(block(), backend="eager"), block())


def with_blocks_compiled_in_place() -> nn.Module:
    model = nn.Sequential(block(), block())
    model[0].compile(backend="eager")
    return model


def compiled_in_place() -> nn.Module:
    model = block()
    model.compile(backend="eager")
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "reversed": Reversed,
    "twice and tied": Twice,
    "reads within": ReadsWithin,
    "attention": Attention,
    "checkpointed": lambda: Checkpointed(False),
    "checkpointed, reentrant": lambda: Checkpointed(True),
    "called in evaluation": CallsInEvaluation,
    "two ways": TwoWays,
    "weight norm": with_weight_norm,
    "compiled blocks": with_compiled_blocks,
    "blocks compiled in place": with_blocks_compiled_in_place,
    "compiled in place": compiled_in_place,
}


def data(step: int, rank: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))


def never_too_early(rank: int, world_size: int) -> list[str]:
    for name, build in MODELS.items():
        torch.manual_seed(1)
        model = build()
        torch.manual_seed(1)
        reference = build()
        opt = shard(fastopt.SGD(model.parameters(), lr=0.1, mom=0.9), model, bucket_bytes=200)
        plain = fastopt.SGD(reference.parameters(), lr=0.1, mom=0.9)
        run, run_reference = (getattr(each, "pass_on", each) for each in (model, reference))
        with late_gathers():
            for step in range(4):
                if step == 2:  # another way through the same parameters
                    model.eval()
                    reference.eval()
                    with torch.no_grad():
                        torch.testing.assert_close(model(data(9, 0)), reference(data(9, 0)), msg=f"{name}, eval")
                    model.train()
                    reference.train()
                for each in range(world_size):
                    (run_reference(data(step, each)).square().sum() / world_size).backward()
                loss = run(data(step, rank)).square().sum()
                assert loss.isfinite(), f"{name}: step {step}"
                loss.backward()
                opt.step()
                plain.step()
                opt.zero_grad()
                plain.zero_grad()
            for (key, p), q in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")
    return list(MODELS)


def test_no_module_reads_a_parameter_before_it_is_there(ranks: Any) -> None:
    assert ranks(2).run(never_too_early, timeout=100) == [list(MODELS)] * 2


def layers() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(4)])


def one_step(model: nn.Module, opt: Any, rank: int) -> None:
    model(data(0, rank)).square().sum().backward()
    opt.step()
    opt.zero_grad()


def taken(model: nn.Module) -> list[nn.Parameter]:
    """The parameters as they are now, for `model.parameters()` waits for what it hands out."""
    return [p for module in model.modules() for p in module._parameters.values() if p is not None]


def complete(model: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in taken(model))


def bucket_by_bucket(rank: int, world_size: int) -> list[list[bool]]:
    """Which of four layers are still NaN before each layer of a forward pass."""
    model = layers()
    opt = shard(fastopt.SGD(model.parameters(), lr=0.01), model, bucket_bytes=4 * (WIDTH * WIDTH + 8))
    assert len(opt.layout.buckets) == 4
    seen: list[list[bool]] = []
    with late_gathers():
        one_step(model, opt, rank)
        hooks = [
            layer.register_forward_pre_hook(lambda *_: seen.append([bool(m.weight.isnan().any()) for m in model]))
            for layer in model
        ]
        model(data(1, rank))
        for hook in hooks:
            hook.remove()
    return seen


def test_a_layer_waits_for_its_own_bucket_and_no_other(ranks: Any) -> None:
    for seen in ranks(2).run(bucket_by_bucket):
        assert seen == [[k > i for k in range(4)] for i in range(4)]


def everything_else(rank: int, world_size: int) -> None:
    """What reads or writes parameters without a forward pass."""

    def pending(stage: int = 2) -> tuple[nn.Module, Any]:
        model = layers()
        opt = shard(fastopt.SGD(model.parameters(), lr=0.01), model, stage=stage)
        one_step(model, opt, rank if stage == 2 else 0)
        assert taken(model)[0].isnan().all()
        return model, opt

    with late_gathers():
        model, opt = pending()
        opt.synchronize()
        assert complete(model)
        model, opt = pending()
        assert all(value.isfinite().all() for value in model.state_dict().values())
        model, opt = pending()
        assert all(value.isfinite().all() for value in model[2].state_dict().values())
        model, opt = pending()
        model.load_state_dict(layers().state_dict())
        opt.synchronize()
        assert all(map(torch.equal, model.parameters(), layers().parameters()))
        model, opt = pending()
        opt.freeze_to(0)
        assert complete(model)
        model, opt = pending(stage=1)
        opt.unfreeze()
        wrapped = DistributedDataParallel(model)
        assert complete(wrapped)
        model, opt = pending()
        model.eval()
        model[0](data(0, 0))
        assert complete(model)
        # A step on what the one before has left under way.
        model, opt = pending()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        opt.synchronize()
        assert complete(model)
        # A forward pass of a copy is none of the model.
        model, opt = pending()
        clone = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        with torch.no_grad():
            for p in clone.parameters():
                p.zero_()
        one_step(model, opt, rank)
        clone(data(0, 0))
        assert not complete(model)
        opt.synchronize()


def test_what_waits_for_everything(ranks: Any) -> None:
    ranks(2).run(everything_else)


def sharded_anew(rank: int, world_size: int) -> None:
    """A new `shard` of a model waits for the step of the one before, and does not keep its memory."""
    model = layers()
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    with late_gathers():
        for size in (200, 300, 400):
            opt = shard(fastopt.SGD(model.parameters(), lr=0.01), model, bucket_bytes=size)
            assert complete(model)
            one_step(model, opt, rank)
            assert not complete(model)
            flat = weakref.ref(opt._buffers.buckets[0].flat)
        shard(fastopt.SGD(model.parameters(), lr=0.01), model)
        assert complete(model)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks + len(list(model.modules()))
    del opt
    gc.collect()
    assert flat() is None


def test_a_model_is_sharded_anew(ranks: Any) -> None:
    ranks(2).run(sharded_anew)


def without_a_forward_pass(rank: int, world_size: int) -> None:
    """Parameters that no module has been called for are complete when `step` returns."""
    model = layers()
    opt = shard(fastopt.SGD(model.parameters(), lr=0.01), model)
    with late_gathers():
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        assert complete(model)
        # One layer is called, the others are read by hand.
        model[0](data(0, 0)).sum().backward()
        F.linear(data(0, 0), model[1].weight).sum().backward()
        opt.step()
        assert complete(model)


def test_parameters_that_are_read_by_hand_are_there_after_the_step(ranks: Any) -> None:
    ranks(2).run(without_a_forward_pass)
