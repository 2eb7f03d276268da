"""A small GPT over bytes: rotary positions, pre-norm blocks, no biases, no dropout (so no random numbers at all).

Shape letters: B rows, T positions, C channels of the residual stream, H heads, D = C / H.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SYMBOLS = 256


@functools.lru_cache(maxsize=4)
def rotary_table(length: int, dims: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle of each position and pair of channels, both `[length, dims / 2]`."""
    half = dims // 2
    pace = 10000.0 ** (-torch.arange(half, device=device) / half)
    angle = torch.arange(length, device=device)[:, None] * pace
    return angle.cos(), angle.sin()


def rotate(x: Tensor) -> Tensor:
    """Turn the pairs of channels of `x` `[..., T, D]` by the angles of their positions."""
    cos, sin = (table.to(x.dtype) for table in rotary_table(x.shape[-2], x.shape[-1], x.device))
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    """Causal self-attention with rotary positions (Su et al. 2021, arXiv:2104.09864)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, C]` to `[B, T, C]`."""
        rows, length, width = x.shape
        q, k, v = self.qkv(x).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # 3 of [B, H, T, D]
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(rows, length, width))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attn = Attention(width, heads)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, C]` to `[B, T, C]`."""
        x = x + self.attn(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Predicts each byte from those before it. The loss is made here, so that wrappers such as DDP see one forward."""

    def __init__(self, *, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, SYMBOLS, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                into_residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if into_residual else 0.02)

    def logits(self, x: Tensor) -> Tensor:
        """`[B, T]` bytes to `[B, T, 256]`."""
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))  # type: ignore[no-any-return]

    def forward(self, rows: Tensor) -> Tensor:
        """The summed negative log-likelihood, in nats, of all bytes but the first of each row; `rows` `[B, T + 1]`."""
        logits = self.logits(rows[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")

    def layer_groups(self) -> list[list[tuple[str, nn.Parameter]]]:
        """Named parameters from first layer to last: the embedding, each block, the final norm with the head."""
        prefixes: list[str | tuple[str, ...]] = [
            "embed.",
            *(f"blocks.{i}." for i in range(len(self.blocks))),
            ("norm.", "head."),
        ]
        return [[(n, p) for n, p in self.named_parameters() if n.startswith(prefix)] for prefix in prefixes]
