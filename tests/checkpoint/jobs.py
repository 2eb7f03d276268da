"""Models, optimizers and comparisons that several tests use."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastopt import SGD, Adam, Box
from fastopt.pieces import cut_interval


class Small(nn.Module):
    """Tied weights, a buffer, a buffer that is not saved, 0-d and empty parameters, two dtypes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(13, 6)
        self.body = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 6))
        self.scale = nn.Parameter(torch.rand(()))
        self.none = nn.Parameter(torch.empty(0, 3))
        self.narrow = nn.Parameter(torch.randn(5, 6).to(torch.bfloat16))
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.tensor([seed, 7, 9]))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        x = self.body(self.embed(tokens)) * self.scale + self.narrow.float().sum(0) + self.none.sum()
        return self.head(x)


def groups_of(model: nn.Module) -> list[list[Tensor]]:
    """Two groups of parameters: the body, and all others."""
    body = [p for n, p in model.named_parameters() if n.startswith("body")]
    return [body, [p for n, p in model.named_parameters() if not n.startswith("body")]]


def train(model: nn.Module, opt: torch.optim.Optimizer, scheduler: Any = None, steps: int = 3) -> list[float]:
    """Some steps on random tokens; the losses."""
    losses = []
    for _ in range(steps):
        tokens = torch.randint(0, 13, (8,))
        loss = nn.functional.cross_entropy(model(tokens), tokens.roll(1))
        loss.backward()
        opt.step()
        opt.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def adam_job(seed: int = 0) -> tuple[Small, Adam, torch.optim.lr_scheduler.LRScheduler]:
    """A model with an optimizer over two groups and a schedule."""
    model = Small(seed)
    opt = Adam(groups_of(model), lr=slice(1e-3, 1e-2))
    return model, opt, torch.optim.lr_scheduler.StepLR(opt, 2)


def bits(value: Any) -> Any:
    """Something that is equal exactly where values are the same bit for bit, of the same types."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), hashlib.sha256(raw).hexdigest()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value).__name__, [bits(item) for item in value]
    return type(value).__name__, value


def everything(model: nn.Module | None = None, opt: Any = None, scheduler: Any = None) -> Any:
    """All of the state of a job, as bits: to see whether it changed."""
    return bits(
        {
            "model": None if model is None else dict(model.state_dict()),
            "opt": None if opt is None else opt.state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "rng": torch.get_rng_state(),
        }
    )


def states_by_name(model: nn.Module, opt: Any) -> dict[str, Any]:
    """The states of a plain optimizer by parameter name, as bits."""
    return {name: bits(dict(opt.state[p])) for name, p in model.named_parameters() if p in opt.state}


def data_files(folder: str | Path) -> list[Path]:
    """The data files of a step folder, by name."""
    return sorted(Path(folder).glob("*.safetensors"))


def element_values(key: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A whole tensor that every rank can work out by itself from its key and shape."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Cut(SGD):
    """A stand-in for a sharded optimizer: every rank holds an even interval of every state, as tuples of pieces.

    States are set by hand: `avg` in the parameter's shape, `rows` in another shape on every rank whole, `count` 0-d,
    `step` a number. `whole=True` gives all of a parameter to one rank instead, and nothing to the others.
    """

    def __init__(self, model: nn.Module, rank: int, world: int, whole: bool = False) -> None:
        super().__init__(groups_of(model), lr=0.1, mom=0.9)
        self.rank, self.world, self.whole = rank, world, whole
        self.names = {p: name for name, p in model.named_parameters()}
        self.held: dict[Tensor, dict[str, Any]] = {}

    def param_names(self) -> dict[Tensor, str]:
        """Names by parameter."""
        return self.names

    def _interval(self, p: Tensor) -> tuple[int, int]:
        share = -(-p.numel() // self.world)
        return min(p.numel(), share * self.rank), min(p.numel(), share * (self.rank + 1))

    def owns(self, p: Tensor) -> bool:
        """With whole=True: whether this rank holds the states of `p`."""
        return [id(q) for q in self.names].index(id(p)) % self.world == self.rank

    def boxes(self, p: Tensor, shape: tuple[int, ...]) -> list[Box]:
        """What this rank holds of a state of `shape`."""
        shape = tuple(shape)
        if self.whole:
            return [Box.whole(shape)] if self.owns(p) else []
        if shape != tuple(p.shape) or not shape:
            return [Box.whole(shape)]
        start, stop = self._interval(p)
        pieces = cut_interval("", shape, start, stop, torch.empty(stop - start))
        return [piece.box for piece in pieces]

    def fill(self, only: str = "") -> None:
        """Give every parameter whose name begins with `only` the states that `expected` says."""
        for p, name in self.names.items():
            if name.startswith(only):
                self.held[p] = self.expected(p, name)

    def expected(self, p: Tensor, name: str) -> dict[str, Any]:
        """What this rank must hold of the states of `p`."""
        if self.whole and not self.owns(p):
            return {}
        shape = tuple(p.shape)
        values = {"avg": element_values(f"avg {name}", shape), "rows": element_values(f"rows {name}", (*shape[:1], 2))}
        count = torch.tensor(len(name), dtype=torch.int32)
        if self.whole:
            held: dict[str, Any] = {
                k: cut_interval(name, tuple(v.shape), 0, v.numel(), v.reshape(-1)) for k, v in values.items()
            }
            return {**held, "count": cut_interval(name, (), 0, 1, count.reshape(1)), "step": 5, "flag": True}
        start, stop = self._interval(p)
        avg: Any = values["avg"]
        if shape:
            avg = cut_interval(name, shape, start, stop, avg.reshape(-1)[start:stop])
        return {"avg": avg, "rows": values["rows"], "count": count, "step": 5, "flag": True}

    def state_dict(self) -> dict[str, Any]:
        """As a sharded optimizer's."""
        numbers = {id(p): i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        groups = super().state_dict()["param_groups"]
        return {"state": {numbers[id(p)]: dict(s) for p, s in self.held.items() if s}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what is given, after a look at the boxes."""
        params = [p for group in self.param_groups for p in group["params"]]
        for number, state in state_dict["state"].items():
            for value in state.values():
                if isinstance(value, tuple) and value:
                    assert [piece.box for piece in value] == self.boxes(params[number], value[0].shape)
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.held = {
            params[number]: dict(state)
            for number, state in state_dict["state"].items()
            if not self.whole or self.owns(params[number])
        }

    def check(self, only: str = "") -> None:
        """Assert that this rank holds exactly what `expected` says."""
        for p, name in self.names.items():
            if not name.startswith(only):
                assert p not in self.held
                continue
            wanted, held = self.expected(p, name), self.held.get(p, {})
            assert set(held) == set(wanted), (name, set(held), set(wanted))
            for key, value in wanted.items():
                assert _data(held[key]) == _data(value), (name, key)


def _data(value: Any) -> Any:
    """A state's content: whole tensors and tuples of pieces with their boxes look alike."""
    if isinstance(value, Tensor):
        value = cut_interval("", tuple(value.shape), 0, value.numel(), value.reshape(-1))
    if isinstance(value, tuple):
        return [(piece.box, bits(piece.data)) for piece in value]
    return bits(value)
