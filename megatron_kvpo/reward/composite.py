"""From finished latents to scores: decode, cut clips, ask every reward, put the scores together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kvpo.config import RewardConfig, StreamConfig
from megatron_kvpo.records import Clip, Prompt, RewardTable, RolloutGroup, Span
from megatron_kvpo.reward.base import Reward, build_reward
from megatron_kvpo.stopwatch import stage
from megatron_kvpo.world import pixel_start

Decode = Callable[[Tensor], Tensor]
"""latent_BFCHW of whole videos from frame 0 -> pixels [B, 4F - 3, 3, H, W] in [0, 1]."""

DecodeRows = Callable[[Tensor, int], Iterable[Tensor]]
"""The same for rows that share their first latent frames, a few rows at a time."""

_ROWS_PER_DECODE = 16


def clip_of(frames_FCHW: Tensor, prompt: Prompt, start_pixel: int, stop_pixel: int) -> Clip:
    """Cut pixel frames [start, stop) out of a whole video, with the texts that govern them.

    Raises:
        ValueError: the range is empty or leaves the video.
    """
    num_pixel_frames = len(frames_FCHW)
    if not 0 <= start_pixel < stop_pixel <= num_pixel_frames:
        raise ValueError(
            f"a clip [{start_pixel}, {stop_pixel}) must lie inside the video's "
            f"{num_pixel_frames} pixel frames"
        )
    spans = []
    for index, (start, stop) in enumerate(_segments(prompt, num_pixel_frames)):
        first, last = max(start, start_pixel), min(stop, stop_pixel)
        if first < last:
            spans.append(
                Span(
                    start=first - start_pixel,
                    stop=last - start_pixel,
                    text=prompt.segments[index],
                    history=prompt.segments[:index],
                )
            )
    return Clip(frames_FCHW=frames_FCHW[start_pixel:stop_pixel], spans=tuple(spans))


def _segments(prompt: Prompt, num_pixel_frames: int) -> list[tuple[int, int]]:
    """[start, stop) in pixel frames of each segment that the video reaches."""
    num_latent_frames = (num_pixel_frames + 6) // 4  # the last latent frame may be cut short
    spans = prompt.spans(num_latent_frames)
    return [
        (pixel_start(a), min(pixel_start(b), num_pixel_frames))
        for a, b in spans
        if pixel_start(a) < num_pixel_frames
    ]


@dataclass(frozen=True, slots=True)
class _Cut:
    """Where a clip lies in its video."""

    start: int
    stop: int


class Scorer:
    """Scores videos by the rewards a config names."""

    def __init__(
        self, config: RewardConfig, stream: StreamConfig, decode: Decode,
        decode_rows: DecodeRows | None = None,
    ) -> None:  # fmt: skip
        """Build the rewards. ValueError: an unknown component, or nothing to train on.

        `decode_rows` serves where rows share a prefix, if it is given.
        """
        if not config.weights or not sum(config.weights.values()):
            raise ValueError(
                f"reward.weights {config.weights} name no reward to train on: give at least one "
                "component a weight, for example reward.weights={visual_quality: 1}"
            )
        self.config = config
        self.components = tuple(config.weights)
        self._rewards: dict[str, Reward] = {
            name: build_reward(name) for name in (*config.weights, *config.held_out)
        }
        self._stream = stream
        self._decode, self._decode_rows = decode, decode_rows

    def score_groups(self, groups: Sequence[RolloutGroup]) -> list[RewardTable]:
        """Score every row of each group, in the group's row order.

        Local: the fork's chunk. Global: a clip centred on each prompt segment, averaged over
        segments; one that ends before the fork is the same in all rows and is scored once.
        Groups and rows do not see each other: the tables do not depend on what is scored
        together.
        """
        return [self._score_group(group) for group in groups]

    @torch.no_grad()
    def _score_group(self, group: RolloutGroup) -> RewardTable:
        num_rows = len(group.latent_NFCHW)
        fork = pixel_start(group.plan.fork_frame)
        local = self._local_cut(group)
        globals_ = self._global_cuts(group.prompt, pixel_start(group.latent_NFCHW.shape[1]))
        cuts = [local, *globals_]
        shared: dict[_Cut, Tensor] = {}
        parts: list[Tensor] = []
        for frames_BFCHW in self.decoded(group.latent_NFCHW, group.plan.fork_frame):
            columns = []
            for cut in cuts:
                if cut.stop <= fork:
                    if cut not in shared:
                        shared[cut] = self._score_cut(frames_BFCHW[:1], group.prompt, cut)
                    columns.append(shared[cut].expand(-1, len(frames_BFCHW)))
                else:
                    columns.append(self._score_cut(frames_BFCHW, group.prompt, cut))
            parts.append(torch.stack(columns))
        score_SKN = torch.cat(parts, dim=2)  # the local clip, then each segment's
        if score_SKN.shape[2] != num_rows:
            raise ValueError(f"decode returned {score_SKN.shape[2]} videos for {num_rows} rows")
        return RewardTable(
            components=self.components,
            weights=tuple(self.config.weights.values()),
            local_KN=score_SKN[0].contiguous(),
            global_KN=score_SKN[1:].mean(0),
        )

    def _local_cut(self, group: RolloutGroup) -> _Cut:
        start, stop = self._stream.chunk_of(group.plan.fork_frame)
        num_latent_frames = group.latent_NFCHW.shape[1]
        if not start <= group.plan.fork_frame < num_latent_frames:
            raise ValueError(
                f"fork frame {group.plan.fork_frame} lies outside the rollout's "
                f"{num_latent_frames} latent frames"
            )
        return _Cut(pixel_start(start), pixel_start(min(stop, num_latent_frames)))

    def _global_cuts(self, prompt: Prompt, num_pixel_frames: int) -> list[_Cut]:
        """One clip of the configured length around the middle of each segment, inside the video."""
        length = min(self.config.global_clip_pixel_frames, num_pixel_frames)
        cuts = []
        for start, stop in _segments(prompt, num_pixel_frames):
            first = (start + stop - length) // 2
            first = max(0, min(first, num_pixel_frames - length))
            cuts.append(_Cut(first, first + length))
        return cuts

    def _score_cut(self, frames_BFCHW: Tensor, prompt: Prompt, cut: _Cut) -> Tensor:
        """Trained components [K, B] of one cut of each row."""
        clips = [clip_of(frames, prompt, cut.start, cut.stop) for frames in frames_BFCHW]
        return torch.stack([self._rewards[name].score(clips) for name in self.components])

    def decoded(self, latent_BFCHW: Tensor, shared_frames: int = 0) -> Iterator[Tensor]:
        """Pixels of a few rows at a time, float32 [b, 4F - 3, 3, H, W]. Each row decodes once.

        The first `shared_frames` latents are the same in all rows.
        """
        num_pixel_frames = pixel_start(latent_BFCHW.shape[1])
        parts: Iterator[Tensor] = map(self._decode, torch.split(latent_BFCHW, _ROWS_PER_DECODE))
        if self._decode_rows is not None:
            parts = iter(self._decode_rows(latent_BFCHW, shared_frames))
        while True:
            with stage("decode"):
                frames = next(parts, None)
            if frames is None:
                return
            if frames.shape[1:3] != (num_pixel_frames, 3):
                raise ValueError(
                    f"decode returned {tuple(frames.shape)}: videos of {latent_BFCHW.shape[1]} "
                    f"latent frames have {num_pixel_frames} RGB pixel frames each"
                )
            yield frames.float()

    @torch.no_grad()
    def score_videos(self, latent_BFCHW: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Score whole videos, each as one clip: component -> float32 [B], held-out ones included.

        Raises:
            ValueError: not one prompt per video.
        """
        if len(prompts) != len(latent_BFCHW):
            raise ValueError(f"{len(prompts)} prompts for {len(latent_BFCHW)} videos")
        scores: dict[str, list[Tensor]] = {name: [] for name in self._rewards}
        done = 0
        for frames_BFCHW in self.decoded(latent_BFCHW):
            clips = [
                clip_of(frames, prompt, 0, len(frames))
                for frames, prompt in zip(frames_BFCHW, prompts[done:], strict=False)
            ]
            done += len(clips)
            for name, reward in self._rewards.items():
                scores[name].append(reward.score(clips))
        if done != len(latent_BFCHW):
            raise ValueError(f"decode returned {done} videos for {len(latent_BFCHW)} rows")
        return {name: torch.cat(parts) for name, parts in scores.items()}

    def composite(self, scores: dict[str, Tensor]) -> Tensor:
        """Mean of the trained components by their weights: sum_k w_k r_k / sum_k w_k. [B]."""
        weights = self.config.weights
        missing = [name for name in weights if name not in scores]
        if missing:
            raise ValueError(f"scores of {missing} are missing; there are {sorted(scores)}")
        total = torch.stack([weight * scores[name] for name, weight in weights.items()]).sum(0)
        return total / sum(weights.values())
