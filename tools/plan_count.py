"""Which passes of the transformer an update takes on one rank: counted by running the loop itself.

The stages of a run, with its rollouts, replays and shares over branch ranks, go on a stand-in for
the model that has no weights and only notes each pass. So nothing here knows how many there are.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_kvpo.config import RunConfig
from megatron_kvpo.data.prompts import load_prompts
from megatron_kvpo.model.causal_wan import TextKeys
from megatron_kvpo.model.pages import PagePool, PassPages
from megatron_kvpo.parallel.collect import shares
from megatron_kvpo.parallel.groups import Axis
from megatron_kvpo.records import Prompt, RolloutGroup
from megatron_kvpo.rollout.group import SampledGroup
from megatron_kvpo.rollout.sizing import rows_at_once, run_pages
from megatron_kvpo.rollout.stream import World
from megatron_kvpo.routing import draw_plan, legal_forks
from megatron_kvpo.stopwatch import Stopwatch, stage
from megatron_kvpo.training.policy import Policy
from megatron_kvpo.training.replays import Replays
from megatron_kvpo.training.run import Run
from megatron_kvpo.training.stages import Stages

_LARGEST_SEARCH = 10_000

_counted: dict[str, Counted] = {}

_ALONE: Any = Axis(size=1, rank=0, group=None)  # type: ignore[arg-type]  # no one is spoken to


@dataclass(frozen=True, slots=True)
class Pass:
    """One kind of pass."""

    stage: str
    """That it is charged to, as tools.benchmark's records name them."""

    rows: int
    frames: int
    """Latent frames of each row: its tokens."""

    seen: int
    """Latent frames that these attend to, their own included."""

    graph: bool
    fills: bool
    """Whether it ends at the last block's keys and values."""


@dataclass(frozen=True, slots=True)
class Counted:
    """What one rank does in one update."""

    passes: dict[Pass, int]
    lent: int
    """Fewest pages that a backward pass may keep activations in."""

    def rows_of(self, name: str) -> int:
        """Passes x rows of a stage: what records call its passes."""
        return sum(kind.rows * n for kind, n in self.passes.items() if kind.stage == name)

    @property
    def stages(self) -> list[str]:
        """That have passes, in order."""
        return list(dict.fromkeys(kind.stage for kind in self.passes))


def prompts_of(config: RunConfig) -> tuple[Prompt, ...]:
    """One prompt for each set of switches and beginnings that the recipe's prompts have."""
    found = {
        (p.switch_frames, p.video_frames): p for p in reversed(load_prompts(config.data.prompts))
    }
    return tuple(reversed(found.values()))


def rollout_rows(config: RunConfig, branch: int) -> int:
    """Rows that the pages of the fullest branch rank must hold at once, as a run counts them."""
    own = shares(config.routing.num_branches + 1, branch)[0]
    return rows_at_once(len(own), config.policy, config.routing.num_branches)


def pages_of(config: RunConfig, prompts: Sequence[Prompt], branch: int, groups: int) -> int:
    """Pages of a rank that has so many groups of an update, without an evaluation."""
    return run_pages(
        config.stream, config.routing, config.memory, prompts, [], groups=groups,
        sequences=rollout_rows(config, branch), videos=0,
    )  # fmt: skip


def count(
    config: RunConfig, prompt: Prompt, fork: int, branch: int = 1, rank: int = 0, *,
    stale: bool = False,
) -> Counted:  # fmt: skip
    """One group of an update that forks at `fork`, on rank `rank` of `branch`.

    `stale`: the sampling policy is not the current one, so that it is replayed too. Not the first
    update: there is a reference.

    Raises:
        ValueError: no such fork, or no update is stale.
    """
    sections = config.stream, config.routing, config.memory, config.energy, config.policy
    key = repr((sections, config.loss, config.seed, config.model.recompute, prompt, fork, branch,
                rank, stale))  # fmt: skip
    if key not in _counted:
        _counted[key] = _count(config, prompt, fork, branch, rank, stale=stale)
    return _counted[key]


def _count(
    config: RunConfig, prompt: Prompt, fork: int, branch: int, rank: int, *, stale: bool
) -> Counted:  # fmt: skip
    update = _update(config, prompt, fork, stale)
    model = _StandIn(config)
    world: Any = World(model, model.new_pool(pages_of(config, [prompt], branch, 1)),  # type: ignore[arg-type]
                       config.stream, config.routing, config.memory)  # fmt: skip
    axis: Any = Axis(size=branch, rank=rank, group=None)  # type: ignore[arg-type]
    ranks: Any = SimpleNamespace(device=torch.device("cuda"), branch=axis, data=_ALONE)
    policy: Any = _Weightless(config, model)
    prompts: Any = SimpleNamespace(groups_of=lambda update: [prompt])
    stages = _Dry(config, ranks, policy, world, _encode, None, prompts, _given)  # type: ignore[arg-type]
    with Stopwatch() as watch:
        model.watch = watch
        groups = [_told(config, sampled) for sampled in stages.explore(update)]
        run: Any = SimpleNamespace(config=config, policy=policy, stages=stages)
        Run.energies(run, update, groups)
        stages.send_backward(update, groups)
    return Counted(dict(model.passes), min(model.lent, default=0))


def _update(config: RunConfig, prompt: Prompt, fork: int, stale: bool) -> int:
    legal = legal_forks(config.stream, config.routing, prompt.video_frames)
    period = config.policy.rollouts_per_policy_sync
    if fork not in legal:
        raise ValueError(f"no group of this recipe forks at {fork}: its forks are {legal}")
    if stale and period == 1:
        raise ValueError("policy.rollouts_per_policy_sync 1 never samples by old weights")
    for update in range(period + stale, _LARGEST_SEARCH, period):
        plan = draw_plan(config.stream, config.routing, (config.seed, update, prompt.index),
                         prompt.video_frames)  # fmt: skip
        if plan.fork_frame == fork:
            return update
    raise ValueError(f"no update of the first {_LARGEST_SEARCH} forks at {fork}")


class _StandIn:
    """Takes a model's calls and notes them. One token a frame, one layer."""

    def __init__(self, config: RunConfig) -> None:
        sizes = config.model
        self.model_config = dataclasses.replace(
            sizes, latent_channels=1, latent_height=sizes.patch[1], latent_width=sizes.patch[2]
        )
        self.spec = SimpleNamespace(
            ranks=SimpleNamespace(device=torch.device("cpu"), tensor=_ALONE, context=_ALONE)
        )
        self.recompute = SimpleNamespace(arena=None)
        self.passes: Counter[Pass] = Counter()
        self.lent: list[int] = []
        self.watch: Stopwatch | None = None
        self._weight = torch.zeros(1, requires_grad=True)

    def new_pool(self, num_pages: int) -> PagePool:
        """Pages of one number."""
        return PagePool(num_pages=num_pages, num_layers=1, tokens_per_frame=1, num_heads=1,
                        head_dim=1, device=torch.device("cpu"))  # fmt: skip

    def encode_text(self, text_BXD: Tensor) -> TextKeys:
        """Keys and values of one number."""
        key = torch.zeros(len(text_BXD), 1, 1, 1)
        return TextKeys(((key, key),))

    def __call__(
        self, latent_BFCHW: Tensor, timestep_BF: Tensor, frames: range, text: TextKeys,
        pages: PassPages,
    ) -> Tensor:  # fmt: skip
        assert self.watch is not None
        rows, own = latent_BFCHW.shape[:2]
        graph = torch.is_grad_enabled()
        seen = own - pages.own_from + pages.read_BM.shape[1]
        name = self.watch._inside[-1]
        self.passes[Pass(name, rows, own, seen, graph, pages.fills_only)] += 1
        if pages.fills_only:
            return latent_BFCHW.new_empty(0)
        if not graph:
            return torch.zeros_like(latent_BFCHW)
        arena = self.recompute.arena
        self.lent.append(0 if arena is None else len(arena.pages))
        return latent_BFCHW.detach() * self._weight


class _Weightless:
    """A policy's calendar, and slots with nothing in them."""

    is_synced = Policy.is_synced

    def __init__(self, config: RunConfig, model: _StandIn) -> None:
        self._config, self.model = config, model
        self.optimizer = SimpleNamespace(loss_scale=1.0, part=nullcontext)

    @contextmanager
    def acting(self, slot: str) -> Iterator[_StandIn]:
        """See Policy.acting."""
        yield self.model


class _Apart(Replays):
    """A rank's own replays; nothing is told."""

    def _told(self, *given: Any) -> Any:
        return None


class _Dry(Stages):
    """Stages of one rank whose neighbours are not there."""

    def replays(self, update: int, groups: Sequence[SampledGroup], asks: Sequence[Any]) -> Any:
        """See Stages.replays."""
        apart = _Apart(self.config, self.ranks.branch, self.policy, self.encode, self.noises,
                       self._parts)  # fmt: skip
        return apart.run(update, groups, asks)

    def send_backward(self, update: int, groups: Sequence[SampledGroup]) -> None:
        """What `backward` does on this rank before anything is gathered."""
        rows = self._backward_parts()[self.ranks.branch.rank]
        weight_G = torch.ones(self.config.routing.num_branches)
        with stage("backward"), self.policy.acting("current"):
            for sampled in groups:
                self._push(update, sampled, rows, weight_G, 0.0, None)


@dataclass(slots=True)
class _Expanded:
    """Stands for all ranks' sequences: this rank's first, over again."""

    own: RolloutGroup
    count: int
    _whole: RolloutGroup | None = field(default=None)

    def start(self) -> None:
        """See WholeGroup.start."""

    def __call__(self) -> RolloutGroup:
        if self._whole is None:
            taken = self.own.trajectory
            latent, state, velocity = (
                x[:1].expand(self.count, *x.shape[1:])
                for x in (self.own.latent_NFCHW, taken.state_NPTFCHW, taken.velocity_NPTFCHW)
            )
            self._whole = dataclasses.replace(
                self.own, latent_NFCHW=latent, sequences=tuple(range(self.count)),
                trajectory=dataclasses.replace(
                    taken, state_NPTFCHW=state, velocity_NPTFCHW=velocity
                ),
            )  # fmt: skip
        return self._whole


def _told(config: RunConfig, sampled: SampledGroup) -> SampledGroup:
    if sampled.whole is None:
        return sampled
    whole: Any = _Expanded(sampled.own, config.routing.num_branches + 1)
    return dataclasses.replace(sampled, whole=whole)


def _encode(texts: Sequence[str]) -> Tensor:
    return torch.zeros(len(texts), 1, 1)


def _given(prompt: Prompt) -> Tensor | None:
    return torch.zeros(1, prompt.video_frames, 1, 2, 2) if prompt.video_frames else None
