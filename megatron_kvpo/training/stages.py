"""The stages of one update over this rank's prompts and branches. train.py calls them in order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_kvpo.algorithm.advantage import advantages, beats_anchor
from megatron_kvpo.config import RunConfig
from megatron_kvpo.data.prompts import PromptStream, share
from megatron_kvpo.parallel.collect import gather_rows, shares
from megatron_kvpo.parallel.groups import Ranks
from megatron_kvpo.records import Energies, RewardTable
from megatron_kvpo.reward.composite import Scorer
from megatron_kvpo.rollout.group import GroupNoise, SampledGroup, roll_out_group
from megatron_kvpo.rollout.replay import Push, replay
from megatron_kvpo.rollout.sampler import TextEncoder
from megatron_kvpo.rollout.stream import World
from megatron_kvpo.routing import diversity, draw_plan
from megatron_kvpo.stopwatch import stage
from megatron_kvpo.training.policy import Policy


class Stages:
    """What happens to the groups of one update, on this rank's share of prompts and branches."""

    def __init__(
        self, config: RunConfig, ranks: Ranks, policy: Policy, world: World, encode: TextEncoder,
        scorer: Scorer, prompts: PromptStream,
    ) -> None:  # fmt: skip
        self.config, self.ranks, self.policy, self.world = config, ranks, policy, world
        self.encode, self.scorer, self.prompts = encode, scorer, prompts
        num_branches = config.routing.num_branches
        parts = shares(num_branches, ranks.branch.size)
        self._sizes = [len(part) for part in parts]
        self.branches = parts[ranks.branch.rank]
        self.sequences = (*self.branches, num_branches)

    def noises(self, update: int, prompt_index: int) -> GroupNoise:
        """Noises of one group, by coordinates."""
        return GroupNoise(self.world, self.config.seed, update, prompt_index)

    def explore(self, update: int) -> list[SampledGroup]:
        """Roll out this data rank's groups with the sampling policy."""
        axis = self.ranks.data
        groups = []
        with self.policy.acting("old"):
            for prompt in share(self.prompts.groups_of(update), axis.rank, axis.size):
                coordinates = (self.config.seed, update, prompt.index)
                plan = draw_plan(self.config.stream, self.config.routing, coordinates)
                noises = self.noises(update, prompt.index)
                groups.append(
                    roll_out_group(self.world, self.encode, prompt, plan, noises, self.sequences)
                )
        return groups

    def score(self, groups: Sequence[SampledGroup]) -> list[RewardTable]:
        """Score every branch and the anchor of each group; all branch ranks get all scores."""
        with stage("reward"):
            tables = self.scorer.score_groups([sampled.group for sampled in groups])
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
            distance = row.new_tensor(diversity(sampled.group.plan))
            parts.append(
                {**metrics, "reward/composite": self._composite(table),
                 "policy/route_distance": distance}
            )  # fmt: skip
            scales.append(1.0 if beats_anchor(table) else self.config.loss.unsafe_scale)
        mean = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        device = self.ranks.device
        return torch.stack(rows).float().to(device), torch.tensor(scales, device=device), mean

    def energies(
        self, update: int, groups: Sequence[SampledGroup], slot: str, *, keep: bool = False
    ) -> Energies:
        """Energies of all branches and of the anchors under the policy of `slot`.

        A group's rows go as one batch, as in its rollout, so that bits repeat. `keep` keeps the
        velocities of this rank's sequences too.
        """
        branches, anchors, velocities = [], [], []
        rows = range(len(self.sequences))
        with stage("replay"), self.policy.acting(slot):
            for sampled in groups:
                noises = self.noises(update, sampled.group.prompt.index)
                found = replay(sampled, self.encode, noises, self.config.energy, rows, keep=keep)
                energy_N = found.energy_B
                branches.append(gather_rows(energy_N[:-1], self.ranks.branch, self._sizes))
                anchors.append(energy_N[-1])
                if found.velocity_BPTFCHW is not None:
                    velocities.append(found.velocity_BPTFCHW)
        return Energies(torch.stack(branches), torch.stack(anchors), tuple(velocities))

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
        drifts: list[Tensor] = []
        with stage("backward"), self.policy.acting("current"):
            for sampled, weight_G, target in zip(groups, weight_PG, velocities, strict=True):
                with self.policy.optimizer.part():
                    drifts += self._push(update, sampled, weight_G, drift_weight, target)
        sizes = [size * len(groups) for size in self._sizes]
        return gather_rows(torch.cat(drifts), self.ranks.branch, sizes).mean()

    def _push(
        self, update: int, sampled: SampledGroup, weight_G: Tensor, drift_weight: float,
        target_NPTFCHW: Tensor | None,
    ) -> list[Tensor]:  # fmt: skip
        """One group's branches of this rank, policy.max_rows at a time. Their drifts."""
        most, scale = self.config.policy.max_rows, self.policy.optimizer.loss_scale
        noises = self.noises(update, sampled.group.prompt.index)
        weight_B = weight_G[self.branches.start : self.branches.stop]
        drifts = []
        for first in range(0, len(weight_B), most):
            stop = min(first + most, len(weight_B))
            rows, part = range(first, stop), slice(first, stop)
            push = Push(weight_B=weight_B[part], drift_weight=drift_weight, scale=scale)
            found = replay(
                sampled, self.encode, noises, self.config.energy, rows, push=push,
                reference_BPTFCHW=None if target_NPTFCHW is None else target_NPTFCHW[part],
            )  # fmt: skip
            drifts.append(found.drift_B)
        return drifts

    def _whole(self, score_KN: Tensor) -> Tensor:
        """All branches and the anchor, from this rank's branches and the anchor."""
        branch_GK = gather_rows(score_KN[:, :-1].T.contiguous(), self.ranks.branch, self._sizes)
        return torch.cat([branch_GK.T, score_KN[:, -1:]], dim=1)

    @staticmethod
    def _composite(table: RewardTable) -> Tensor:
        """Weighted mean of the branches' global scores."""
        weight_K = torch.tensor(table.weights, dtype=torch.float64, device=table.global_KN.device)
        return (weight_K @ table.global_KN[:, :-1].double()).mean() / weight_K.sum()
