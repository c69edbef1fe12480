"""From finished latents to scores: decode, cut clips, ask every judge, put the scores together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_kvpo.config import RewardConfig, StreamConfig
from megatron_kvpo.parallel.collect import from_first
from megatron_kvpo.parallel.groups import Axis
from megatron_kvpo.records import Clip, Prompt, RewardTable, RolloutGroup, Span
from megatron_kvpo.reward.base import Reward, build_rewards
from megatron_kvpo.stopwatch import stage
from megatron_kvpo.world import pixel_start

DecodeRows = Callable[[Tensor, int], Iterable[Tensor]]
"""latent_BFCHW of videos from frame 0, whose first so many latents are the same in all rows ->
pixels [b, 4F - 3, 3, H, W] in [0, 1], a few rows at a time."""

Answer = Callable[[], Tensor]
"""Waits for scores: float32 [K, B]."""


class Judge(Protocol):
    """Who scores clips: a reward of this process, or one elsewhere while other things go on."""

    @property
    def components(self) -> tuple[str, ...]:
        """What it scores."""
        ...

    def submit(self, clips: Sequence[Clip], names: Sequence[str]) -> Answer:
        """Have clips scored by some of its components; the answer, [K, B], has these in order.

        The clips may be forgotten at once; the answer is asked for later.
        """
        ...


class Here:
    """A reward of this process. It answers at once."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward

    @property
    def components(self) -> tuple[str, ...]:
        """See Judge.components."""
        return self._reward.components

    def submit(self, clips: Sequence[Clip], names: Sequence[str]) -> Answer:
        """See Judge.submit."""
        found = self._reward.score(clips)[[self.components.index(name) for name in names]]
        return lambda: found


def clip_of(
    frames_FCHW: Tensor, prompt: Prompt, start_pixel: int, stop_pixel: int,
    num_pixel_frames: int | None = None,
) -> Clip:  # fmt: skip
    """Cut pixel frames [start, stop) out of a video, with the texts that govern them.

    `num_pixel_frames`: of the whole video, if `frames` are only its beginning.

    Raises:
        ValueError: the range is empty or leaves the frames.
    """
    whole, num_pixel_frames = num_pixel_frames or len(frames_FCHW), len(frames_FCHW)
    if not 0 <= start_pixel < stop_pixel <= num_pixel_frames:
        raise ValueError(
            f"a clip [{start_pixel}, {stop_pixel}) must lie inside the video's "
            f"{num_pixel_frames} pixel frames"
        )
    spans = []
    for index, (start, stop) in enumerate(_segments(prompt, whole)):
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


def _latents_until(pixel: int) -> int:
    """How many latent frames show all pixel frames before this one."""
    return (pixel + 6) // 4


def _segments(prompt: Prompt, num_pixel_frames: int) -> list[tuple[int, int]]:
    """[start, stop) in pixel frames of each segment that the video reaches."""
    spans = prompt.spans(_latents_until(num_pixel_frames))  # the last may be cut short
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


@dataclass(frozen=True, slots=True)
class SentGroup:
    """A group whose clips are with the judges."""

    components: tuple[str, ...]
    weights: tuple[float, ...]
    parts: tuple[tuple[Callable[[], dict[str, Tensor]], int], ...]
    """For a few rows each: what waits for the scores of their clips, cut by cut, and how many rows
    they are. The first part's clips before the fork, which are the same in all rows, come first."""

    num_shared: int
    """Clips that lie before the fork."""

    order: tuple[int, ...]
    """Where each cut, the local one first, stands among shared cuts and then the others."""

    device: torch.device

    def collect(self) -> RewardTable:
        """Wait for the scores. ValueError if a judge's do not fit."""
        names, columns, shared_KS = self.components, [], torch.empty(0)
        for number, (wait, num_rows) in enumerate(self.parts):
            scores = wait()
            score_KX = torch.stack([scores[name].float().to(self.device) for name in names])
            if number == 0:
                shared_KS, score_KX = score_KX.tensor_split([self.num_shared], dim=1)
            own_KSB = score_KX.view(len(names), -1, num_rows)
            shared_KSB = shared_KS[:, :, None].expand(-1, -1, num_rows)
            columns.append(torch.cat([shared_KSB, own_KSB], dim=1)[:, list(self.order)])
        score_KSN = torch.cat(columns, dim=2)
        return RewardTable(
            components=names, weights=self.weights, local_KN=score_KSN[:, 0].contiguous(),
            global_KN=score_KSN[:, 1:].mean(1),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SharedGroup:
    """A group that one of several ranks has sent; the scores come to all of them."""

    sent: SentGroup | None
    """On the rank that has."""

    components: tuple[str, ...]
    weights: tuple[float, ...]
    num_rows: int
    device: torch.device
    axes: tuple[Axis, ...]

    def collect(self) -> RewardTable:
        """See SentGroup.collect. Collective."""
        shape = (2, len(self.components), self.num_rows)
        both_2KN = torch.empty(shape, device=self.device)
        if self.sent is not None:
            table = self.sent.collect()
            both_2KN = torch.stack([table.local_KN, table.global_KN])
        local_KN, global_KN = from_first(both_2KN, self.axes)
        return RewardTable(components=self.components, weights=self.weights, local_KN=local_KN,
                           global_KN=global_KN)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group whose scores are there."""

    table: RewardTable

    def collect(self) -> RewardTable:
        """See SentGroup.collect."""
        return self.table


class Scorer:
    """Scores videos by the rewards a config names."""

    def __init__(
        self, config: RewardConfig, stream: StreamConfig, decode_rows: DecodeRows,
        judges: Sequence[Judge] | None = None, device: torch.device | str = "cpu",
        axes: Sequence[Axis] = (),
    ) -> None:  # fmt: skip
        """ValueError: an unknown component, or nothing to train on.

        Components that none of the `judges` has are built here, on `device`. Ranks along `axes`
        have the same videos: the first of them decodes and scores, and tells the others.
        """
        if not config.weights or not sum(config.weights.values()):
            raise ValueError(
                f"reward.weights {config.weights} name no reward to train on: give at least one "
                "component a weight, for example reward.weights={visual_quality: 1}"
            )
        self.config = config
        self.components = tuple(config.weights)
        self._wanted = (*config.weights, *config.held_out)
        self._axes = tuple(axis for axis in axes if axis.size > 1)
        self._speaks = all(axis.rank == 0 for axis in self._axes)
        elsewhere = list(judges or ())
        theirs = {name for judge in elsewhere for name in judge.components}
        missing = [name for name in self._wanted if self._speaks and name not in theirs]
        here = [Here(reward) for reward in build_rewards(missing, config, device)]
        self._judges: list[Judge] = [*elsewhere, *here]
        self._stream, self._decode_rows = stream, decode_rows

    def score_groups(self, groups: Sequence[RolloutGroup]) -> list[RewardTable]:
        """Score every row of each group, in the group's row order. See `send_group`."""
        return [sent.collect() for sent in [self.send_group(group) for group in groups]]

    def send_group(self, group: RolloutGroup) -> SentGroup | SharedGroup:
        """Decode a group and send its clips to the judges; see `_sent`."""
        if not self._axes:
            return self._sent(group)
        return SharedGroup(
            self._sent(group) if self._speaks else None, self.components,
            tuple(self.config.weights.values()), len(group.latent_NFCHW),
            group.latent_NFCHW.device, self._axes,
        )  # fmt: skip

    @torch.no_grad()
    def _sent(self, group: RolloutGroup) -> SentGroup:
        """Send a group's clips.

        Local: the fork's chunk. Global: a clip centred on each prompt segment, averaged over
        segments; one that ends before the fork is the same in all rows and is scored once.
        Latents behind the last clip are not decoded. Groups and rows do not see each other: a
        table does not depend on what is scored together.
        """
        latent_BFCHW, prompt = group.latent_NFCHW, group.prompt
        fork = pixel_start(group.plan.fork_frame)
        cuts = [
            self._local_cut(group),
            *self._global_cuts(prompt, pixel_start(latent_BFCHW.shape[1])),
        ]
        shared = [cut for cut in dict.fromkeys(cuts) if cut.stop <= fork]
        own = [cut for cut in dict.fromkeys(cuts) if cut.stop > fork]
        needed = latent_BFCHW[:, : _latents_until(max(cut.stop for cut in cuts))]
        parts: list[tuple[Callable[[], dict[str, Tensor]], int]] = []
        for frames_BFCHW in self.decoded(needed, min(group.plan.fork_frame, needed.shape[1])):
            clips = [self._clip(frames, group, cut) for cut in own for frames in frames_BFCHW]
            if not parts:
                clips = [*(self._clip(frames_BFCHW[0], group, cut) for cut in shared), *clips]
            parts.append((self._ask(self.components, clips), len(frames_BFCHW)))
        if sum(rows for _, rows in parts) != len(latent_BFCHW):
            rows = sum(rows for _, rows in parts)
            raise ValueError(f"decode returned {rows} videos for {len(latent_BFCHW)} rows")
        return SentGroup(
            components=self.components, weights=tuple(self.config.weights.values()),
            parts=tuple(parts), num_shared=len(shared),
            order=tuple([*shared, *own].index(cut) for cut in cuts), device=latent_BFCHW.device,
        )  # fmt: skip

    def _clip(self, frames_FCHW: Tensor, group: RolloutGroup, cut: _Cut) -> Clip:
        num_pixel_frames = pixel_start(group.latent_NFCHW.shape[1])
        return clip_of(frames_FCHW, group.prompt, cut.start, cut.stop, num_pixel_frames)

    def _ask(
        self, names: Sequence[str], clips: Sequence[Clip]
    ) -> Callable[[], dict[str, Tensor]]:  # fmt: skip
        """Send clips to all judges of these components; what waits for their scores, by name."""
        asked, left, count = [], set(names), len(clips)
        for judge in self._judges:
            own = tuple(name for name in judge.components if name in left)
            if own:
                asked.append((own, judge.submit(clips, own)))
            left -= set(own)

        def wait() -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for components, answer in asked:
                score_KB = answer()
                if score_KB.shape != (len(components), count):
                    raise ValueError(
                        f"scores {list(score_KB.shape)} of {components} do not fit {count} clips"
                    )
                found |= zip(components, score_KB, strict=True)
            return found

        return wait

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

    def decoded(self, latent_BFCHW: Tensor, shared_frames: int = 0) -> Iterator[Tensor]:
        """Pixels of a few rows at a time, float32 [b, 4F - 3, 3, H, W]. Each row decodes once.

        The first `shared_frames` latents are the same in all rows.
        """
        num_pixel_frames = pixel_start(latent_BFCHW.shape[1])
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

    def score_videos(
        self, latent_BFCHW: Tensor, prompts: Sequence[Prompt], *, alone: bool = False
    ) -> dict[str, Tensor]:
        """Score whole videos, each as one clip: component -> float32 [B], held-out ones included.

        `alone`: by the first rank, while the others do something else.

        Raises:
            ValueError: not one prompt per video.
        """
        if len(prompts) != len(latent_BFCHW):
            raise ValueError(f"{len(prompts)} prompts for {len(latent_BFCHW)} videos")
        if alone or not self._axes:
            return self._scored_videos(latent_BFCHW, prompts)
        score_KB = torch.empty(len(self._wanted), len(prompts), device=latent_BFCHW.device)
        if self._speaks:
            score_KB = torch.stack(list(self._scored_videos(latent_BFCHW, prompts).values()))
        return dict(zip(self._wanted, from_first(score_KB, self._axes), strict=True))

    @torch.no_grad()
    def _scored_videos(
        self, latent_BFCHW: Tensor, prompts: Sequence[Prompt]
    ) -> dict[str, Tensor]:  # fmt: skip
        waiting, done = [], 0
        for frames_BFCHW in self.decoded(latent_BFCHW):
            clips = [
                clip_of(frames, prompt, 0, len(frames))
                for frames, prompt in zip(frames_BFCHW, prompts[done:], strict=False)
            ]
            done += len(clips)
            waiting.append(self._ask(self._wanted, clips))
        if done != len(latent_BFCHW):
            raise ValueError(f"decode returned {done} videos for {len(latent_BFCHW)} rows")
        scores = [wait() for wait in waiting]
        device = latent_BFCHW.device
        return {
            name: torch.cat([part[name].float().to(device) for part in scores])
            for name in self._wanted
        }

    def composite(self, scores: dict[str, Tensor]) -> Tensor:
        """Mean of the trained components by their weights: sum_k w_k r_k / sum_k w_k. [B]."""
        weights = self.config.weights
        missing = [name for name in weights if name not in scores]
        if missing:
            raise ValueError(f"scores of {missing} are missing; there are {sorted(scores)}")
        total = torch.stack([weight * scores[name] for name, weight in weights.items()]).sum(0)
        return total / sum(weights.values())
