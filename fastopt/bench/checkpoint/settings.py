"""What a run of the checkpoint benchmark measures, and how."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The options of a run.

    Attributes:
        folder: where the files go; None for the system's temporary folder.
        rounds: turns of everybody, after one that is not counted.
        ranks: how many processes save and load.
        threads: CPU threads of each.
        scale: width of the model, 1 for that of its name.
        device: `cpu` or `cuda`.
        model: `gpt2` or `llama-1.36b`.
    """

    folder: str | None
    rounds: int
    ranks: int
    threads: int
    scale: float
    device: str
    model: str = "gpt2"
