"""Which rank replays which sequences of a group, and the energies that come of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_kvpo.config import RunConfig
from megatron_kvpo.parallel.collect import gather_rows, leveled_shares
from megatron_kvpo.parallel.groups import Axis
from megatron_kvpo.records import Energies, RoutingPlan
from megatron_kvpo.rollout.group import GroupNoise, SampledGroup, batches
from megatron_kvpo.rollout.replay import replay
from megatron_kvpo.rollout.sampler import TextEncoder
from megatron_kvpo.stopwatch import stage
from megatron_kvpo.training.policy import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """A policy's replay of all groups."""

    slot: str
    keep: bool = False
    """Its velocities, too."""

    anchor: bool = True
    """Without the anchor its energy is nan."""

    moves: bool = False
    """A rank that has rolled out less may replay other ranks' sequences."""


@dataclass(frozen=True, slots=True)
class Duty:
    """Who replays what for one ask and one group: a tuple of sequences for each branch rank."""

    stay: tuple[tuple[int, ...], ...]
    """Those that the rank has rolled out itself."""

    come: tuple[tuple[int, ...], ...]
    """Those of other ranks."""

    @property
    def order(self) -> list[int]:
        """The sequences as ranks tell them, one rank after the other."""
        return [n for pair in zip(self.stay, self.come, strict=True) for part in pair for n in part]

    @property
    def sizes(self) -> list[int]:
        """How many each rank tells."""
        return [len(a) + len(b) for a, b in zip(self.stay, self.come, strict=True)]


def share_replays(
    parts: Sequence[Sequence[int]], count: int, loads: Sequence[float] | None, cost: float
) -> Duty:
    """Duties when rank r has rolled out parts[r] and the first `count` sequences are replayed.

    `loads` is what ranks have done before, `cost` what one replay is beside it; None: all stay.
    """
    own = [tuple(n for n in part if n < count) for part in parts]
    nothing: tuple[int, ...] = ()
    if loads is None:
        return Duty(tuple(own), (nothing,) * len(own))
    due = [len(part) for part in leveled_shares(count, lambda k: k * cost, loads)]
    stay = tuple(part[:most] for part, most in zip(own, due, strict=True))
    left = iter([n for part, most in zip(own, due, strict=True) for n in part[most:]])
    come = tuple(
        tuple(next(left) for _ in range(most - len(part)))
        for part, most in zip(stay, due, strict=True)
    )
    return Duty(stay, come)


class Replays:
    """Replays groups on this rank's share of the branch axis."""

    def __init__(
        self, config: RunConfig, axis: Axis, policy: Policy, encode: TextEncoder,
        noises: Callable[[int, int], GroupNoise], parts: Sequence[Sequence[int]],
    ) -> None:  # fmt: skip
        """`parts`: the sequences that each branch rank rolls out."""
        self._config, self._axis, self._policy = config, axis, policy
        self._encode, self._noises = encode, noises
        self._parts = parts
        self._mixes = config.routing.exploration == "noise"  # branches replay the anchor's states

    def run(
        self, update: int, groups: Sequence[SampledGroup], asks: Sequence[Ask]
    ) -> list[Energies]:  # fmt: skip
        """All that is asked, on every branch rank. Collective.

        A rank waits for others' sequences only when it is through with its own, and for their
        energies only at the end. What stays goes in the batches of its rollout: bits repeat.
        """
        duties = [[self._duty(ask, asks[:i], g.own.plan) for g in groups]
                  for i, ask in enumerate(asks)]  # fmt: skip
        rank, moved = self._axis.rank, any(any(d.come) for own in duties for d in own)
        takes = any(d.come[rank] for own in duties for d in own)
        if (moved and not takes) or self._mixes:
            self._start(groups)
        found = [self._replayed(update, groups, ask, [d.stay[rank] for d in own], came=False)
                 for ask, own in zip(asks, duties, strict=True)]  # fmt: skip
        if takes:
            self._start(groups)
            for i, (ask, own) in enumerate(zip(asks, duties, strict=True)):
                more = self._replayed(update, groups, ask, [d.come[rank] for d in own], came=True)
                found[i] = [[*a, *b] for a, b in zip(found[i], more, strict=True)]
        energies = [self._told(ask, own, parts, groups)
                    for ask, own, parts in zip(asks, duties, found, strict=True)]  # fmt: skip
        for sampled in groups:  # whole on all ranks from here on
            _ = sampled.group
        return energies

    @staticmethod
    def _start(groups: Sequence[SampledGroup]) -> None:
        for sampled in groups:
            if sampled.whole is not None:
                sampled.whole.start()

    def _duty(self, ask: Ask, before: Sequence[Ask], plan: RoutingPlan) -> Duty:
        config, size = self._config, self._axis.size
        count, loads = config.routing.num_branches + ask.anchor, None
        steps, blocks = len(config.stream.steps), plan.num_blocks
        rolled = (config.stream.num_frames - plan.fork_frame) // config.stream.block_frames
        one = blocks * steps + blocks - 1  # passes of a row's replay
        if ask.moves and size > 1:
            rollout = rolled * (steps + 1) - 1
            loads = [len(part) * (rollout + one * len(before)) for part in self._parts]
        return share_replays(self._parts, count, loads, one)

    def _replayed(
        self, update: int, groups: Sequence[SampledGroup], ask: Ask,
        rows: Sequence[tuple[int, ...]], *, came: bool,
    ) -> list[list[tuple[Tensor, Tensor | None]]]:  # fmt: skip
        """(energies, velocities if kept) of each batch, for each group."""
        if not any(rows):
            return [[] for _ in groups]
        found = []
        with stage("replay"), self._policy.acting(ask.slot):
            for sampled, part in zip(groups, rows, strict=True):
                noises = self._noises(update, sampled.own.prompt.index)
                turns = self._batches(part, came)
                found.append([self._batch(sampled, noises, ask, some, came) for some in turns])
        return found

    def _batches(self, rows: tuple[int, ...], came: bool) -> list[tuple[int, ...]]:
        """Of the rollout; those of other ranks evenly, no larger: pages are there for as many."""
        most = self._config.policy.rollout_rows
        if came and rows:
            own = len(self._parts[self._axis.rank])
            turns = math.ceil(len(rows) / min(own, most or own))
            most = math.ceil(len(rows) / turns)
        return batches(rows, most)

    def _batch(
        self, sampled: SampledGroup, noises: GroupNoise, ask: Ask, rows: Sequence[int], came: bool
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """One batch. Own sequences do not wait for the others'."""
        if not came and not self._mixes:
            sampled = replace(sampled, whole=None)
            rows = [sampled.own.sequences.index(n) for n in rows]
        part = replay(sampled, self._encode, noises, self._config.energy, rows, keep=ask.keep)
        return part.energy_B, part.velocity_BPTFCHW

    def _told(
        self, ask: Ask, duties: Sequence[Duty],
        parts: Sequence[Sequence[tuple[Tensor, Tensor | None]]], groups: Sequence[SampledGroup],
    ) -> Energies:  # fmt: skip
        """What all ranks have found, in the order of the sequences."""
        branches, anchors, velocities = [], [], []
        count = self._config.routing.num_branches
        for duty, own, sampled in zip(duties, parts, groups, strict=True):
            none = sampled.own.trajectory.velocity_NPTFCHW[:0].float()  # if it has no row
            energy_N = self._gathered([none.flatten(), *(e for e, _ in own)], duty)
            branches.append(energy_N[:count])
            anchors.append(energy_N[-1] if ask.anchor else energy_N.new_full((), torch.nan))
            if ask.keep:
                velocities.append(self._gathered([none, *(v for _, v in own)], duty))
        return Energies(torch.stack(branches), torch.stack(anchors), tuple(velocities))

    def _gathered(self, parts: Sequence[Tensor | None], duty: Duty) -> Tensor:
        own = torch.cat([part for part in parts if part is not None])
        told = gather_rows(own, self._axis, duty.sizes)
        if duty.order == sorted(duty.order):
            return told
        back = sorted(range(len(duty.order)), key=duty.order.__getitem__)
        return told[torch.tensor(back, device=told.device)]
