"""The shapes of the parameters of the models that steps are timed on."""

from __future__ import annotations

from collections.abc import Callable

import torch

Shape = tuple[int, ...]


def llama() -> list[Shape]:
    """A LLaMA-like model of 1.36 billion parameters in 219 tensors."""
    d, hidden, layers, words = 2048, 5632, 24, 32000
    layer: list[Shape] = [*[(d, d)] * 4, (hidden, d), (hidden, d), (d, hidden), (d,), (d,)]
    return [(words, d), *layer * layers, (d,), (words, d)]


def resnet50() -> list[Shape]:
    """ResNet-50: 25.6 million parameters in 161 tensors."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    width = 64
    for out, blocks in ((256, 3), (512, 4), (1024, 6), (2048, 3)):
        inner = out // 4
        for i in range(blocks):
            for conv in ((inner, width, 1, 1), (inner, inner, 3, 3), (out, inner, 1, 1)):
                shapes += [conv, (conv[0],), (conv[0],)]
            if i == 0:
                shapes += [(out, width, 1, 1), (out,), (out,)]
            width = out
    return [*shapes, (1000, 2048), (1000,)]


def vit_b() -> list[Shape]:
    """ViT-B/16: 86.6 million parameters in 152 tensors."""
    d = 768
    attention: list[Shape] = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,)]
    mlp: list[Shape] = [(d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(1, 1, d), (1, 197, d), (d, 3, 16, 16), (d,), *(attention + mlp) * 12, (d,), (d,), (1000, d), (1000,)]


def small() -> list[Shape]:
    """1000 small tensors, 2.3 million elements."""
    return [(64, 64 if i % 2 else 8) for i in range(1000)]


def mixed() -> list[Shape]:
    """10,000 tensors of 1 to 65,536 elements, 58 million in all."""
    g = torch.Generator().manual_seed(0)
    return [(int(2 ** (16 * float(torch.rand((), generator=g)))),) for _ in range(10_000)]


def mlp() -> list[Shape]:
    """23 million parameters in 38 tensors."""
    return [*[(1024, 1184), (1024,)] * 18, (1024, 1184), (1000,)]


def tiny() -> list[Shape]:
    """A few hundred parameters in 12 tensors, to try the benchmark itself."""
    return [(8, 8), (8,)] * 6


MODELS: dict[str, Callable[[], list[Shape]]] = {
    "llama-1.3b": llama,
    "resnet-50": resnet50,
    "vit-b": vit_b,
    "small-1000": small,
    "mixed-10000": mixed,
    "mlp-23m": mlp,
    "tiny": tiny,
}
