"""Who else reads parameters between a step and the next forward pass: what waits by itself, and what does not.

Gathers are late, as in test_gathering.py: what is read too early is NaN.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastopt
from fastopt.distributed import shard

from .test_gathering import WIDTH, data, late_gathers


class Net(nn.Module):
    """Parameters of its own beside those of its layers."""

    #: What the optimizer has.
    groups: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.layers = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.layers(x * self.scale)))
        return out

    def generate(self, x: Tensor) -> Tensor:
        """Goes round `forward`."""
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x)
        return out

    def scaled(self, x: Tensor) -> Tensor:
        """Reads a parameter of its own before it calls anything."""
        out: Tensor = self.layers(x * self.scale)
        return out


def stepped(rank: int, **options: Any) -> tuple[Net, Any]:
    """A net whose parameters are under way."""
    net = Net()
    opt = shard(fastopt.SGD(net.parameters(), lr=0.01), net, bucket_bytes=200, **options)
    net(data(0, rank)).square().sum().backward()
    net.groups = [p for group in opt.param_groups for p in group["params"]]
    opt.step()
    opt.zero_grad()
    return net, opt


def is_complete(tensors: Any) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors)


def saved(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def pickled(net: nn.Module) -> nn.Module:
    loaded: nn.Module = pickle.loads(pickle.dumps(net))
    return loaded


WAITING: dict[str, Callable[[Net], Any]] = {
    "deepcopy": lambda net: copy.deepcopy(net).parameters(),
    "deepcopy of a layer": lambda net: copy.deepcopy(net.head).parameters(),
    "deepcopy of layers": lambda net: copy.deepcopy(net.layers).parameters(),
    "pickle": lambda net: pickled(net).parameters(),
    "pickle of a layer": lambda net: pickled(net.layers[1]).parameters(),
    "torch.save": lambda net: saved(net).parameters(),
    "torch.save of a layer": lambda net: saved(net.head).parameters(),
    "an average begins": lambda net: AveragedModel(net).parameters(),
    "a layer alone": lambda net: [net.layers[1](data(1, 0))],
    "generate": lambda net: [net.generate(data(1, 0))],
    "a method that reads the model's own parameter": lambda net: [net.scaled(data(1, 0))],
    "a shallow copy of a layer": lambda net: [copy.copy(net.head)(data(1, 0))],
    "functional_call": lambda net: [
        torch.func.functional_call(net, {"scale": torch.zeros(WIDTH)}, (data(1, 0),)),
        torch.func.functional_call(net, dict(net.named_parameters()), (data(1, 0),)),
    ],
    "no_grad": lambda net: [torch.no_grad()(net)(data(1, 0))],
    "inference": lambda net: [torch.inference_mode()(net.eval())(data(1, 0))],
    "parameters_to_vector": lambda net: [parameters_to_vector(net.parameters())],
    "a norm": lambda net: [p.norm() for p in net.parameters()],
    "the first parameter": lambda net: [next(net.parameters())],
    "parameters of a layer, by name": lambda net: dict(net.head.named_parameters()).values(),
    "a penalty before the pass": lambda net: [
        sum(p.square().sum() for p in net.parameters()) + net(data(1, 0)).sum()  # type: ignore[list-item]
    ],
    "an average by hand": lambda net: [p.detach().clone().lerp_(p.detach(), 0.1) for p in net.parameters()],
}

BY_HAND: dict[str, Callable[[Net], Any]] = {
    "a function": lambda net: [F.linear(data(1, 0), net.head.weight, net.head.bias)],
    "the groups": lambda net: [p.norm() for p in net.groups],
}


def readers(rank: int, world_size: int) -> list[str]:
    """The names of those that have read something too early."""
    early = []
    with late_gathers():
        for name, read in (WAITING | BY_HAND).items():
            net, _ = stepped(rank)
            if not is_complete(read(net)):
                early.append(name)
            net, opt = stepped(rank)
            opt.synchronize()
            assert is_complete(read(net)), f"{name}, after synchronize"
            net, _ = stepped(rank, overlap=False)
            assert is_complete(net.parameters())
            assert is_complete(read(net)), f"{name}, without overlap"
    return early


def test_what_waits_by_itself_and_what_does_not(ranks: Any) -> None:
    """The second kind is what the page on sharding says needs `synchronize()`, or `overlap=False`."""
    for early in ranks(2).run(readers):
        assert early == list(BY_HAND)


def averages(rank: int, world_size: int) -> None:
    """An average of the weights in every step, beside one process."""
    net, reference = Net(), Net()
    opt, plain = shard(fastopt.SGD(net.parameters(), lr=0.1), net), fastopt.SGD(reference.parameters(), lr=0.1)
    mine, other = (AveragedModel(each, multi_avg_fn=get_ema_multi_avg_fn(0.5)) for each in (net, reference))
    with late_gathers():
        for step in range(3):
            net(data(step, rank)).square().sum().backward()
            for each in range(world_size):
                (reference(data(step, each)).square().sum() / world_size).backward()
            for optimizer, average, model in ((opt, mine, nn.ModuleList([net])[0]), (plain, other, reference)):
                optimizer.step()
                optimizer.zero_grad()
                average.update_parameters(model)
    for p, q in zip(mine.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_pytorchs_averages_of_weights(ranks: Any) -> None:
    ranks(2).run(averages)


def gradient_penalty(rank: int, world_size: int) -> None:
    """A loss with gradients of gradients, of inputs and of weights, beside one process."""

    def loss(model: Net, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        out = model(x).square().sum()
        by_input, by_weight = torch.autograd.grad(out, [x, model.head.weight], create_graph=True)
        return out + by_input.square().sum() + 0.1 * by_weight.square().sum()

    net, reference = Net(), Net()
    opt, plain = (fastopt.SGD(each.parameters(), lr=0.01) for each in (net, reference))
    sharded = shard(opt, net, bucket_bytes=200)
    with late_gathers():
        for step in range(3):
            loss(net, data(step, rank)).backward()
            for each in range(world_size):
                (loss(reference, data(step, each)) / world_size).backward()
            for optimizer in (sharded, plain):
                optimizer.step()
                optimizer.zero_grad()
        for p, q in zip(net.state_dict().values(), reference.state_dict().values(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_gradient_penalty(ranks: Any) -> None:
    ranks(2).run(gradient_penalty)


def test_a_copy_is_a_plain_module() -> None:
    """Its hooks serve nobody, and it trains."""
    net = Net()
    opt = shard(fastopt.SGD(net.parameters(), lr=0.1), net)
    clone = copy.deepcopy(net)
    assert list(clone.state_dict()) == list(net.state_dict())
    fresh = fastopt.SGD(clone.parameters(), lr=0.1)
    for model, optimizer in ((net, opt), (clone, fresh)):
        model(data(0, 0)).sum().backward()
        optimizer.step()
    assert all(map(torch.equal, net.parameters(), clone.parameters()))


@pytest.mark.parametrize("overlap", [True, False])
def test_one_process_needs_no_waiting(overlap: bool) -> None:
    net = Net()
    opt = shard(fastopt.SGD(net.parameters(), lr=0.1), net, overlap=overlap)
    net(data(0, 0)).sum().backward()
    opt.step()
    assert is_complete(net.parameters())


def test_a_sharded_step_is_not_captured() -> None:
    net = Net()
    opt = shard(fastopt.SGD(net.parameters(), lr=0.1), net)
    with pytest.raises(RuntimeError, match="no CUDA graph can capture"):
        opt.prepare_replay()


def at_once(rank: int, world_size: int, stage: Literal[1, 2]) -> None:
    net = Net()
    opt = shard(fastopt.SGD(net.parameters(), lr=0.01), net, stage, bucket_bytes=200, check_gradients=False)
    net(data(0, rank)).square().sum().backward()
    with late_gathers():
        opt.step()
        for module in (net, net.head):
            module.zero_grad()
        assert len(opt._gathering._pending) > 2
        for p in net.parameters():
            assert p.grad is None
            break
        assert opt._gathering.busy
    opt.synchronize()


@pytest.mark.parametrize("stage", [1, 2])
def test_what_looks_at_no_values_keeps_the_overlap(ranks: Any, stage: int) -> None:
    """`zero_grad()` of a module waits for nothing, and who takes the first parameter for its bucket alone."""
    ranks(2).run(at_once, stage)


class Stream:
    """A stream that tells whom it waits for."""

    device = torch.device("cuda", 0)

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def wait_stream(self, other: Stream) -> None:
        self.told.append(f"{self.name} waits for {other.name}")


def beside(rank: int, world_size: int) -> list[str]:
    """Parameters read on another stream than that of the step, which trains with them next."""
    told: list[str] = []
    training, side = Stream("training", told), Stream("side", told)
    current = [training]

    @contextmanager
    def switched(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    with pytest.MonkeyPatch.context() as patch, late_gathers():
        net, opt = stepped(rank)
        gathering = opt._gathering
        wait = gathering._wait
        patch.setattr(gathering, "_wait", lambda some: (told.append(f"{current[-1].name} waits"), wait(some)))
        patch.setattr(gathering, "_stream", training)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
        patch.setattr(torch.cuda, "stream", switched)
        parameters = net.head.parameters()
        with switched(side):
            assert next(parameters).isfinite().all()
        read = list(told)
        told.clear()
        assert all(p.isfinite().all() for p in parameters)
        assert set(told) <= {"training waits"}
        return read


def test_the_stream_of_the_step_waits_for_what_another_one_reads(ranks: Callable[[int], Any]) -> None:
    for read in ranks(2).run(beside):
        assert read == ["training waits", "side waits for training"]
