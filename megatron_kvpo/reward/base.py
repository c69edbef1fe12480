"""What a reward is, and the table of those there are."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from megatron_kvpo.records import Clip
from megatron_kvpo.reward.shapes import (
    MotionQuality,
    TemporalConsistency,
    TextAlignment,
    VisualQuality,
)


class Reward(Protocol):
    """Scores finished clips. Higher is better; the scale is the reward's own.

    A reward never sees advantages, other branches or the policy. It runs without grad and gives
    a clip the same score whatever else is in the batch.
    """

    name: str

    def score(self, clips: Sequence[Clip]) -> Tensor:
        """Score clips. Returns float32 [B], on the clips' device."""
        ...


REWARDS: dict[str, Callable[[], Reward]] = {
    "visual_quality": VisualQuality,
    "motion_quality": MotionQuality,
    "text_alignment": TextAlignment,
    "temporal_consistency": TemporalConsistency,
}
"""Adding a reward: one file with a class, one line here, one name in the YAML."""


def build_reward(name: str) -> Reward:
    """Look a reward up by the name a config gives it. ValueError names the nearest known one."""
    if name not in REWARDS:
        close = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown reward {name!r}: {hint}there are {sorted(REWARDS)}")
    return REWARDS[name]()
