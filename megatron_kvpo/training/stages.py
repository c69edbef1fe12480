"""The stages of one update over this rank's prompts and branches. train.py calls them in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_kvpo.algorithm.advantage import advantages, beats_anchor
from megatron_kvpo.config import RunConfig
from megatron_kvpo.data.prompts import PromptStream, share
from megatron_kvpo.parallel.collect import gather_rows, leveled_shares, shares
from megatron_kvpo.parallel.groups import Ranks
from megatron_kvpo.records import Energies, RewardTable, RolloutGroup, Trajectory
from megatron_kvpo.reward.composite import Scorer
from megatron_kvpo.rollout.group import (
    GroupNoise,
    SampledGroup,
    Sent,
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

_BACKWARD_PASSES = 3.5
"""What a pass with its backward costs, in passes without: as measured, docs/benchmarks."""

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
        """Branches and anchor (the last of all) that this rank rolls out, scores and replays."""

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
                whole = self._whole_group(sampled.group)
                groups.append(SampledGroup(whole, sampled.prefix, self._send(whole, send)))
        return groups

    def _whole_group(self, own: RolloutGroup) -> RolloutGroup:
        """Every branch rank's sequences, in order."""
        if self.ranks.branch.size == 1:
            return own
        latent, state, velocity = (
            gather_rows(x, self.ranks.branch, self._sizes)
            for x in (own.latent_NFCHW, own.trajectory.state_NPTFCHW,
                      own.trajectory.velocity_NPTFCHW)
        )  # fmt: skip
        return dataclasses.replace(
            own, latent_NFCHW=latent, sequences=tuple(range(len(latent))),
            trajectory=Trajectory(state_NPTFCHW=state, velocity_NPTFCHW=velocity),
        )  # fmt: skip

    def _own_group(self, whole: RolloutGroup) -> RolloutGroup:
        """This rank's sequences of a group."""
        part = slice(self.sequences[0], self.sequences[-1] + 1)
        trajectory = Trajectory(
            state_NPTFCHW=whole.trajectory.state_NPTFCHW[part],
            velocity_NPTFCHW=whole.trajectory.velocity_NPTFCHW[part],
        )
        return dataclasses.replace(whole, latent_NFCHW=whole.latent_NFCHW[part],
                                   sequences=self.sequences, trajectory=trajectory)  # fmt: skip

    def _send(self, whole: RolloutGroup, send: bool) -> Sent | None:
        """This rank's sequences to the judges."""
        if not send:
            return None
        with stage("reward"):
            return self.scorer.send_group(self._own_group(whole))

    def score(self, groups: Sequence[SampledGroup]) -> list[RewardTable]:
        """Scores of every branch and the anchor of each group; all branch ranks get all scores."""
        with stage("reward"):
            sent = [
                sampled.sent or self.scorer.send_group(self._own_group(sampled.group))
                for sampled in groups
            ]
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
                **metrics, "reward/composite": self._composite(table),
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
        """Energies of all branches and of the anchors under the policy of `slot`.

        This rank's rows of a group go in the batches of its rollout, so that bits repeat. `keep`
        keeps the velocities, all branch ranks', too. Without the `anchor` its energy is nan.
        """
        branches, anchors, velocities = [], [], []
        count = self.config.routing.num_branches + anchor
        rows_here = [n for n in self.sequences if n < count]
        sizes = [min(part.stop, count) - part.start for part in self._parts]
        parts = batches(rows_here, self.config.policy.rollout_rows)
        with stage("replay"), self.policy.acting(slot):
            for sampled in groups:
                noises = self.noises(update, sampled.group.prompt.index)
                found = [
                    replay(sampled, self.encode, noises, self.config.energy, rows, keep=keep)
                    for rows in parts
                ]
                none = sampled.group.trajectory.velocity_NPTFCHW[:0].float()  # if it has no row
                energy_N = self._gathered(
                    [none.flatten(), *(part.energy_B for part in found)], sizes
                )
                branches.append(energy_N[: count - anchor])
                anchors.append(energy_N[-1] if anchor else energy_N.new_full((), torch.nan))
                if keep:
                    kept = [none, *(part.velocity_BPTFCHW for part in found)]
                    velocities.append(self._gathered(kept, sizes))
        return Energies(torch.stack(branches), torch.stack(anchors), tuple(velocities))

    def _gathered(self, parts: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
        """All sequences' rows, from the batches of this rank's."""
        own = torch.cat([part for part in parts if part is not None])
        return gather_rows(own, self.ranks.branch, sizes)

    def backward(
        self, update: int, groups: Sequence[SampledGroup], weight_PG: Tensor,
        reference: Energies | None = None,
    ) -> Tensor:  # fmt: skip
        """Send this rank's branches backward: sum_g c_g dE_g / dtheta, and the drift's gradient.

        Which ones they are depends on what the rank has done before: see `_backward_parts`. The
        drift counts if `reference` holds velocities. Returns its mean over all branches.
        """
        drift_weight = self.config.loss.drift_coefficient / weight_PG.numel()
        kept = reference.velocities if reference else ()
        velocities = kept or [None] * len(groups)
        parts = [self._backward_parts(update, sampled) for sampled in groups]
        drifts: list[Tensor] = [weight_PG.new_zeros(0)]
        with stage("backward"), self.policy.acting("current"):
            for sampled, weight_G, target, part in zip(
                groups, weight_PG, velocities, parts, strict=True
            ):
                rows = part[self.ranks.branch.rank]
                with self.policy.optimizer.part():
                    drifts += self._push(update, sampled, rows, weight_G, drift_weight, target)
        sizes = [sum(len(part[rank]) for part in parts) for rank in range(self.ranks.branch.size)]
        return gather_rows(torch.cat(drifts), self.ranks.branch, sizes).mean()

    def _backward_parts(self, update: int, sampled: SampledGroup) -> list[range]:
        """The branches that each branch rank sends backward.

        With the anchor there is one sequence more than branches, and some ranks have rolled out and
        replayed more of them; these send fewer backward.
        """
        config, plan = self.config, sampled.group.plan
        steps, blocks = len(config.stream.steps), plan.num_blocks
        rolled = (config.stream.num_frames - plan.fork_frame) // config.stream.block_frames
        loss = config.loss
        replays = (
            1
            + (not self.policy.is_synced(update))
            + ((loss.kl_coefficient > 0 or loss.drift_coefficient > 0) and update > 0)
        )
        fill = blocks - 1
        one = rolled * (steps + 1) - 1 + replays * (blocks * steps + fill)
        back = blocks * config.energy.grad_steps * _BACKWARD_PASSES + fill
        least = _GPU_ROWS if self.ranks.device.type == "cuda" else 1

        def cost(branches: int) -> float:
            parts = batches(range(branches), config.policy.max_rows)
            return back * sum(max(len(part), least) for part in parts)

        return leveled_shares(
            config.routing.num_branches, cost, [size * one for size in self._sizes]
        )

    def _push(
        self, update: int, sampled: SampledGroup, branches: range, weight_G: Tensor,
        drift_weight: float, target_NPTFCHW: Tensor | None,
    ) -> list[Tensor]:  # fmt: skip
        """Some of a group's branches, policy.max_rows at a time. Their drifts."""
        config, scale = self.config, self.policy.optimizer.loss_scale
        noises = self.noises(update, sampled.group.prompt.index)
        drifts = []
        for rows in batches(branches, config.policy.max_rows):
            part = slice(rows[0], rows[-1] + 1)
            push = Push(weight_B=weight_G[part], drift_weight=drift_weight, scale=scale)
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

    @staticmethod
    def _composite(table: RewardTable) -> Tensor:
        """Weighted mean of the branches' global scores."""
        weight_K = torch.tensor(table.weights, dtype=torch.float64, device=table.global_KN.device)
        return (weight_K @ table.global_KN[:, :-1].double()).mean() / weight_K.sum()
