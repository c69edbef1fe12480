"""A run's parts, put together once: what train.py's loop needs around its three stages."""

from __future__ import annotations

import contextlib
import json
import math
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_kvpo import log
from megatron_kvpo.checkpoint.state import load
from megatron_kvpo.config import RunConfig
from megatron_kvpo.data.prompts import PromptStream, share
from megatron_kvpo.parallel.collect import gather_rows, largest, shares
from megatron_kvpo.parallel.groups import Ranks, is_first, start_ranks, stop_ranks
from megatron_kvpo.records import Energies, LossOutput
from megatron_kvpo.reward.composite import Scorer
from megatron_kvpo.rollout.group import SampledGroup
from megatron_kvpo.rollout.sizing import rows_at_once, run_pages
from megatron_kvpo.rollout.stream import World
from megatron_kvpo.stopwatch import stage
from megatron_kvpo.training.alarms import AlarmError, check_start
from megatron_kvpo.training.continuation import Beginnings
from megatron_kvpo.training.evaluate import Evaluator
from megatron_kvpo.training.group_dump import Figures, dump
from megatron_kvpo.training.guard import Guard
from megatron_kvpo.training.heartbeat import Heartbeat
from megatron_kvpo.training.metrics import Meter, Metrics
from megatron_kvpo.training.parts import build_codec, build_encoder, check_run, connect_judges
from megatron_kvpo.training.policy import Policy
from megatron_kvpo.training.recovery import Saver, StopSignal, checkpoint_to_resume
from megatron_kvpo.training.replays import Ask
from megatron_kvpo.training.report import write_report
from megatron_kvpo.training.reward_log import reward_lines
from megatron_kvpo.training.stages import Stages
from megatron_kvpo.training.summary import EvaluationTable, summarise, to_json

if TYPE_CHECKING:
    from megatron_kvpo.reward.service import RemoteReward

logger = log.get_logger(__name__)

EXTREMES = {
    "policy/ratio_max": torch.max, "policy/ratio_min": torch.min, "policy/energy_max": torch.max,
    "policy/anchor_energy": torch.max,
}  # fmt: skip
"""Metrics that are an extreme over all groups; the others are means."""


class Run:
    """Everything that lives from the first update to the last."""

    def __init__(
        self, config: RunConfig, ranks: Ranks, policy: Policy, stages: Stages,
        evaluator: Evaluator, judges: Sequence[RemoteReward] = (),
    ) -> None:  # fmt: skip
        self.config, self.ranks, self.policy, self.stages = config, ranks, policy, stages
        self.evaluator, self._judges = evaluator, judges
        self.first = is_first(ranks)
        self.update = 0
        """Updates done when the loop begins."""

        self.guard = Guard(config.reward.guard, config.reward.held_out)
        self._last = config.num_updates
        """Updates done when the run ends."""

        self.interrupted = False
        """Whether a signal has ended the run before its last update, or its last evaluation."""

        self._signal = StopSignal()
        self._checkpoints = config.run_folder / "checkpoints"
        self._saver = Saver(config.checkpoint, self._checkpoints, ranks, saved=0)
        self._heartbeat = Heartbeat(config.heartbeat, config.run_folder, ranks,
                                    config.parallel.timeout_s)  # fmt: skip
        self._meter = Meter(config.log, ranks)

        self._tables: dict[str, EvaluationTable] = {}
        self._real: float | None = None

    @staticmethod
    def start(config: RunConfig, *, on_device: bool = False) -> Run:
        """Check the settings, join the ranks, build everything, resume if there is a checkpoint.

        `on_device`: see Policy.build. ValueError for settings or files that cannot work, before
        anything is written.
        """
        prompts, held_out = check_run(config)
        ranks = start_ranks(config.parallel, config.device)
        share(range(config.policy.groups_per_update), ranks.data.rank, ranks.data.size)
        log.setup(is_first(ranks))
        codec, encode = build_codec(config, ranks), build_encoder(config).encode
        begin = Beginnings(config.model, codec, ranks.device, config.data.video_fps)
        begin.check([*prompts, *held_out])
        judges = connect_judges(config, ranks)
        scorer = Scorer(config.reward, config.stream, codec.decode_rows, judges, ranks.device,
                        (ranks.tensor, ranks.context))  # fmt: skip
        policy = Policy.build(config, ranks, on_device=on_device)
        own = shares(config.routing.num_branches + 1, ranks.branch.size)[ranks.branch.rank]
        pages = run_pages(
            config.stream, config.routing, config.memory, prompts, held_out,
            groups=config.policy.groups_per_update // ranks.data.size,
            sequences=rows_at_once(len(own), config.policy, config.routing.num_branches),
            videos=min(config.policy.max_rows,
                       len(held_out) * config.evaluation.noises_per_prompt),
        )  # fmt: skip
        world = World(policy.model, policy.model.new_pool(pages), config.stream, config.routing,
                      config.memory)  # fmt: skip
        stream = PromptStream(prompts, config.seed, config.policy.groups_per_update)
        axes = (ranks.tensor, ranks.context)
        stages = Stages(config, ranks, policy, world, encode, scorer, stream,
                        begin.shared((*axes, ranks.branch)))  # fmt: skip
        evaluator = Evaluator(config, ranks, policy, world, encode, scorer, codec, held_out,
                              begin.shared(axes))  # fmt: skip
        run = Run(config, ranks, policy, stages, evaluator, judges)
        run._resume()
        log.setup(is_first(ranks), config.run_folder)
        return run

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While the run goes on, SIGTERM and SIGUSR1 are heard by `ends`, and hangs are told.

        And stages are measured.
        """
        with self._signal.watched(), self._heartbeat.running(), self._meter.running():
            yield

    @property
    def stopped(self) -> bool:
        """Whether the guard of the rewards has ended the run before its last update."""
        return self.guard.stops

    def ends(self, update: int) -> bool:
        """Whether the run ends before `update`, on all ranks alike. Collective.

        It does after its last update, when the guard of the rewards says so, or when a signal has
        reached any rank; then everything is saved.
        """
        self._heartbeat.update = update
        number, writing = largest((self._signal.number, self._saver.writing), self.ranks)
        if number:
            self._interrupt(update, signal.Signals(int(number)).name)
        elif not writing:
            self._saver.settle()
        return self.interrupted or self.stopped or update >= self.config.num_updates

    def _interrupt(self, update: int, name: str) -> None:
        self.interrupted = True
        self._saver.settle()
        if self.config.checkpoint.every and update > self._saver.saved:
            self._saver.save(update, lambda: self._tree(update), last=True)
        kept = "saved" if self.config.checkpoint.every else "lost, as checkpoint.every is 0"
        if self.first:
            logger.warning(
                "asked to end by %s: %d updates are done and %s; the same command goes on from "
                "there", name, update, kept,
            )  # fmt: skip

    def energies(
        self, update: int, groups: Sequence[SampledGroup]
    ) -> tuple[Energies, Energies, Energies | None]:  # fmt: skip
        """Replays by the current policy, by the one that sampled, and by the frozen initial one.

        What equals another is not made again. The last is None where the loss has no use for it.
        """
        loss, asks = self.config.loss, [Ask(slot="current")]
        sampled_by_current = self.policy.is_synced(update)
        if not sampled_by_current:
            asks.append(Ask(slot="old"))
        wanted = loss.kl_coefficient > 0 or loss.drift_coefficient > 0
        if wanted and update > 0:  # before anything is trained it is the current one
            keep = loss.drift_coefficient > 0
            asks.append(Ask(slot="reference", keep=keep, anchor=False, moves=True))
        current, *others = self.stages.replays(update, groups, asks)
        old = current if sampled_by_current else others.pop(0)
        return current, old, (others.pop() if others else current) if wanted else None

    def check_start(
        self, update: int, groups: Sequence[SampledGroup],
        energies: tuple[Energies, Energies, Energies | None],
    ) -> None:  # fmt: skip
        """The alarms of a start. One that fails leaves a dump if it may. Collective."""
        alarms, (current, old, _) = self.config.alarms, energies
        try:
            check_start(alarms, self.stages, update, groups, old, current)
        except AlarmError:  # raised on all ranks
            if alarms.dump:
                dump(self.config, self.ranks, self.policy, update, groups,
                     Figures(energies=energies))  # fmt: skip
            raise

    def examine(self, update: int, groups: Sequence[SampledGroup], figures: Figures) -> None:
        """Dump the update if it is asked for, or if a rank's figures are not finite. Collective.

        ValueError for figures of another rank; those of this one fail in the loss, by name.
        """
        alarms, finite = self.config.alarms, figures.is_finite()
        (lost,) = largest((not finite,), self.ranks)
        if update in alarms.dump_updates or (lost and alarms.dump):
            dump(self.config, self.ranks, self.policy, update, groups, figures)
        if lost and finite:
            raise ValueError(
                f"update {update}: energies or advantages of another rank are not finite: no "
                "weight was changed. See that rank's message"
            )

    def evaluate(self, name: str, metrics: Metrics) -> None:
        """Evaluate `before` (the initial weights) or `after` (config.evaluation.adapter)."""
        if not self.evaluator.prompts:
            return
        logger.info("evaluating %d videos %s training", self.evaluator.num_videos, name)
        slot = "reference" if name == "before" else self.config.evaluation.adapter
        with stage("evaluate"):
            self._tables[name] = self.evaluator.run(name, slot)
            if not self.first:
                return
            if name == "before":
                self._real = self.evaluator.real()
                logger.info("real videos of the same prompts score %.3f", self._real)
        update = self._last if name == "after" else 0
        if name == "after" or self.update == 0:  # a resumed run has this line already
            self._log_table(self._tables[name], update, metrics)
            metrics.log_picture("eval/videos", self.evaluator.video_path(name), update)

    def evaluate_on_the_way(self, update: int, metrics: Metrics) -> None:
        """Every config.evaluation.every updates, but not at the end, where `after` comes."""
        every = self.config.evaluation.every
        if every and update % every == 0 and update < self.config.num_updates:
            name = f"{update:06d}"
            with stage("evaluate"):
                table = self.evaluator.run(name, self.config.evaluation.adapter)
            seen = self.guard.watch(self._tables["before"], table)
            self._last = update if self.stopped else self._last
            self._log_table(table, update, metrics, seen)
            if self.first:
                metrics.log_picture("eval/videos", self.evaluator.video_path(name), update)

    def _log_table(
        self, table: EvaluationTable, update: int, metrics: Metrics,
        seen: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        scores = {name: float(table.of(name).mean()) for name in table.components}
        whole = {"composite": float(table.of(None).mean()), **scores, **(seen or {})}
        metrics.log(update, eval=whole)

    def show(
        self, update: int, metrics: Metrics, groups: Sequence[SampledGroup], figures: Figures
    ) -> None:
        """Every score and energy into rewards.jsonl, and now and then what they are of. Collective.

        Once in log.samples_every updates: the first group's videos, and a table in the trackers.
        """
        assert figures.tables is not None
        assert figures.advantage_PG is not None
        every = self.config.log.samples_every
        due = every > 0 and update % every == 0
        lines = reward_lines(groups, figures.tables, figures.advantage_PG, self.ranks,
                             figures.energies[0])  # fmt: skip
        metrics.log_rewards(update, lines, self.stages.prompts.prompts if due else ())
        if due and self.first:
            composite_G = figures.tables[0].composite_N[:-1]
            rows = {"anchor": -1, "best": int(composite_G.argmax()),
                    "worst": int(composite_G.argmin())}  # fmt: skip
            with stage("samples"):
                shown = self.evaluator.show_branches(update, groups[0], rows)
            for name, (path, caption) in shown.items():
                metrics.log_picture(f"sample/{name}", path, update, caption)

    def log(
        self, update: int, metrics: Metrics, progress: log.Progress,
        groups: Sequence[SampledGroup], loss: LossOutput, seen: dict[str, Tensor],
        current: Energies, grad_norm: float,
    ) -> None:  # fmt: skip
        """Report one update over all data ranks and let its groups' pages go."""
        if update == 0 and self.first and self.evaluator.prompts:
            self.evaluator.show_group(groups[0])
        for sampled in groups:
            sampled.release()
        values = {
            **seen, **loss.metrics, "loss/total": loss.loss,
            "policy/energy_mean": current.branch_PG.mean(),
            "policy/energy_max": current.branch_PG.max(),
            "policy/anchor_energy": current.anchor_P.max(),
        }  # fmt: skip
        stacked = torch.stack([v.double().to(self.ranks.device) for v in values.values()])
        rank_DV = gather_rows(stacked[None], self.ranks.data, [1] * self.ranks.data.size)
        whole = {
            name: float(EXTREMES.get(name, torch.mean)(rank_D))
            for name, rank_D in zip(values, rank_DV.T, strict=True)
        }
        metrics.log(update, {**whole, "policy/grad_norm": grad_norm, **self._meter.read()})
        progress.update(update + 1, reward=whole["reward/composite"], loss=whole["loss/total"],
                        grad=grad_norm)  # fmt: skip

    def save(self, update: int) -> None:
        """Write a checkpoint, or begin to, if it is time."""
        every, last = self.config.checkpoint.every, update == self._last
        if every and (last or update % every == 0):
            with stage("save"):
                self._saver.save(update, lambda: self._tree(update), last=last)

    def _tree(self, update: int) -> dict[str, Any]:
        """All that a resumed run needs. Collective."""
        tree = self.policy.sharded_state()
        tree["run"] = {"update": update, "seed": self.config.seed, "strikes": self.guard.strikes}
        return tree

    def _resume(self) -> None:
        found = checkpoint_to_resume(self.config.checkpoint, self._checkpoints, self.ranks)
        if found is None:
            return
        tree = self.policy.sharded_state()
        tree["run"] = {}
        state = load(found, tree, self.ranks, checked=True)
        saved = state["run"]
        if saved["seed"] != self.config.seed:
            raise ValueError(
                f"{found} belongs to a run of seed {saved['seed']}, this one has seed "
                f"{self.config.seed}: give it another name, or set checkpoint.resume=false"
            )
        if saved["update"] > self.config.num_updates:
            raise ValueError(
                f"{found} has {saved['update']} updates behind it, num_updates is "
                f"{self.config.num_updates}: raise it, give the run another name, or set "
                "checkpoint.resume=false"
            )
        self.policy.load_state(state)
        self.update, self.guard.strikes = int(saved["update"]), int(saved.get("strikes", 0))
        self._saver.saved = self.update
        logger.info("resuming from %s: %d updates are done", found, self.update)
        if self.stopped:
            self._last = self.update
            logger.warning(
                "the guard of the rewards ended this run: with reward.guard.stop=false it goes on"
            )

    def finish(self, seconds_per_update: float) -> None:
        """Summary, report and the last line of output; leave the ranks.

        `seconds_per_update` is nan if a finished run was started again and did no update.
        """
        folder = self.config.run_folder
        if self.first and "after" in self._tables and not self.interrupted:
            if math.isnan(seconds_per_update):
                seconds_per_update = _earlier_seconds(folder / "summary.json")
            summary = summarise(
                self._tables["before"], self._tables["after"],
                held_out=self.config.reward.held_out, updates=self._last,
                seconds_per_update=seconds_per_update, ranks=self.ranks.world,
                reward_real=self._real, name=self.config.name, seed=self.config.seed,
            )  # fmt: skip
            (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
            if self.config.log.report:
                write_report(folder)
            log.emit_result(to_json(summary))
        for judge in self._judges:
            judge.close()
        stop_ranks()


def _earlier_seconds(summary: Path) -> float:
    """What the run took an update when it finished before; 0 if that is not known."""
    if not summary.is_file():
        return 0.0
    return float(json.loads(summary.read_text())["seconds_per_update"])
