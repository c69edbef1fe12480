"""What one stage hands to the next. No stage passes a dict.

Dimension key, for this package:
    P prompts (groups)   G branches of one group   N sequences: G branches, then the anchor
    B batch rows         T denoising steps         F frames (latent unless it says pixel)
    C channels           H, W height, width        L tokens of a pass   M cached key tokens
    A heads              E head size               D hidden size        S text segments
    X text tokens        K reward components
A suffix names logical dimensions: `hidden_LBD` keeps its name when L is this rank's share.
Frames are latent frames unless a name says `pixel`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What one video is asked to show: one text per segment, and where each segment begins."""

    segments: tuple[str, ...]
    """Texts in order; a later one may refer to what an earlier one named."""

    switch_frames: tuple[int, ...] = ()
    """Latent frame at which segment 1, 2, ... begins; segment 0 begins at 0."""

    index: int = 0
    """Line number in the prompt file: a coordinate of every noise drawn for this prompt."""

    video: Path | None = None
    """What is continued: a video file, or the folder of a cache of latents. None: nothing."""

    clip: int | None = None
    """Which clip of the cache."""

    video_frames: int = 0
    """Latent frames that are taken from the start of `video`; what is generated begins there."""

    def __post_init__(self) -> None:
        if (self.video is None) != (self.video_frames == 0) or self.video_frames < 0:
            raise ValueError(
                f"prompt {self.index} takes {self.video_frames} latent frames of the video "
                f"{self.video}: give both 'video' and 'video_frames', above 0, or neither"
            )
        if self.clip is not None and (self.video is None or self.clip < 0):
            raise ValueError(
                f"prompt {self.index} names clip {self.clip} of {self.video}: 'clip' is the number "
                "of a clip, from 0, in the cache of latents whose folder is 'video'"
            )
        if not self.segments or any(not text.strip() for text in self.segments):
            raise ValueError(f"prompt {self.index} has an empty segment: {self.segments}")
        if len(self.switch_frames) != len(self.segments) - 1:
            raise ValueError(
                f"prompt {self.index} has {len(self.segments)} segments and "
                f"{len(self.switch_frames)} switch frames: it needs {len(self.segments) - 1}"
            )
        starts = (0, *self.switch_frames)
        if any(b <= a for a, b in itertools.pairwise(starts)):
            raise ValueError(f"prompt {self.index}: switch frames {self.switch_frames} must rise")

    def segment_at(self, frame: int) -> int:
        """Index of the segment that latent frame `frame` belongs to."""
        return sum(frame >= start for start in self.switch_frames)

    def spans(self, num_frames: int) -> list[tuple[int, int]]:
        """[start, stop) in latent frames of each segment that begins before `num_frames`."""
        starts = [s for s in (0, *self.switch_frames) if s < num_frames]
        return list(zip(starts, [*starts[1:], num_frames], strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentBatch:
    """Encoded videos and the segments they are told in."""

    latent_BFCHW: Tensor
    """float32, on the device."""

    segment_S3: Tensor
    """int64 (row of the batch, first latent frame, one past the last) of each text segment, by
    rows."""

    text_SXD: Tensor
    """Embeddings of the segments' texts."""

    index_B: Tensor
    """Which clips."""


class LatentStream(Protocol):
    """Batches of encoded videos without an end."""

    def batches(self, step: int = 0) -> Iterator[LatentBatch]:
        """This data rank's share of each global batch, from global step `step` on.

        A pure function of (seed, step, global batch).
        """
        ...

    def fingerprint(self) -> str:
        """Of the data set: what was trained on another does not go on with this one."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A stretch of a clip under one text."""

    start: int
    """First pixel frame of the clip that the text governs."""

    stop: int
    """One past the last."""

    text: str
    history: tuple[str, ...] = ()
    """Texts of the segments before this one, oldest first: what its pronouns refer to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """What a reward sees: consecutive pixel frames and the texts they were asked to show."""

    frames_FCHW: Tensor
    """float32 in [0, 1], RGB, F pixel frames."""

    spans: tuple[Span, ...]
    """Cover [0, F) in order, without gap or overlap."""

    def __post_init__(self) -> None:
        edges = [0, *(span.stop for span in self.spans)]
        starts = [span.start for span in self.spans]
        if not self.spans or starts != edges[:-1] or edges[-1] != len(self.frames_FCHW):
            raise ValueError(
                f"spans {[(s.start, s.stop) for s in self.spans]} must cover the clip's "
                f"{len(self.frames_FCHW)} pixel frames in order"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingPlan:
    """Which old frames each branch of one group attends to, drawn before anything is generated."""

    fork_frame: int
    """First latent frame of the first routed block."""

    num_blocks: int
    """Consecutive blocks generated under routing."""

    routed_frames_G: tuple[tuple[int, ...], ...]
    """Per branch, ascending absolute latent frames that take the place of its older window. Empty
    tuples mean no routing (exploration `noise` and `none`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """The policy window of one group as sampled: P routed blocks, T steps, all N sequences."""

    state_NPTFCHW: Tensor
    """Noisy latents fed to the model. P counts blocks here."""

    velocity_NPTFCHW: Tensor
    """The model's output at each of them, under routing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutGroup:
    """One prompt's branches and its anchor, from the first frame to the last."""

    prompt: Prompt
    plan: RoutingPlan
    latent_NFCHW: Tensor
    """Finished latents of these sequences; the prefix is the same in all."""

    trajectory: Trajectory
    sequences: tuple[int, ...]
    """Which sequence each row is: 0..G-1 a branch, G the anchor."""


class Energies(NamedTuple):
    """What one policy's replay of this rank's P groups gave, unrouted."""

    branch_PG: Tensor
    """Trajectory velocity energies of all branches, float32."""

    anchor_P: Tensor
    """Those of the anchors."""

    velocities: tuple[Tensor, ...] = ()
    """velocity_NPTFCHW of all sequences, one tensor a group, if they were to be kept."""

    def energy_N(self, place: int) -> Tensor:
        """Of one group's branches, the anchor's last."""
        return torch.cat([self.branch_PG[place], self.anchor_P[place : place + 1]])


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardTable:
    """Scores of one group, G branches then the anchor, per reward component."""

    components: tuple[str, ...]
    weights: tuple[float, ...]
    local_KN: Tensor
    """Scores of the fork's chunk. float32, higher is better."""

    global_KN: Tensor
    """Scores of the segments' clips, averaged over segments."""

    @property
    def composite_N(self) -> Tensor:
        """Weighted mean of the global scores, float64."""
        weight_K = self.global_KN.double().new_tensor(self.weights)
        return weight_K @ self.global_KN.double() / weight_K.sum()


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """A differentiable scalar and what to log of it. Metrics are detached."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
