"""Checkpoints of the job: when there is one to go on from, what is saved beside the weights, and what must agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import Config, check_resumable
from .errors import JobError
from .ranks import Ranks

if TYPE_CHECKING:
    from torch import nn
    from torch.optim.lr_scheduler import LRScheduler

    from fastopt.checkpoint import Checkpoint, Entry
    from fastopt.checkpoint.io.storage import Storage


class Checkpoints:
    """The checkpoints under `config.checkpoint`; without one, nothing is saved and nothing found."""

    def __init__(self, config: Config, ranks: Ranks, fingerprint: str) -> None:
        self.config, self.ranks, self.fingerprint = config, ranks, fingerprint
        self.url = config.checkpoint
        self.newest_step: int | None = None

    def due(self, step: int) -> bool:
        """Whether a checkpoint belongs after `step` steps: every `every` steps, and at the end."""
        if not self.url or step == self.newest_step:
            return False
        return step == self.config.steps or (self.config.every > 0 and step % self.config.every == 0)

    def save(self, step: int, model: nn.Module, opt: Any, scheduler: LRScheduler, seconds: float) -> str:
        """Save on all ranks together, then drop the oldest; returns the URL of the new checkpoint."""
        from fastopt import checkpoint

        extra = {"config": self.config.to_json(), "fingerprint": self.fingerprint, "seconds": seconds}
        url: str = checkpoint.save(self.url, step=step, model=model, opt=opt, scheduler=scheduler, extra=extra)
        self.newest_step = step
        if self.config.keep:
            self.ranks.from_first(lambda: checkpoint.prune(self.url, keep=self.config.keep))
        return url

    def find(self) -> Checkpoint | None:
        """The newest complete checkpoint (its step and extra) if this run goes on from one, None if it starts.

        A job that torchrun has restarted goes on with or without `--resume`. A JobError where the settings do not fit
        the checkpoint, or where a run that starts would write among the checkpoints of another.
        """
        if not self.url:
            return None
        from fastopt import checkpoint

        newest = self.ranks.from_first(self._newest)
        if newest is None:
            return None
        if not self.config.resume and not self.ranks.attempt:
            raise JobError(
                f"--checkpoint {self.url} holds a checkpoint of step {newest.step}: "
                "pass --resume to go on from it, or another folder"
            )
        found = checkpoint.load(self.url, step=newest.step, rng=False)
        extra = _extra(found)
        check_resumable(self.config, extra["config"])
        if extra["fingerprint"] != self.fingerprint:
            raise JobError(f"cannot resume from {self.url}: the text under --data is not the one of the checkpoint")
        return found

    def _newest(self) -> Entry | None:
        """The newest complete checkpoint. An error where there are some, all damaged: no reason to begin anew."""
        from fastopt.checkpoint import catalog, latest

        place = open_place(self.url)
        newest = latest(self.url)
        if newest is None and catalog.newest_completed(place) is not None:
            catalog.find(place, None)
        return newest

    def load(self, step: int, model: nn.Module, opt: Any, scheduler: LRScheduler) -> None:
        """Load the checkpoint of `step` into the model, the optimizer and the scheduler, on all ranks together."""
        from fastopt import checkpoint

        checkpoint.load(self.url, model=model, opt=opt, scheduler=scheduler, step=step)
        self.newest_step = step


def open_place(url: str) -> Storage:
    """The storage at `url`, with its folder. A JobError where nothing could be saved there, before any step is made."""
    from fastopt.checkpoint.io import storage

    try:
        place = storage.open_storage(url)
        place.make_folder("")
    except Exception as error:  # a store of fsspec may raise anything
        raise JobError(f"--checkpoint {url} cannot be written: {error}") from error
    return place


def _extra(found: Checkpoint) -> dict[str, Any]:
    """What this job has put beside the weights."""
    extra = found.extra
    if not isinstance(extra, dict) or not {"config", "fingerprint", "seconds"} <= extra.keys():
        raise JobError(f"{found.url} is a checkpoint of another program: name another --checkpoint folder")
    return extra
