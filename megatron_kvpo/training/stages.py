"""The stages of one update over this rank's prompts and branches. train.py calls them in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_kvpo.algorithm.advantage import advantages, beats_anchor
from megatron_kvpo.config import RunConfig
from megatron_kvpo.data.prompts import PromptStream, share
from megatron_kvpo.parallel.collect import gather_rows, leveled_shares, shares
from megatron_kvpo.parallel.groups import Ranks
from megatron_kvpo.records import Energies, RewardTable, RolloutGroup
from megatron_kvpo.reward.composite import Scorer
from megatron_kvpo.rollout.group import (
    GroupNoise,
    SampledGroup,
    Sent,
    WholeGroup,
    batches,
    roll_out_group,
)
from megatron_kvpo.rollout.replay import Push, replay
from megatron_kvpo.rollout.sampler import Beginning, TextEncoder, nothing_given
from megatron_kvpo.rollout.sizing import replay_pages
from megatron_kvpo.rollout.stream import World, lent_pages
from megatron_kvpo.routing import diversity, draw_plan, route_entropy
from megatron_kvpo.stopwatch import stage
from megatron_kvpo.training.policy import Policy
from megatron_kvpo.training.replays import Ask, Replays

AWAITING = "await scores"
"""The stage in which a run waits for judges elsewhere."""

_GPU_ROWS = 2
"""Fewer rows at once take a GPU as long with their backward: the host is what it waits for."""


def latent_distance(group: RolloutGroup) -> Tensor:
    """Root mean square of two branches' difference in latents from the fork on, over all pairs.

    0: all branches are one video. About 1.4: they have nothing in common.
    """
    after = group.latent_NFCHW[:-1, group.plan.fork_frame :].float()
    return (2 * after.var(dim=0).mean()).sqrt()


class Stages:
    """What happens to the groups of one update, on this rank's share of prompts and branches."""

    def __init__(
        self, config: RunConfig, ranks: Ranks, policy: Policy, world: World, encode: TextEncoder,
        scorer: Scorer, prompts: PromptStream, begin: Beginning = nothing_given,
    ) -> None:  # fmt: skip
        """`begin`: what prompts that continue a video begin with, the same on all branch ranks."""
        self.config, self.ranks, self.policy, self.world = config, ranks, policy, world
        self.encode, self.scorer, self.prompts, self.begin = encode, scorer, prompts, begin
        parts = shares(config.routing.num_branches + 1, ranks.branch.size)
        self._parts, self._sizes = parts, [len(part) for part in parts]
        self.sequences = tuple(parts[ranks.branch.rank])
        """Branches and anchor (the last of all) that this rank rolls out and scores."""

    def noises(self, update: int, prompt_index: int) -> GroupNoise:
        """Noises of one group, by coordinates."""
        return GroupNoise(self.world, self.config.seed, update, prompt_index)

    def explore(self, update: int, *, send: bool = False) -> list[SampledGroup]:
        """Roll out this data rank's groups with the sampling policy. All branch ranks get all.

        `send`: let the judges have each group's clips as soon as it is there. Those elsewhere then
        score while the next group rolls out, and while what follows goes on until `score`.
        """
        axis = self.ranks.data
        groups = []
        with self.policy.acting("old"):
            for prompt in share(self.prompts.groups_of(update), axis.rank, axis.size):
                coordinates = (self.config.seed, update, prompt.index)
                plan = draw_plan(self.config.stream, self.config.routing, coordinates,
                                 prompt.video_frames)  # fmt: skip
                noises = self.noises(update, prompt.index)
                sampled = roll_out_group(
                    self.world, self.encode, prompt, plan, noises, self.sequences,
                    self.config.policy.rollout_rows, self.begin,
                )  # fmt: skip
                own, among = sampled.own, self.ranks.branch
                whole = WholeGroup(own, among, self._sizes) if among.size > 1 else None
                groups.append(SampledGroup(own, sampled.prefix, self._send(own, send), whole))
        return groups

    def _send(self, own: RolloutGroup, send: bool) -> Sent | None:
        """This rank's sequences to the judges."""
        if not send:
            return None
        with stage("reward"):
            return self.scorer.send_group(own)

    def score(self, groups: Sequence[SampledGroup]) -> list[RewardTable]:
        """Scores of every branch and the anchor of each group; all branch ranks get all scores."""
        with stage("reward"):
            sent = [sampled.sent or self.scorer.send_group(sampled.own) for sampled in groups]
        with stage(AWAITING):
            tables = [part.collect() for part in sent]
        return [
            RewardTable(
                components=table.components, weights=table.weights,
                local_KN=self._whole(table.local_KN), global_KN=self._whole(table.global_KN),
            )
            for table in tables
        ]  # fmt: skip

    def advantages(
        self, update: int, groups: Sequence[SampledGroup], tables: Sequence[RewardTable]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """advantage_PG, scale_P and what to log, averaged over groups."""
        rows, parts, scales = [], [], []
        for sampled, table in zip(groups, tables, strict=True):
            coordinates = (self.config.seed, update, sampled.group.prompt.index)
            row, metrics = advantages(table, self.config.advantage, coordinates)
            rows.append(row)
            plan = sampled.group.plan
            parts.append({
                **metrics, "reward/composite": table.composite_N[:-1].mean(),
                "policy/route_distance": row.new_tensor(diversity(plan)),
                "policy/route_entropy": row.new_tensor(route_entropy(plan)),
                "policy/latent_distance": latent_distance(sampled.group).to(row.device),
            })  # fmt: skip
            scales.append(1.0 if beats_anchor(table) else self.config.loss.unsafe_scale)
        mean = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        device = self.ranks.device
        return torch.stack(rows).float().to(device), torch.tensor(scales, device=device), mean

    def energies(
        self, update: int, groups: Sequence[SampledGroup], slot: str, *, keep: bool = False,
        anchor: bool = True,
    ) -> Energies:  # fmt: skip
        """Energies of all branches and of the anchors under the policy of `slot`; see `Ask`."""
        return self.replays(update, groups, [Ask(slot=slot, keep=keep, anchor=anchor)])[0]

    def replays(
        self, update: int, groups: Sequence[SampledGroup], asks: Sequence[Ask]
    ) -> list[Energies]:  # fmt: skip
        """Several policies' replays, of which no rank waits for another before the end."""
        replays = Replays(self.config, self.ranks.branch, self.policy, self.encode, self.noises,
                          self._parts)  # fmt: skip
        return replays.run(update, groups, asks)

    def backward(
        self, update: int, groups: Sequence[SampledGroup], weight_PG: Tensor,
        reference: Energies | None = None,
    ) -> Tensor:  # fmt: skip
        """Send this rank's branches backward: sum_g c_g dE_g / dtheta, and the drift's gradient.

        The drift counts if `reference` holds velocities. Returns its mean over all branches.
        """
        drift_weight = self.config.loss.drift_coefficient / weight_PG.numel()
        kept = reference.velocities if reference else ()
        velocities = kept or [None] * len(groups)
        parts, optimizer = self._backward_parts(), self.policy.optimizer
        drifts: list[Tensor] = [weight_PG.new_zeros(0)]
        with stage("backward"), self.policy.acting("current"):
            for sampled, weight_G, target in zip(groups, weight_PG, velocities, strict=True):
                rows, last = parts[self.ranks.branch.rank], sampled is groups[-1]
                with optimizer.part():
                    drifts += self._push(update, sampled, rows, weight_G, drift_weight, target,
                                         optimizer.last_pass if last else None)  # fmt: skip
            optimizer.reduce()
        sizes = [len(groups) * len(part) for part in parts]
        return gather_rows(torch.cat(drifts), self.ranks.branch, sizes).mean()

    def _backward_parts(self) -> list[range]:
        """The branches that each branch rank sends backward: as many, in whole batches."""
        least = _GPU_ROWS if self.ranks.device.type == "cuda" else 1

        def cost(branches: int) -> float:
            parts = batches(range(branches), self.config.policy.max_rows)
            return sum(max(len(part), least) for part in parts)

        idle = [0.0] * self.ranks.branch.size
        return leveled_shares(self.config.routing.num_branches, cost, idle)

    def _push(
        self, update: int, sampled: SampledGroup, branches: range, weight_G: Tensor,
        drift_weight: float, target_NPTFCHW: Tensor | None,
        before_last: Callable[[], None] | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Some of a group's branches, policy.max_rows at a time. Their drifts."""
        config, scale = self.config, self.policy.optimizer.loss_scale
        noises = self.noises(update, sampled.group.prompt.index)
        drifts = []
        for rows in batches(branches, config.policy.max_rows):
            part = slice(rows[0], rows[-1] + 1)
            last = before_last if part.stop == branches.stop else None
            push = Push(weight_B=weight_G[part], drift_weight=drift_weight, scale=scale,
                        before_last=last)  # fmt: skip
            need = replay_pages(config.stream, config.routing, config.memory,
                                sampled.group.prompt, len(rows))  # fmt: skip
            with lent_pages(self.world, leave=need):
                found = replay(
                    sampled, self.encode, noises, config.energy, rows, push=push,
                    reference_BPTFCHW=None if target_NPTFCHW is None else target_NPTFCHW[part],
                )  # fmt: skip
            drifts.append(found.drift_B)
        return drifts

    def _whole(self, score_KN: Tensor) -> Tensor:
        """All sequences' scores, from this rank's."""
        return gather_rows(score_KN.T.contiguous(), self.ranks.branch, self._sizes).T
