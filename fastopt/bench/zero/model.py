"""The language model that training on several ranks is timed with: plain, without dropout or positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Size:
    """A model and the tokens that one rank feeds it per iteration."""

    width: int
    hidden: int
    layers: int
    words: int
    heads: int
    batch: int
    length: int


SIZES = {
    "llama-1.36b": Size(2048, 5632, 24, 32000, 16, 4, 1024),
    "tiny": Size(32, 64, 2, 64, 4, 2, 8),
}


class Layer(nn.Module):
    """Attention and a gated MLP, each behind an RMSNorm and added to what it reads."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        d, hidden = size.width, size.hidden
        self.heads = size.heads
        self.before_attention, self.before_mlp = nn.RMSNorm(d), nn.RMSNorm(d)
        self.query, self.key, self.value, self.out = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(d, hidden, bias=False), nn.Linear(d, hidden, bias=False)
        self.down = nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, length, width]` to the same shape."""
        y = self.before_attention(x)
        q, k, v = (
            linear(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.query, self.key, self.value)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(-2))
        y = self.before_mlp(x)
        added: Tensor = self.down(F.silu(self.gate(y)) * self.up(y))
        return x + added


class LanguageModel(nn.Module):
    """Words in, the loss of the next words out."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.words, size.width)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        self.head = nn.Linear(size.width, size.words, bias=False)

    def forward(self, words: Tensor, following: Tensor) -> Tensor:
        """The mean loss; both arguments are `[batch, length]`."""
        x = self.embedding(words)
        for layer in self.layers:
            x = layer(x)
        scores = self.head(self.norm(x)).float()
        return F.cross_entropy(scores.flatten(0, 1), following.flatten())


def count_parameters(size: Size) -> int:
    """Elements of all parameters."""
    with torch.device("meta"):
        return sum(p.numel() for p in LanguageModel(size).parameters())


def batch(size: Size, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Words and the words that follow, each rank its own, the same in every run."""
    generator = torch.Generator().manual_seed(rank)
    shape = (size.batch, size.length)
    words, following = (torch.randint(size.words, shape, generator=generator) for _ in range(2))
    return words.to(device), following.to(device)
