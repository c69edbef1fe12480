"""A whole pre-training run at a tiny size, on random latents, with what it did written down."""

from __future__ import annotations

import copy
import itertools
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_kvpo import settings
from megatron_kvpo.model.weights import whole_value
from megatron_kvpo.parallel.groups import Ranks
from megatron_kvpo.parallel.seeds import noise
from megatron_kvpo.records import LatentBatch
from megatron_kvpo.training.learner import Learner
from megatron_kvpo.training.optimizer import Optimizer
from megatron_kvpo.training.pretrain import Loop, PretrainConfig, pretrain
from tests.parallel.tiny_run import _whole_gradient, ranks_left

RECIPE: dict[str, Any] = {
    "seed": 3,
    "device": "cpu",
    "model": {"hidden_dim": 64, "ffn_dim": 96, "num_layers": 2, "num_heads": 4, "text_dim": 16,
              "text_length": 12, "latent_channels": 4, "latent_height": 8, "latent_width": 8,
              "sinusoid_dim": 32, "max_frames": 32},
    "stream": {"num_frames": 18, "resident_frames": 18, "steps": [1.0, 0.5]},
    "fitting": {"steps": 4, "batch_size": 4, "own_estimates_from": 0.5, "sample_every": 0,
                "caption_noise": 0.0, "caption_drop": 0.25, "log_every": 2, "ema_decay": 0.9},
    "optimizer": {"lr": 1e-3, "eps": 1e-4, "warmup_updates": 2},
    "checkpoint": {"every": 0},
    "log": {"wandb": "disabled", "costs": False},
}  # fmt: skip
"""Latent frames of 16 tokens; a batch of four clips, two of them of two segments."""

LORA = ["trained.mode=lora", "trained.lora_rank=4", "trained.lora_alpha=8"]


def recipe(folder: Path, *overrides: str) -> PretrainConfig:
    """RECIPE in a folder, with dotted overrides."""
    values = {**copy.deepcopy(RECIPE), "folder": str(folder)}
    for override in overrides:
        settings.merge_override(values, override)
    return settings.from_mapping(PretrainConfig, values)


class Clips:
    """Noise for latents and texts: a function of (step, row of the global batch)."""

    def __init__(
        self, config: PretrainConfig, ranks: Ranks, *, ends_at: int | None = None,
        origin: str = "noise",
    ) -> None:  # fmt: skip
        """`ends_at`: the last data rank is sent SIGTERM while it makes this step's batch."""
        self.config, self.ranks, self._ends_at, self._origin = config, ranks, ends_at, origin

    def batches(self, step: int = 0) -> Iterator[LatentBatch]:
        share = self.config.fitting.batch_size // self.ranks.data.size
        for number in itertools.count(step):
            last = self.ranks.data.rank == self.ranks.data.size - 1
            if number == self._ends_at and last:
                os.kill(os.getpid(), signal.SIGTERM)
            yield self.batch(number, self.ranks.data.rank * share, share)

    def batch(self, step: int, first: int, count: int) -> LatentBatch:
        model, frames = self.config.model, self.config.stream.num_frames
        rows = range(first, first + count)
        segments = [
            (row - first, *span)
            for row in rows
            for span in (((0, frames),) if row % 2 else ((0, 6), (6, frames)))
        ]
        texts = [
            noise((model.text_length, model.text_dim), "text", step, first + row, start)
            for row, start, _ in segments
        ]
        clips = [noise((frames, *model.frame_shape), "clip", step, row) for row in rows]
        return LatentBatch(
            latent_BFCHW=torch.stack(clips), segment_S3=torch.tensor(segments),
            text_SXD=torch.stack(texts), index_B=torch.tensor(rows),
        )  # fmt: skip

    def fingerprint(self) -> str:
        return self._origin


@dataclass
class Trace:
    """What one rank saw of a run. All tensors are on the CPU."""

    first_step: int = 0
    steps: int = 0
    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    """Per step, whole tensors, reduced."""

    start: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Whole tensors that train and their averages, when the run began or resumed and at its end."""

    moments: list[Tensor] = field(default_factory=list)
    """This rank's share of Adam's state."""

    written: str = ""


def run(config: PretrainConfig, **stream: Any) -> Trace:
    """`pretrain(config)` on Clips, watched. Random weights that say something."""
    trace, loops = Trace(), list[Loop]()
    loop_run, step, export = Loop.run, Learner.train_step, Learner.export

    def watched_run(loop: Loop) -> bool:
        loops.append(loop)
        trace.first_step, trace.start = loop.step, whole(loop._learner)
        return loop_run(loop)

    def watched_step(learner: Learner, *args: Any, **kwargs: Any) -> Tensor:
        loss = step(learner, *args, **kwargs)
        trace.losses.append(float(loss))
        return loss

    def watched_update(optimizer: Optimizer, *args: Any, **kwargs: Any) -> float:
        if not config.optimizer.distributed:  # else they are in shares
            trace.gradients.append(gradients(loops[0]._learner))
        return update(optimizer, *args, **kwargs)

    def watched_export(learner: Learner, *args: Any) -> Path:
        trace.weights = whole(learner)
        adam = learner.optimizer._inner.optimizer
        trace.moments = [v.clone() for s in adam.state.values() for _, v in sorted(s.items())]
        return export(learner, *args)

    update = Optimizer.step
    with (
        mock.patch.object(Learner, "build", staticmethod(lively)),
        mock.patch.object(Loop, "run", watched_run),
        mock.patch.object(Learner, "train_step", watched_step),
        mock.patch.object(Optimizer, "step", watched_update),
        mock.patch.object(Learner, "export", watched_export),
        ranks_left(),
    ):
        written = pretrain(config, lambda c, ranks: Clips(c, ranks, **stream))
    trace.steps, trace.written = loops[0].step, str(written or "")
    return trace


_build = Learner.build


def lively(*args: Any, **kwargs: Any) -> Learner:
    """Learner.build, with random weights whose gates and head are not near zero."""
    learner = _build(*args, **kwargs)
    if learner.config.model.weights is None:
        with torch.no_grad():
            for name, p in learner.model.named_parameters():
                if name.endswith("modulation"):
                    p.mul_(4)
                elif name.startswith(("time_", "text_", "head.")):
                    p.mul_(8)
    return learner


def whole(learner: Learner) -> dict[str, Tensor]:
    """Whole tensors that train, and their averages. Collective."""
    axis = learner.ranks.tensor
    held = {**learner.trained, **learner.average.twins}
    return {name: whole_value(p, axis).cpu() for name, p in held.items()}


def gradients(learner: Learner) -> dict[str, Tensor]:
    """Reduced gradients. Collective."""
    return {n: _whole_gradient(p, learner.ranks.tensor) for n, p in learner.trained.items()}
