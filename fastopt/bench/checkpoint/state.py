"""What is saved: the state of Adam for a model, sharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import Adam
from ...distributed import shard
from .settings import Settings

STATES = ("master", "grad_avg", "sqr_avg")


def gpt2(scale: float) -> dict[str, tuple[int, ...]]:
    """Shapes of GPT-2 small by name; `scale` makes all matrices narrower."""
    d = int(768 * scale) // 16 * 16
    shapes: dict[str, tuple[int, ...]] = {"wte": (50257, d), "wpe": (1024, d)}
    for i in range(12):
        for name, shape in {
            "ln_1.weight": (d,),
            "ln_1.bias": (d,),
            "attn.c_attn.weight": (d, 3 * d),
            "attn.c_attn.bias": (3 * d,),
            "attn.c_proj.weight": (d, d),
            "attn.c_proj.bias": (d,),
            "ln_2.weight": (d,),
            "ln_2.bias": (d,),
            "mlp.c_fc.weight": (d, 4 * d),
            "mlp.c_fc.bias": (4 * d,),
            "mlp.c_proj.weight": (4 * d, d),
            "mlp.c_proj.bias": (d,),
        }.items():
            shapes[f"h.{i}.{name}"] = shape
    return {**shapes, "ln_f.weight": (d,), "ln_f.bias": (d,)}


def llama(scale: float = 1.0) -> dict[str, tuple[int, ...]]:
    """Shapes of a LLaMA-like model of 1.36 billion parameters by name; `scale` makes all matrices narrower."""
    d, hidden = int(2048 * scale) // 16 * 16, int(5632 * scale) // 16 * 16
    shapes: dict[str, tuple[int, ...]] = {"embed": (32000, d)}
    for i in range(24):
        shapes |= {f"blocks.{i}.attn.{w}": (d, d) for w in "qkvo"}
        shapes |= {
            f"blocks.{i}.mlp.{w}": shape
            for w, shape in zip(("gate", "up", "down"), ((hidden, d), (hidden, d), (d, hidden)), strict=True)
        }
        shapes |= {f"blocks.{i}.{w}": (d,) for w in ("norm_1", "norm_2")}
    return {**shapes, "norm": (d,), "head": (32000, d)}


MODELS = {"gpt2": gpt2, "llama-1.36b": llama}


def shapes_of(settings: Settings) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters by name."""
    return MODELS[settings.model](settings.scale)


class Bag(nn.Module):
    """Parameters by name."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: str) -> None:
        super().__init__()
        for name, shape in shapes.items():
            p = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16, device=device))
            self.register_parameter(name.replace(".", "_"), p)


def job(settings: Settings, filled: bool = True) -> Any:
    """A sharded Adam with masters and both averages; without `filled` it has no state yet."""
    model = Bag(shapes_of(settings), settings.device)
    opt = shard(Adam(model.named_parameters(), lr=1e-3), model)
    if filled:
        fill(opt)
    return opt


def fill(opt: Any) -> None:
    """Give every parameter its three states, this rank's part, of numbers that do not repeat."""
    torch.manual_seed(opt.rank)
    for number, p in enumerate(p for group in opt.param_groups for p in group["params"]):
        n = opt.layout.interval(number, opt.rank)
        opt.state[p] = {key: torch.randn(n[1] - n[0], device=p.device) for key in STATES} | {"step": 1}


def held(opt: Any) -> list[Tensor]:
    """This rank's tensors."""
    return [value for state in opt.state.values() for value in state.values() if isinstance(value, Tensor)]
