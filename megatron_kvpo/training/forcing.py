"""The objective of causal pre-training: flow matching of noisy blocks given their history.

Every draw comes from (run seed, step, row of the global batch), so that any layout of ranks and any
cut into micro-batches train alike, and a resumed run draws what it would have drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kvpo.flow import (
    NUM_TIMESTEPS,
    add_noise,
    clean_from_velocity,
    sampler_sigmas,
    timestep,
)
from megatron_kvpo.method_config import StreamConfig
from megatron_kvpo.model.causal_wan import CausalWan, TextKeys
from megatron_kvpo.model.sight import diffusion_sight, teacher_frames, teacher_sight
from megatron_kvpo.parallel.seeds import generator
from megatron_kvpo.records import LatentBatch
from megatron_kvpo.training.pretrain_config import FittingConfig, PretrainConfig

_ROW_NUMBERS, _BLOCK_NUMBERS = 4, 5
"""Uniform numbers that a row draws, and each of its blocks."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a step, told by one of their segments, and what was drawn for them."""

    clean_BFCHW: Tensor
    text_BXD: Tensor
    inside_BF: Tensor
    """1 for the frames of the row's segment, on which the loss is taken."""

    uniform_BKN: Tensor
    """Uniform numbers of each of N blocks: level or not, which, where, history, state."""

    noise_SBFCHW: Tensor
    """Normal numbers, one set for each state that is made."""

    def part(self, rows: slice) -> Rows:
        """Some of them."""
        return Rows(self.clean_BFCHW[rows], self.text_BXD[rows], self.inside_BF[rows],
                    self.uniform_BKN[rows], self.noise_SBFCHW[:, rows])  # fmt: skip


class Forcing:
    """Teacher or diffusion forcing of one model. See fitting.forcing."""

    def __init__(self, config: PretrainConfig, model: CausalWan, empty_XD: Tensor) -> None:
        """`empty_XD`: the embedding that stands for a caption that is dropped."""
        self._config, self._model = config, model
        self._stream: StreamConfig = config.stream
        self._fitting: FittingConfig = config.fitting
        device = model.spec.ranks.device
        tokens = config.model.tokens_per_frame
        if self._fitting.forcing == "teacher":
            self.sight = teacher_sight(self._stream, tokens)
            self._frames = teacher_frames(self._stream)
        else:
            self.sight = diffusion_sight(self._stream, tokens)
            self._frames = [*range(self._stream.num_frames)]
        levels = sampler_sigmas(self._stream.steps, self._stream.shift)
        self._sigmas = torch.tensor(levels, device=device)
        self._empty_XD = empty_XD.to(device)
        self._rng = torch.Generator(device)
        self._mean_bell = float(_bell(_shifted(_steps(), self._stream.shift)).mean())

    def rows(self, batch: LatentBatch, step: int, first: int, *, own: bool) -> Rows:
        """Pick a segment of each row and its caption, and draw.

        `first`: the batch's first row among those of all data ranks. `own`: estimates will be made.
        ValueError for a batch that does not fit the recipe, or holds a row without a segment.
        """
        clean = batch.latent_BFCHW
        self._check(batch)
        uniform_BK, noise_SBFCHW = self._draw(clean, step, first, own=own)
        row_BK, block = uniform_BK[:, :_ROW_NUMBERS], uniform_BK[:, _ROW_NUMBERS:]
        picked = pick_segments(batch.segment_S3, row_BK[:, 0])
        text = batch.text_SXD[self._told(picked, row_BK, len(batch.segment_S3))]
        dropped = row_BK[:, 3] < self._fitting.caption_drop
        text = torch.where(dropped[:, None, None], self._empty_XD.to(text), text)
        frame = torch.arange(self._stream.num_frames, device=clean.device)
        start, stop = (batch.segment_S3[picked, i, None] for i in (1, 2))
        inside = (frame >= start) & (frame < stop)
        return Rows(clean, text, inside.float(), block.reshape(len(clean), _BLOCK_NUMBERS, -1),
                    noise_SBFCHW)  # fmt: skip

    def _draw(self, clean: Tensor, step: int, first: int, *, own: bool) -> tuple[Tensor, Tensor]:
        numbers = _ROW_NUMBERS + _BLOCK_NUMBERS * self._stream.num_blocks
        states = 2 if own else 1
        uniform, normal = [], []
        for row in range(len(clean)):
            seed = generator("pretrain", self._config.seed, step, first + row).initial_seed()
            rng, device = self._rng.manual_seed(seed), clean.device
            uniform.append(torch.rand(numbers, generator=rng, device=device))
            normal.append(
                torch.randn(states, *clean.shape[1:], generator=rng, device=device)
            )  # fmt: skip
        return torch.stack(uniform), torch.stack(normal, dim=1)

    def _told(self, picked: Tensor, row_BK: Tensor, segments: int) -> Tensor:
        """Each row's own segment, or for some the text of any other of the batch."""
        other = (picked + 1 + (row_BK[:, 2] * (segments - 1)).long()) % segments
        return torch.where(row_BK[:, 1] < self._fitting.caption_noise, other, picked)

    def loss_sum(self, rows: Rows, *, own: bool) -> Tensor:
        """Weighted squared velocity error, mean over a frame, summed over the frames inside."""
        draw, fitting, clean = rows.uniform_BKN, self._fitting, rows.clean_BFCHW
        text = self._model.encode_text(rows.text_BXD)
        step = (draw[:, 1] * len(self._sigmas)).long()
        anywhere = draw[:, 0] >= fitting.sampler_levels
        free = _shifted(draw[:, 2], self._stream.shift).clamp_min(fitting.smallest_level)
        sigma = torch.where(anywhere, free, self._sigmas[step])
        state = add_noise(clean, rows.noise_SBFCHW[0], self._per_frame(sigma))
        history = clean
        if own:
            estimate = self._estimate(rows, text, step)
            late = step >= len(self._sigmas) - 2  # estimates at high noise are no fit history
            mine = late & (draw[:, 3] < fitting.own_history)
            history = torch.where(self._per_frame(mine), estimate, clean)
            mine = ~anywhere & (step > 0) & (draw[:, 4] < fitting.own_states)
            fresh = add_noise(estimate, rows.noise_SBFCHW[0], self._per_frame(sigma))
            state = torch.where(self._per_frame(mine), fresh, state)
        velocity = self._velocity(history, state, sigma, text)
        target = (state - clean) / self._per_frame(sigma)
        error_BF = (velocity.float() - target).square().mean(dim=(2, 3, 4))
        weight_BF = self._per_frame(self._weight(sigma, anywhere)).flatten(1)
        return (error_BF * weight_BF * rows.inside_BF).sum()

    def _weight(self, sigma: Tensor, anywhere: Tensor) -> Tensor:
        if self._fitting.weighting == "flat":
            return torch.ones_like(sigma)
        return torch.where(anywhere, _bell(sigma) / self._mean_bell, torch.ones_like(sigma))

    def _per_frame(self, per_block: Tensor) -> Tensor:
        """[B, blocks] -> [B, F, 1, 1, 1]."""
        wide = per_block.repeat_interleave(self._stream.block_frames, dim=1)
        return wide[:, :, None, None, None]

    @torch.no_grad()
    def _estimate(self, rows: Rows, text: TextKeys, step: Tensor) -> Tensor:
        """The model's clean estimate of every block at the step before its own, from true noise."""
        sigma = self._sigmas[(step - 1).clamp_min(0)]
        state = add_noise(rows.clean_BFCHW, rows.noise_SBFCHW[1], self._per_frame(sigma))
        velocity = self._velocity(rows.clean_BFCHW, state, sigma, text)
        return clean_from_velocity(state, velocity.float(), self._per_frame(sigma))

    def _velocity(self, history: Tensor, state: Tensor, sigma: Tensor, text: TextKeys) -> Tensor:
        """Of the noisy frames; the last block is nobody's history."""
        time_BF = timestep(sigma).repeat_interleave(self._stream.block_frames, dim=1)
        seen = len(self._frames) - state.shape[1]
        time_BF = torch.cat([torch.zeros_like(time_BF[:, :seen]), time_BF], dim=1)
        both = torch.cat([history[:, :seen], state], dim=1)
        out = self._model(both, time_BF, self._frames, text, None, self.sight)
        return out[:, seen:]  # type: ignore[no-any-return]

    def _check(self, batch: LatentBatch) -> None:
        model = self._config.model
        wanted = (self._stream.num_frames, *model.frame_shape)
        if tuple(batch.latent_BFCHW.shape[1:]) != wanted:
            raise ValueError(
                f"clips are [F, C, H, W] {list(batch.latent_BFCHW.shape[1:])}, stream.num_frames "
                f"and the model's sizes say {list(wanted)}: change these or encode the videos anew"
            )
        if tuple(batch.text_SXD.shape[1:]) != (model.text_length, model.text_dim):
            raise ValueError(
                f"texts are {list(batch.text_SXD.shape[1:])}, the model takes "
                f"{[model.text_length, model.text_dim]}: name the embeddings of its text encoder"
            )
        if self._fitting.caption_noise and len(batch.segment_S3) < 2:
            raise ValueError(
                f"fitting.caption_noise is {self._fitting.caption_noise} and this rank's share of "
                "a batch has 1 caption: set it to 0, or raise fitting.batch_size"
            )


def pick_segments(segment_S3: Tensor, uniform_B: Tensor) -> Tensor:
    """One of each row's segments, by a uniform number of the row. ValueError for a row of none."""
    rows = len(uniform_B)
    count_B = torch.bincount(segment_S3[:, 0], minlength=rows)
    if len(count_B) > rows or int(count_B.min()) < 1:
        raise ValueError(
            f"the segments of a batch of {rows} rows are of rows {segment_S3[:, 0].tolist()}: each "
            "row needs one at least"
        )
    return count_B.cumsum(0) - count_B + (uniform_B * count_B).long()


def _shifted(time: Tensor, shift: float) -> Tensor:
    return shift * time / (1 + (shift - 1) * time)


def _steps() -> Tensor:
    return torch.arange(1, NUM_TIMESTEPS + 1) / NUM_TIMESTEPS


def _bell(sigma: Tensor) -> Tensor:
    peak = torch.exp(-2 * (sigma - 0.5).square())
    return (peak - torch.exp(torch.tensor(-0.5))).clamp_min(0)
