"""Train a causal streaming generator on videos: from a Wan checkpoint, or from nothing.

    python -m megatron_kvpo.training.pretrain examples/shapes/pretrain.yaml [section.key=value ...]
    torchrun --nproc_per_node 8 -m megatron_kvpo.training.pretrain examples/wan/pretrain_1.3b.yaml

Causal flow matching: each noisy block sees the clean blocks before it through the streaming window
(forcing.py). The last part of training may replace clean history and noisy states by the model's
own estimates, which is what a few-step streaming generator meets when it runs. docs/pretraining.md.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_kvpo import log, settings
from megatron_kvpo.checkpoint.state import load
from megatron_kvpo.data.embeddings import EmbeddingCache
from megatron_kvpo.data.prompts import load_prompts
from megatron_kvpo.model.codec import ShapesCodec
from megatron_kvpo.model.specs import check_layout
from megatron_kvpo.parallel.collect import largest, mean_over
from megatron_kvpo.parallel.groups import Ranks, is_first, start_ranks, stop_ranks
from megatron_kvpo.records import LatentStream
from megatron_kvpo.stopwatch import stage
from megatron_kvpo.training.latent_streams import StreamOpener, opener
from megatron_kvpo.training.learner import Learner
from megatron_kvpo.training.metrics import Meter
from megatron_kvpo.training.pretrain_config import FittingConfig, PretrainConfig
from megatron_kvpo.training.recovery import Saver, StopSignal, checkpoint_to_resume
from megatron_kvpo.training.samples import Sampler, plot_curve
from megatron_kvpo.training.shapes_corpus import load_corpus
from megatron_kvpo.training.trackers import Guest, check_installed, invite

__all__ = ["PretrainConfig", "pretrain"]

logger = log.get_logger(__name__)


class Loop:
    """The steps of one run, and where it stands."""

    def __init__(
        self, config: PretrainConfig, learner: Learner, stream: LatentStream,
        sampler: Sampler | None,
    ) -> None:  # fmt: skip
        self._config, self._learner, self._sampler = config, learner, sampler
        self._fitting: FittingConfig = config.fitting
        self._ranks, self._stream = learner.ranks, stream
        self._folder, self._curve = config.run_folder, config.run_folder / "curve.jsonl"
        self._checkpoints = config.run_folder / "checkpoints"
        self._saver = Saver(config.checkpoint, self._checkpoints, self._ranks, saved=0)
        self._signal = StopSignal()
        self._meter, self._guests = Meter(config.log, self._ranks), list[Guest]()
        self.step = 0
        """Steps done."""

        self._seconds = 0.0
        """Spent by runs before this one."""

        self._measured = 0
        """Steps that the meter has told of."""

        self._loss = torch.zeros((), device=self._ranks.device)
        self._since = 0
        """Sum of the losses since the last line of the curve, and of how many steps."""

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one. ValueError for another run's."""
        found = checkpoint_to_resume(self._config.checkpoint, self._checkpoints, self._ranks)
        if found is None:
            return
        tree = self._learner.sharded_state()
        tree["run"] = {}
        state = load(found, tree, self._ranks, checked=True)
        self._check(found, state["run"])
        self._learner.load_state(state)
        saved = state["run"]
        self.step, self._seconds = int(saved["step"]), float(saved["seconds"])
        self._since = int(saved["since"])
        self._loss.fill_(saved["loss"] if self._ranks.data.rank == 0 else 0.0)
        logger.info("resuming from %s: %d steps are done", found, self.step)

    def _check(self, found: Path, saved: dict[str, Any]) -> None:
        other = "give it another name, or set checkpoint.resume=false"
        if saved["seed"] != self._config.seed:
            raise ValueError(
                f"{found} belongs to a run of seed {saved['seed']}, this one has seed "
                f"{self._config.seed}: {other}"
            )
        if saved["data"] != self._stream.fingerprint():
            raise ValueError(
                f"{found} was trained on the data set {saved['data']}, this run has "
                f"{self._stream.fingerprint()}: name the same videos and codec, {other}"
            )
        if saved["step"] > self._fitting.steps:
            raise ValueError(
                f"{found} has {saved['step']} steps behind it, fitting.steps is "
                f"{self._fitting.steps}: raise it, {other}"
            )

    def run(self) -> bool:
        """All steps that are left; False if a signal ended them early. A checkpoint is left."""
        started, first = time.monotonic() - self._seconds, self.step
        self._measured = first
        cut_curve(self._curve, first, self._ranks)
        progress = log.Progress(self._fitting.steps, first=is_first(self._ranks), start=first,
                                label="step")  # fmt: skip
        with self._signal.watched(), self._tracked(), progress, self._meter.running():
            batches = self._stream.batches(first)
            done, asked = self._agree(started)
            while done < 1 and not asked:
                own = done >= self._fitting.own_estimates_from
                loss = self._learner.train_step(next(batches), self.step, own=own,
                                                scale=self._scale(done))  # fmt: skip
                self._loss += loss
                self._since += 1
                self.step += 1
                self._seconds = time.monotonic() - started
                done, asked = self._agree(started)
                if self.step % self._fitting.log_every == 0 or done >= 1:
                    self._report(progress)
                self._show(last=done >= 1)
                self._save(last=done >= 1 or asked > 0)
            self._saver.settle(last=True)
        if asked:
            name = signal.Signals(asked).name
            kept = "saved" if self._config.checkpoint.every else "lost, as checkpoint.every is 0"
            logger.warning("asked to end by %s: %d steps are done and %s", name, self.step, kept)
        return not asked

    @contextmanager
    def _tracked(self) -> Iterator[None]:
        """Trackers are there inside."""
        if is_first(self._ranks):
            self._guests = invite(self._config.log, self._config.name, self._folder,
                                  settings.to_mapping(self._config), self._first_told)  # fmt: skip
        failed = True
        try:
            yield
            failed = False
        finally:
            for guest in self._guests:
                guest.close(failed=failed)

    @property
    def _first_told(self) -> int:
        """The first step of which trackers will be told: what they have of it is void."""
        return self.step + 1 if self.step else 0

    def _tell(self, values: dict[str, float]) -> None:
        step = self.step
        for guest in self._guests:
            guest.tell(lambda tracker: tracker.scalars(step, values))

    def _agree(self, started: float) -> tuple[float, int]:
        """Share of the schedule that is done, and the signal to end, if any: alike on all ranks.

        A checkpoint that all ranks have written meanwhile is published.
        """
        limit = self._fitting.max_seconds
        spent = (time.monotonic() - started) / limit if limit else 0.0
        told = spent, self._signal.number, self._saver.writing
        spent, asked, writing = largest(told, self._ranks)
        if not writing:
            self._saver.settle()
        return max(self.step / self._fitting.steps, spent), int(asked)

    def _scale(self, done: float) -> float:
        if self._fitting.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0))) + 0.01

    def _report(self, progress: log.Progress) -> None:
        mean = float(mean_over(self._loss, self._ranks.data)) / self._since
        costs = self._meter.read("step", self.step - self._measured)
        self._measured = self.step
        self._loss.zero_()
        self._since = 0
        if not math.isfinite(mean):
            raise ValueError(f"the loss is {mean} at step {self.step}: lower optimizer.lr")
        progress.update(self.step, loss=mean)
        values = {"loss": mean, "seconds": self._seconds, **costs}
        append(self._curve, self._ranks, step=self.step, **values)
        self._tell(values)

    def _show(self, *, last: bool) -> None:
        every = self._fitting.sample_every
        if self._sampler is None or not (last or self.step % every == 0):
            return
        path, step = self._folder / f"samples_{self.step:06d}.png", self.step
        with stage("evaluate"), self._learner.averaged():
            scores = self._sampler.show(path)
        append(self._curve, self._ranks, step=self.step, **scores)
        self._tell(scores)
        for guest in self._guests:
            guest.tell(lambda tracker: tracker.picture(step, "samples", path, ""))
        logger.info("step %d: %s", self.step, scores)

    def _save(self, *, last: bool) -> None:
        checkpoint = self._config.checkpoint
        if not checkpoint.every or not (last or self.step % checkpoint.every == 0):
            return
        run = {
            "step": self.step, "seed": self._config.seed, "seconds": self._seconds,
            "data": self._stream.fingerprint(), "since": self._since,
            "loss": float(self._ranks.data.size * mean_over(self._loss, self._ranks.data)),
        }  # fmt: skip
        with stage("save"):
            self._saver.save(self.step, lambda: {**self._learner.sharded_state(), "run": run},
                             last=last)  # fmt: skip


def append(path: Path, ranks: Ranks, **values: float) -> None:
    """Add a line to a curve.jsonl; the first rank does."""
    if is_first(ranks):
        with path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def cut_curve(path: Path, step: int, ranks: Ranks) -> None:
    """Drop the lines of steps after `step`, which a run that resumes there writes again."""
    if is_first(ranks) and path.is_file():
        lines = [x for x in path.read_text().splitlines() if json.loads(x)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in lines if step))


def empty_text(config: PretrainConfig) -> Tensor:
    """What stands for a caption that is dropped, [X, D]. ValueError for embeddings without it."""
    model, path = config.model, config.latents.empty_text
    if path is None:
        return torch.zeros(model.text_length, model.text_dim)
    found = EmbeddingCache(path, text_dim=model.text_dim, text_length=model.text_length)
    return found.encode([""])[0]


def check_recipe(config: PretrainConfig, ranks: Ranks) -> None:
    """ValueError for sizes that do not divide over these ranks."""
    check_installed(config.log)
    check_layout(config.model, config.parallel, config.stream.block_frames)
    if config.fitting.batch_size % ranks.data.size:
        raise ValueError(
            f"fitting.batch_size {config.fitting.batch_size} does not divide over "
            f"{ranks.data.size} data ranks: use a multiple of {ranks.data.size}"
        )


def pretrain(config: PretrainConfig, open_stream: StreamOpener | None = None) -> Path | None:
    """The whole recipe, from encoded videos to weights.

    Args:
        config: the recipe.
        open_stream: where batches come from, instead of what the recipe names.

    Returns:
        What was written, or None if SIGTERM ended the run; then a checkpoint is there.
    """
    ranks = start_ranks(config.parallel, config.device)
    check_recipe(config, ranks)
    config.run_folder.mkdir(parents=True, exist_ok=True)
    log.setup(is_first(ranks), config.run_folder)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.seed)
    if is_first(ranks):
        settings.dump(config, config.run_folder / "config.yaml")
    stream: LatentStream
    codec: ShapesCodec | None = None
    open_stream = open_stream or opener(config)
    if open_stream is None:
        stream, codec = load_corpus(config, ranks)
    else:
        stream = open_stream(config, ranks)
    learner = Learner.build(config, ranks, empty_text(config))
    sampler = None
    if codec is not None and config.fitting.sample_every:
        prompts = load_prompts(config.samples)
        sampler = Sampler(learner.model, codec.eval(), config.stream, prompts)
    loop = Loop(config, learner, stream, sampler)
    loop.resume()
    written = None
    if loop.run():
        note = {"made_by": "python -m megatron_kvpo.training.pretrain", "seed": str(config.seed)}
        written = learner.export(config.run_folder, note)
        if is_first(ranks):
            plot_curve(config.run_folder / "curve.jsonl")
        logger.info("weights and curve are in %s", config.run_folder)
    stop_ranks()
    return written


if __name__ == "__main__":
    log.run_training(
        lambda recipe, changes: pretrain(settings.load(PretrainConfig, recipe, changes)),
        sys.argv[1:], smaller="fitting.micro_rows, fitting.ema_decay=0, model.recompute=true",
    )  # fmt: skip
