"""A model of a given size to plan with: the shapes of a LLaMA-like decoder, without memory."""

from __future__ import annotations

import math

import torch
from torch import nn

_WIDTH_PER_LAYER = 115  # LLaMA's 7 to 70 billion parameters have 102 to 128


class Block(nn.Module):
    """The parameters of one layer: attention, a gated MLP of 8/3 times the width, two norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = -(-8 * width // 3 // 256) * 256
        self.attention = nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict(
            {
                "gate": nn.Linear(width, inner, bias=False),
                "up": nn.Linear(width, inner, bias=False),
                "down": nn.Linear(inner, width, bias=False),
            }
        )
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])


class Decoder(nn.Module):
    """The parameters of `layers` blocks between an embedding and an output of `vocabulary` rows."""

    def __init__(self, width: int, layers: int, vocabulary: int) -> None:
        super().__init__()
        self.width, self.vocabulary = width, vocabulary
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.output = nn.Linear(width, vocabulary, bias=False)

    def groups(self, n: int) -> list[list[nn.Parameter]]:
        """The parameters in `n` groups: blocks in order, the embedding with the first, the output with the last."""
        if not 1 <= n <= len(self.layers):
            raise ValueError(f"{len(self.layers)} layers do not make {n} groups")
        size = len(self.layers) / n
        cut = [self.layers[round(i * size) : round((i + 1) * size)] for i in range(n)]
        groups = [list(blocks.parameters()) for blocks in cut]
        groups[0] = [*self.embed.parameters(), *groups[0]]
        groups[-1] += [*self.norm.parameters(), *self.output.parameters()]
        return groups


def decoder(params: float, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder of about `params` parameters on the meta device.

    Its embedding has 32,000 rows, or 256 if there are less than 1e8 parameters.
    """
    if not params >= 1e4:
        raise ValueError(f"a decoder has at least 1e4 parameters, not {params:g}")
    vocabulary = 32000 if params >= 1e8 else 256

    def block(width: int) -> int:
        return 4 * width**2 + 3 * width * (-(-8 * width // 3 // 256) * 256) + 2 * width

    def layers(width: int) -> int:
        return max(1, round((params - (2 * vocabulary + 1) * width) / block(width)))

    def misfit(width: int) -> float:
        total = layers(width) * block(width) + (2 * vocabulary + 1) * width
        return 4 * abs(math.log(total / params)) + abs(math.log(layers(width) * _WIDTH_PER_LAYER / width))

    step = 128 if params >= 1e8 else 16
    width = min(range(step, 512 * step, step), key=misfit)
    with torch.device("meta"):
        return Decoder(width, layers(width), vocabulary).to(dtype)
