"""The run itself: build everything, go on where a checkpoint stands, step, validate, save."""

from __future__ import annotations

import math
import os
import random
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .config import Config, rebuilds
from .data import byte_frequency_bits, cut_rows, read_corpus, row_starts, shares, validation_starts
from .errors import JobError
from .metrics import MetricsFile, Progress, Speed, read_metrics
from .model import GPT
from .parallel import Parallel
from .plot import draw_curves
from .ranks import Ranks, StopRequest, share_cores
from .recipes import build_optimizer
from .saving import Checkpoints
from .schedule import build_scheduler

if TYPE_CHECKING:
    from fastopt.checkpoint import Checkpoint

VALIDATION_ROWS_AT_ONCE = 32


class Trainer:
    """One rank's part of a run. Every method is called by all ranks together."""

    def __init__(self, config: Config, ranks: Ranks, stop: StopRequest) -> None:
        self.config, self.ranks, self.stop = config, ranks, stop
        self.shares = shares(config.batch, ranks.world, config.accumulate)
        share_cores(ranks, config.threads)
        self.corpus = read_corpus(config.data, config.data_limit, config.context)
        self.checkpoints = Checkpoints(config, ranks, self.corpus.fingerprint)
        found = self.checkpoints.find()
        self._build()
        self.step = 0
        self.seconds_before = 0.0
        if found is not None:
            self._go_on(found)
        self._set_level(config.unfreezing.level(self.step), force=found is not None)
        self.resumed = found is not None

    def _build(self) -> None:
        c = self.config
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(c.seed)
        model = GPT(layers=c.layers, width=c.width, heads=c.heads)
        self.model = model.to(self.ranks.device)
        opt = build_optimizer(c.opt, self.model.layer_groups(), lr=c.rate, wd=c.wd, mom=c.mom)
        self.parallel = Parallel(self.model, opt, c.stage, self.ranks)
        self.opt = self.parallel.opt
        self.scheduler = build_scheduler(self.opt, c.schedule, steps=c.steps, warmup=c.warmup)
        self.level = 0
        starts = validation_starts(self.corpus.val.numel(), c.val_rows, c.context)
        targets = cut_rows(self.corpus.val, starts, c.context)[:, 1:]
        self.baseline = byte_frequency_bits(self.corpus.train, targets.flatten())
        self.val_starts = starts

    def _go_on(self, found: Checkpoint) -> None:
        """Load what `found` describes; settings that have changed since then take effect from here on."""
        fresh = [
            {k: v for k, v in group.items() if k not in ("params", "param_names", "frozen")}
            for group in self.opt.param_groups
        ]
        self.checkpoints.load(found.step, self.model, self.opt, self.scheduler)
        self.step, self.seconds_before = found.step, float(found.extra["seconds"])
        changed = rebuilds(self.config, found.extra["config"])
        if changed:
            for group, values in zip(self.opt.param_groups, fresh, strict=True):
                group.update(values)
            c = self.config
            self.scheduler = build_scheduler(self.opt, c.schedule, steps=c.steps, warmup=c.warmup, last=self.step - 1)
        if self.ranks.rank == 0:
            news = f", with new {' '.join(changed)}" if changed else ""
            print(
                f"resumed at step {self.step} on {self.ranks} from {self.config.checkpoint}{news}",
                flush=True,
            )

    def run(self) -> None:
        """Train to the last step, or to where a signal stops all ranks."""
        c = self.config
        metrics = self._open_metrics()
        self._announce(metrics)
        speed = Speed(c.batch * c.context)
        progress = Progress(first=self.step, steps=c.steps, log_every=c.log_every, shown=self.ranks.rank == 0)
        first, val, stopped = self.step, None, False
        while self.step < c.steps and not stopped:
            self._set_level(c.unfreezing.level(self.step))
            rates = [float(group["lr"]) for group in self.opt.param_groups]
            loss, stopped = self.train_step()
            if not math.isfinite(loss):
                raise JobError(f"the loss of step {self.step} is {loss}: lower --lr")
            judged = self.step == c.steps or (c.val_every > 0 and self.step % c.val_every == 0)
            val = self.validate() if judged else None
            now = speed.tick()
            if self.step == first + 1:
                held = self.ranks.gather(self.parallel.state_bytes())
                metrics.write(event="held", step=self.step, world_size=self.ranks.world, state_bytes=held)
            metrics.write(
                step=self.step,
                loss=loss,
                val_bpb=val,
                lr=rates,
                tokens_per_s=round(now),
                world_size=self.ranks.world,
                frozen=[i < self.level for i in range(c.groups)],
            )
            progress.step(self.step, loss=loss, val=val, speed=now, lr=rates[-1])
            if self.checkpoints.due(self.step) or (stopped and c.checkpoint):
                self._save(metrics, speed.seconds)
        progress.close()
        if stopped and self.step < c.steps:
            self._say_stopped()
        else:
            self._finish(metrics, speed, self.validate() if val is None else val)

    def train_step(self) -> tuple[float, bool]:
        """One optimizer step over the global batch: its mean loss in nats per byte, and whether a rank must stop."""
        c = self.config
        self.opt.zero_grad()
        scale = self.ranks.world / (c.batch * c.context)  # the gradients of all ranks are averaged
        nats = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for i, parts in enumerate(self.shares):
            starts = row_starts(c.seed, self.step, parts[self.ranks.rank], self.corpus.train.numel(), c.context)
            last = i == len(self.shares) - 1
            with nullcontext() if last else self.parallel.local():
                loss = self._loss(self.corpus.train, starts)
                (loss * scale).backward()  # type: ignore[no-untyped-call]
            nats += loss.detach()
        if c.clip:
            self.parallel.clip(c.clip)
        self.opt.step()
        self.scheduler.step()
        self.step += 1
        total, stops = self.ranks.total([nats.item(), float(bool(self.stop))])
        return total / (c.batch * c.context), stops > 0

    def _loss(self, text: Tensor, starts: list[int]) -> Tensor:
        rows = cut_rows(text, starts, self.config.context).to(self.ranks.device)
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            return self.parallel.forward(rows)

    @torch.no_grad()
    def validate(self) -> float:
        """Bits per byte on the validation rows, which are shared out over the ranks."""
        mine = self.val_starts[self.ranks.rank :: self.ranks.world]
        nats = 0.0
        for at in range(0, len(mine), VALIDATION_ROWS_AT_ONCE):
            rows = cut_rows(self.corpus.val, mine[at : at + VALIDATION_ROWS_AT_ONCE], self.config.context)
            with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
                nats += float(self.model(rows.to(self.ranks.device)))
        (total,) = self.ranks.total([nats])
        return total / (len(self.val_starts) * self.config.context) / math.log(2)

    def _set_level(self, level: int, force: bool = False) -> None:
        """Freeze the layer groups below `level`. After a load it is always done: the flags may have changed since."""
        if level == self.level and not force:
            return
        self.opt.freeze_to(level)
        self.level = level
        self.parallel.rewire()

    def _save(self, metrics: MetricsFile, seconds: float) -> None:
        url = self.checkpoints.save(self.step, self.model, self.opt, self.scheduler, self.seconds_before + seconds)
        metrics.write(event="checkpoint", step=self.step, url=url)

    def _open_metrics(self) -> MetricsFile:
        """The metrics of rank 0; the others write none. Where it cannot be opened, all ranks raise."""
        opened = [MetricsFile("")]
        self.ranks.from_first(lambda: opened.append(MetricsFile(self.config.metrics)))
        return opened[-1]

    def _announce(self, metrics: MetricsFile) -> None:
        c, corpus = self.config, self.corpus
        pids = self.ranks.gather(os.getpid())
        parameters = sum(p.numel() for p in self.model.parameters())
        metrics.write(
            event="resume" if self.resumed else "start",
            step=self.step,
            world_size=self.ranks.world,
            pids=pids,
            parameters=parameters,
            baseline_bpb=self.baseline,
            config=c.to_json(),
        )
        if self.ranks.rank:
            return
        if not self.resumed and (c.resume or (self.ranks.attempt and c.checkpoint)):
            print(f"no checkpoint in {c.checkpoint} yet: starting from step 0")
        stage = f"stage {self.parallel.stage}" if self.ranks.world > 1 else "nothing to shard"
        print(
            f"{parameters:,} parameters, {c.opt}, {self.ranks} on {self.ranks.device.type}, {stage}; "
            f"{corpus.train.numel():,} bytes of {len(corpus.train_files)} files to train, "
            f"{corpus.val.numel():,} of {len(corpus.val_files)} to validate",
            flush=True,
        )

    def _say_stopped(self) -> None:
        """A signal came to this rank or to another one."""
        if self.ranks.rank == 0:
            c = self.config
            then = (
                f"saved to {c.checkpoint}, go on with --resume" if c.checkpoint else "nothing saved (no --checkpoint)"
            )
            print(
                f"stopped by {self.stop.name or 'a signal to another rank'} after step {self.step}: {then}", flush=True
            )

    def _finish(self, metrics: MetricsFile, speed: Speed, val: float) -> None:
        held = self.ranks.gather(self.parallel.state_bytes())
        seconds = self.seconds_before + speed.seconds
        parameters = sum(p.numel() for p in self.model.parameters())
        metrics.write(
            event="end",
            step=self.step,
            val_bpb=val,
            baseline_bpb=self.baseline,
            seconds=round(seconds, 3),
            tokens_per_s=round(speed.overall),
            parameters=parameters,
            state_bytes=held,
            world_size=self.ranks.world,
        )
        if self.ranks.rank:
            return
        print(f"validation {val:.3f} bits per byte; byte frequencies alone {self.baseline:.3f}")
        print(f"{self.step} steps in {seconds:.1f} s, {speed.overall:,.0f} tokens/s; {parameters:,} parameters")
        print("optimizer state held: " + ", ".join(f"rank {rank} {n:,} bytes" for rank, n in enumerate(held)))
        if self.config.plot and self.config.metrics:
            print(draw_curves(read_metrics(self.config.metrics), self.baseline, self.config.plot))
        elif self.config.plot:
            print("no curves: --plot draws what --metrics has written")
