"""What a reward is, and the table of those there are."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_kvpo.config import RewardConfig
from megatron_kvpo.records import Clip
from megatron_kvpo.reward.hpsv3 import HpsV3
from megatron_kvpo.reward.shapes import (
    MotionQuality,
    TemporalConsistency,
    TextAlignment,
    VisualQuality,
)
from megatron_kvpo.reward.videoreward import VideoReward


class Reward(Protocol):
    """Scores finished clips, by one component or by several at once. Higher is better.

    A reward never sees advantages, other branches or the policy. It runs without grad and gives
    a clip the same score whatever else is in the batch.
    """

    @property
    def components(self) -> tuple[str, ...]:
        """Names of what it scores, each a key of REWARDS."""
        ...

    def score(self, clips: Sequence[Clip]) -> Tensor:
        """Score clips. Returns float32 [K, B], a row for each component, on the clips' device."""
        ...


class Measure(Protocol):
    """A reward of one component, without settings: a name and a score."""

    name: str

    def score(self, clips: Sequence[Clip]) -> Tensor:
        """Score clips. Returns float32 [B]."""
        ...


class Measured:
    """A measure as a reward."""

    def __init__(self, measure: Measure) -> None:
        self._measure = measure

    @property
    def components(self) -> tuple[str, ...]:
        """See Reward.components."""
        return (self._measure.name,)

    def score(self, clips: Sequence[Clip]) -> Tensor:
        """See Reward.score."""
        return self._measure.score(clips)[None]


Builder = Callable[[RewardConfig, torch.device], Reward]
"""Settings and where to compute -> a reward. ValueError for settings or files that do not do."""


def measured(kind: Callable[[], Measure]) -> Builder:
    """The builder of a measure."""
    return lambda config, device: Measured(kind())


SHAPES: dict[str, Builder] = {
    "visual_quality": measured(VisualQuality),
    "motion_quality": measured(MotionQuality),
    "text_alignment": measured(TextAlignment),
    "temporal_consistency": measured(TemporalConsistency),
}
"""Of the shapes world: they read its captions only."""

REWARDS: dict[str, Builder] = {
    **SHAPES,
    "videoreward_vq": VideoReward.build,
    "videoreward_mq": VideoReward.build,
    "videoreward_ta": VideoReward.build,
    "hpsv3": HpsV3.build,
}
"""Adding a reward: one file with a class, one line here, one name in the YAML. Components that
share a builder are scored together, by one reward."""


def build_rewards(
    names: Iterable[str], config: RewardConfig, device: torch.device | str = "cpu"
) -> list[Reward]:
    """The rewards that have these components, each once. ValueError names the nearest known one."""
    builders: dict[Builder, None] = {}
    for name in names:
        if name not in REWARDS:
            close = difflib.get_close_matches(name, REWARDS, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"unknown reward {name!r}: {hint}there are {sorted(REWARDS)}")
        builders[REWARDS[name]] = None
    return [build(config, torch.device(device)) for build in builders]
