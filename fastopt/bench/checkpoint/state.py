"""What is saved: the state of Adam for GPT-2 small, sharded."""

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


class Bag(nn.Module):
    """Parameters by name."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: str) -> None:
        super().__init__()
        for name, shape in shapes.items():
            p = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16, device=device))
            self.register_parameter(name.replace(".", "_"), p)


def job(settings: Settings, filled: bool = True) -> Any:
    """A sharded Adam with masters and both averages; without `filled` it has no state yet."""
    model = Bag(gpt2(settings.scale), settings.device)
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
