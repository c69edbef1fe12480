"""Held-out videos from the same prompts and noises each time: scores, filmstrips, real videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_kvpo.config import RunConfig
from megatron_kvpo.data.shapes import write_prompt_videos
from megatron_kvpo.data.video import ClipSpec, VideoPipeline, load_videos
from megatron_kvpo.model.codec import ShapesCodec
from megatron_kvpo.model.wan_vae import WanVae
from megatron_kvpo.parallel.collect import gather_rows, shares
from megatron_kvpo.parallel.groups import Ranks, is_first
from megatron_kvpo.records import Prompt
from megatron_kvpo.reward.composite import Scorer
from megatron_kvpo.rollout.group import SampledGroup
from megatron_kvpo.rollout.sampler import (
    Beginning,
    TextEncoder,
    generate_videos,
    nothing_given,
)
from megatron_kvpo.rollout.stream import World
from megatron_kvpo.training.filmstrips import Filmstrips, Frames, grid_video, write_video
from megatron_kvpo.training.policy import Policy
from megatron_kvpo.training.summary import EvaluationTable
from megatron_kvpo.world import pixel_start

CODED_SIZE = 64
"""Side of the real videos' files, in pixels; the pipeline resizes to the generator's."""

SMALL = 128
"""Width in pixels up to which videos are enlarged, and shown as GIFs."""

_COLUMNS = 3
"""Of larger ones in one picture."""


class Evaluator:
    """Scores a policy on every (prompt, noise) pair, shared over all replicas."""

    def __init__(
        self, config: RunConfig, ranks: Ranks, policy: Policy, world: World, encode: TextEncoder,
        scorer: Scorer, codec: ShapesCodec | WanVae, prompts: Sequence[Prompt],
        begin: Beginning = nothing_given,
    ) -> None:  # fmt: skip
        """`begin`: what prompts that continue a video begin with."""
        self._config, self._ranks, self._policy, self._world = config, ranks, policy, world
        self._encode, self._scorer, self._codec = encode, scorer, codec
        self._begin, self.prompts = begin, list(prompts)

    @property
    def num_videos(self) -> int:
        """Prompts x noises."""
        return len(self.prompts) * self._config.evaluation.noises_per_prompt

    def run(self, name: str, slot: str) -> EvaluationTable:
        """Evaluate the policy of `slot`; write evaluation_<name>.npz and filmstrips/<name>.npz.

        Collective; the first rank writes.
        """
        evaluation, axis = self._config.evaluation, self._ranks.replicas
        noises = evaluation.noises_per_prompt
        pairs = [(prompt, key) for prompt in self.prompts for key in range(noises)]
        parts = shares(len(pairs), axis.size)
        mine = [pairs[i] for i in parts[axis.rank]]
        most = self._config.policy.max_rows
        shown = {(p.index, 0) for p in self.prompts[: evaluation.filmstrips]}
        scores: list[dict[str, Tensor]] = []
        strips: list[Tensor] = []
        with self._policy.acting(slot):
            for rows in (mine[i : i + most] for i in range(0, len(mine), most)):
                prompts, keys = [p for p, _ in rows], [k for _, k in rows]
                latent = generate_videos(self._world, self._encode, prompts, keys,
                                         evaluation.seed, self._begin)  # fmt: skip
                scores.append(self._scorer.score_videos(latent, prompts))
                wanted = [i for i, (p, k) in enumerate(rows) if (p.index, k) in shown]
                strips.append(self._codec.decode_pixels(latent[wanted]))
        sizes = [len(part) for part in parts]
        names = (*self._config.reward.weights, *self._config.reward.held_out)
        whole = {
            n: gather_rows(_joined([s[n] for s in scores], self._ranks), axis, sizes)
            .view(len(self.prompts), noises).cpu().numpy()
            for n in names
        }  # fmt: skip
        table = EvaluationTable.build(
            whole, self._config.reward.weights, [p.index for p in self.prompts]
        )
        counts = [sum((pairs[i][0].index, pairs[i][1]) in shown for i in part) for part in parts]
        frames = gather_rows(self._strips(strips), axis, counts)
        if is_first(self._ranks):
            table.save(self._config.run_folder / f"evaluation_{name}.npz")
            self._save_strips(frames, name)
        return table

    def real(self) -> float:
        """Composite score of real videos of the same prompts, through files and DALI.

        Writes filmstrips/real.npz. First rank only.
        """
        folder = self._config.run_folder / "real_videos"
        write_prompt_videos(folder, self.prompts, self._config.stream.num_frames, size=CODED_SIZE)
        num_pixel_frames, height, width = self._video_shape
        clip = ClipSpec(num_pixel_frames=num_pixel_frames, size=(height, width))
        pipeline = VideoPipeline(folder, clip, batch_size=16, shuffle=False)
        video_BCFHW = load_videos(pipeline).to(self._ranks.device)
        latent = self._codec.encode(video_BCFHW).detach()
        shown = self._config.evaluation.filmstrips
        self._save_strips((video_BCFHW[:shown].transpose(1, 2) / 2 + 0.5).clamp(0, 1), "real")
        prompts = [self.prompts[file.index] for file in pipeline.report.good]
        scores = self._scorer.score_videos(latent, prompts, alone=True)
        return float(self._scorer.composite(scores).mean())

    def show_group(self, sampled: SampledGroup) -> None:
        """Write filmstrips/branches.npz: what routing explored in one group. First rank only."""
        group = sampled.group
        order = [len(group.sequences) - 1, *range(len(group.sequences) - 1)]
        frames = self._codec.decode_pixels(group.latent_NFCHW[order])
        routes = (*group.plan.routed_frames_G, ())
        labels = ["anchor"]
        labels += [
            f"branch {n}: {', '.join(map(str, routes[n]))}" for n in group.sequences[:-1]
        ]  # fmt: skip
        stop = group.plan.fork_frame + group.plan.num_blocks * self._config.stream.block_frames
        Filmstrips(
            frames_RFHWC=_as_uint8(frames), labels=tuple(labels),
            window=(pixel_start(group.plan.fork_frame), pixel_start(stop)),
            caption="; then ".join(group.prompt.segments),
        ).save(self._config.run_folder / "filmstrips" / "branches.npz")  # fmt: skip

    def show_branches(
        self, update: int, sampled: SampledGroup, rows: Mapping[str, int]
    ) -> dict[str, tuple[Path, str]]:  # fmt: skip
        """Write samples/update_<update>/<name>.mp4 of some of a group's sequences. First rank only.

        Args:
            update: the group's.
            sampled: all branch ranks have all of it.
            rows: of each name, the branch, or -1 for the anchor.

        Returns:
            Of each name, the file and what is to be seen.
        """
        group, folder = sampled.group, self._config.run_folder / "samples" / f"update_{update:06d}"
        text, shown = "; then ".join(group.prompt.segments), {}
        for name, row in rows.items():
            path = folder / f"{name}.mp4"
            (video,) = _as_uint8(self._codec.decode_pixels(group.latent_NFCHW[row][None]))
            write_video(path, video, scale=_scale(video))
            seen = "" if row < 0 else f", branch {row}"
            shown[name] = path, f"{name}{seen}, fork {group.plan.fork_frame}: {text}"
        return shown

    def _strips(self, parts: list[Tensor]) -> Tensor:
        if parts:
            return torch.cat(parts)
        num_pixel_frames, height, width = self._video_shape
        return torch.zeros(0, num_pixel_frames, 3, height, width, device=self._ranks.device)

    @property
    def _video_shape(self) -> tuple[int, int, int]:
        """Pixel frames, height and width of a generated video."""
        size = self._config.model.pixel_size(self._codec.spatial_stride)
        return pixel_start(self._config.stream.num_frames), *size

    def _save_strips(self, frames_RFCHW: Tensor, name: str) -> None:
        folder = self._config.run_folder / "filmstrips"
        labels = tuple("; then ".join(p.segments) for p in self.prompts[: len(frames_RFCHW)])
        frames = _as_uint8(frames_RFCHW)
        Filmstrips(frames_RFHWC=frames, labels=labels).save(folder / f"{name}.npz")
        path = self.video_path(name)
        columns = len(frames) if path.suffix == ".gif" else _COLUMNS
        write_video(path, grid_video(frames, columns, gap=0), scale=_scale(frames))

    def video_path(self, name: str) -> Path:
        """GIF of the shown prompts side by side; of large ones an mp4, in rows."""
        _, _, width = self._video_shape
        suffix = "gif" if width <= SMALL else "mp4"
        return self._config.run_folder / "filmstrips" / f"{name}.{suffix}"


def _joined(parts: list[Tensor], ranks: Ranks) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, device=ranks.device)


def _scale(frames: Frames) -> int:
    """How often pixels of [..., H, W, 3] are repeated: videos of the shapes world are tiny."""
    return 3 if frames.shape[-2] <= SMALL else 1


def _as_uint8(frames_RFCHW: Tensor) -> Frames:
    """[R, F, 3, H, W] in [0, 1] -> uint8 [R, F, H, W, 3]."""
    scaled = (frames_RFCHW * 255).round().to(torch.uint8)
    frames: Frames = scaled.permute(0, 1, 3, 4, 2).cpu().numpy()
    return frames
