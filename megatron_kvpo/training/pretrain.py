"""Train the small causal generator of the shapes world on decoded videos, then keep its weights.

    python -m megatron_kvpo.training.pretrain examples/shapes/pretrain.yaml [section.key=value ...]

Writes videos if there are none, decodes them with DALI, fits the codec, then the transformer by
causal flow matching: each noisy block sees the clean blocks before it through the streaming
window. The last part of training replaces clean history and noisy states by the model's own
estimates, which is what a few-step streaming generator meets when it runs.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_kvpo import log, settings
from megatron_kvpo.config import (
    CodecConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    StreamConfig,
)
from megatron_kvpo.data.prompts import load_prompts
from megatron_kvpo.data.shapes import write_dataset
from megatron_kvpo.data.video import ClipSpec, VideoPipeline, load_videos
from megatron_kvpo.flow import add_noise, clean_from_velocity, sampler_sigmas, timestep
from megatron_kvpo.method_config import check_positive
from megatron_kvpo.model.causal_wan import CausalWan
from megatron_kvpo.model.codec import ShapesCodec, load_codec, save_codec
from megatron_kvpo.model.sight import teacher_frames, teacher_sight
from megatron_kvpo.model.specs import Spec
from megatron_kvpo.model.text_encoder import WordEncoder
from megatron_kvpo.model.weights import initialise, save_weights
from megatron_kvpo.parallel.groups import Ranks, is_first, start_ranks, stop_ranks
from megatron_kvpo.training.codec_fit import fit_codec
from megatron_kvpo.training.optimizer import Optimizer, build_optimizer
from megatron_kvpo.training.samples import Sampler, plot_curve

logger = log.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class VideosConfig:
    """The training videos."""

    folder: Path = Path("data/shapes")
    """Holds manifest.jsonl and the files; written when it is not there."""

    count: int = 4096
    seed: int = 7
    codec: Literal["vp9", "h264"] = "vp9"
    size: int = 32
    """Pixel frames are square, size x size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FittingConfig:
    """How long and on what."""

    codec_steps: int = 1500
    codec_batch: int = 32
    steps: int = 12000
    batch_size: int = 128
    max_seconds: float = 0.0
    """Wall-clock budget of the transformer's training; the schedule follows it. 0: by steps."""

    sampler_levels: float = 0.8
    """Share of blocks trained at the sampler's own noise levels; the rest at any level."""

    own_estimates_from: float = 0.6
    """Share of training after which the model's own estimates come in."""

    own_history: float = 0.5
    """Then: share of history blocks replaced by the model's estimate."""

    own_states: float = 0.5
    """Then: share of noisy states that start from the estimate of the step before."""

    caption_noise: float = 0.15
    """Share of samples that get another video's caption."""

    ema_decay: float = 0.999
    sample_every: int = 2000
    autocast: bool = False
    """bfloat16 matrix products; for GPUs."""

    def __post_init__(self) -> None:
        check_positive("fitting", steps=self.steps, batch_size=self.batch_size,
                       codec_steps=self.codec_steps)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """The root of a pre-training recipe."""

    name: str = "pretrain"
    folder: Path = Path("runs")
    seed: int = 42
    device: Literal["auto", "cpu", "cuda"] = "auto"
    samples: Path = Path("examples/shapes/prompts_dev.jsonl")
    """Prompts shown and scored on the way."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    videos: VideosConfig = field(default_factory=VideosConfig)
    fitting: FittingConfig = field(default_factory=FittingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        if self.model.fp8:
            raise ValueError(
                f"model.fp8 is {list(self.model.fp8)}: products in 8 bits need a frozen base, and "
                "pre-training trains it; leave model.fp8 out"
            )

    @property
    def run_folder(self) -> Path:
        """Where this run writes."""
        return self.folder / self.name


@dataclass(frozen=True, slots=True)
class Corpus:
    """Encoded videos and the segments they are told in."""

    latent_NFCHW: Tensor
    segment_S3: Tensor
    """(video, first frame, one past the last) of each segment."""

    text_SXD: Tensor


def load_corpus(config: PretrainConfig, codec: ShapesCodec, device: torch.device) -> Corpus:
    """Write the videos if need be, decode them through DALI, fit the codec, encode everything.

    A codec whose file is named (codec.weights) is taken as it is.
    """
    videos = config.videos
    if not (videos.folder / "manifest.jsonl").is_file():
        logger.info("writing %d videos to %s", videos.count, videos.folder)
        write_dataset(videos.folder, videos.count, videos.seed, codec=videos.codec,
                      num_latent_frames=config.stream.num_frames, size=videos.size,
                      workers=os.cpu_count() or 1)  # fmt: skip
    started = time.monotonic()
    clip = ClipSpec(num_pixel_frames=codec.num_pixel_frames(config.stream.num_frames),
                    size=(videos.size, videos.size), dtype=torch.uint8)  # fmt: skip
    pipeline = VideoPipeline(videos.folder, clip, batch_size=64, shuffle=False,
                             num_threads=os.cpu_count() or 1)  # fmt: skip
    video_NCFHW = load_videos(pipeline)
    logger.info("decoded %d videos in %.0f s", len(video_NCFHW), time.monotonic() - started)
    if config.codec.weights is None:
        _fit_codec(config, codec, video_NCFHW, device)
    with torch.no_grad():
        latents = [
            codec.encode(part.to(device).float() / 127.5 - 1)
            for part in torch.split(video_NCFHW, 64)
        ]
    return _with_segments(config, torch.cat(latents), [f.index for f in pipeline.report.good])


def _fit_codec(
    config: PretrainConfig, codec: ShapesCodec, video_NCFHW: Tensor, device: torch.device
) -> None:
    fitting = config.fitting
    curve = fit_codec(codec, video_NCFHW.permute(0, 2, 3, 4, 1), steps=fitting.codec_steps,
                      batch_size=fitting.codec_batch, device=device, seed=config.seed)  # fmt: skip
    logger.info("codec: %.1f dB after %d steps", curve["psnr"][-1], fitting.codec_steps)


def _with_segments(config: PretrainConfig, latent_NFCHW: Tensor, entries: list[int]) -> Corpus:
    lines = (config.videos.folder / "manifest.jsonl").read_text().splitlines()
    encoder = WordEncoder(config.model.text_dim, config.model.text_length)
    segments, texts = [], []
    for row, entry in enumerate(entries):
        item = json.loads(lines[entry])
        starts = [0, *item["switch_frames"], config.stream.num_frames]
        for text, first, stop in zip(item["segments"], starts, starts[1:], strict=False):
            segments.append((row, first, stop))
            texts.append(text)
    device = latent_NFCHW.device
    return Corpus(latent_NFCHW, torch.tensor(segments, device=device),
                  encoder.encode(texts).to(device))  # fmt: skip


class Trainer:
    """Causal flow matching with the streaming window."""

    def __init__(self, config: PretrainConfig, model: CausalWan, corpus: Corpus) -> None:
        self.config, self.model, self.corpus = config, model, corpus
        ranks = model.spec.ranks
        self._device = ranks.device
        self._rng = torch.Generator(self._device).manual_seed(config.seed * 1000 + ranks.data.rank)
        stream = config.stream
        self._sight = teacher_sight(stream, config.model.tokens_per_frame)
        self._sigmas = torch.tensor(sampler_sigmas(stream.steps, stream.shift), device=self._device)
        self._frames = teacher_frames(stream)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._rng, device=self._device)

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._rng, device=self._device)

    def loss(self, *, own_estimates: bool) -> Tensor:
        """Mean squared velocity error over the frames of one segment of each video."""
        fitting, stream = self.config.fitting, self.config.stream
        picked = self._pick(len(self.corpus.segment_S3), fitting.batch_size)
        video, first, stop = self.corpus.segment_S3[picked].unbind(1)
        clean = self.corpus.latent_NFCHW[video]
        told = torch.where(self._uniform(len(picked)) < fitting.caption_noise,
                           self._pick(len(self.corpus.text_SXD), len(picked)), picked)  # fmt: skip
        text = self.model.encode_text(self.corpus.text_SXD[told])
        shape = (len(picked), stream.num_frames // stream.block_frames)
        step = (self._uniform(*shape) * len(self._sigmas)).long()
        anywhere = self._uniform(*shape) >= fitting.sampler_levels
        free = self._uniform(*shape)
        free = stream.shift * free / (1 + (stream.shift - 1) * free)
        sigma = torch.where(anywhere, free.clamp_min(0.02), self._sigmas[step])
        state = add_noise(clean, self._normal(clean), self._per_frame(sigma))
        history = clean
        if own_estimates:
            estimate = self._estimate(clean, text, (step - 1).clamp_min(0))
            late = step >= len(self._sigmas) - 2  # estimates at high noise are no fit history
            own = late & (self._uniform(*shape) < fitting.own_history)
            history = torch.where(self._per_frame(own), estimate, clean)
            own = ~anywhere & (step > 0) & (self._uniform(*shape) < fitting.own_states)
            fresh = add_noise(estimate, self._normal(clean), self._per_frame(sigma))
            state = torch.where(self._per_frame(own), fresh, state)
        velocity = self._velocity(history, state, sigma, text)
        target = (state - clean) / self._per_frame(sigma)
        error_BF = (velocity.float() - target).square().mean(dim=(2, 3, 4))
        frame = torch.arange(stream.num_frames, device=self._device)
        inside = (frame >= first[:, None]) & (frame < stop[:, None])
        return (error_BF * inside).sum() / inside.sum()

    def _pick(self, size: int, count: int) -> Tensor:
        return (self._uniform(count) * size).long()

    def _per_frame(self, per_block: Tensor) -> Tensor:
        """[B, blocks] -> [B, F, 1, 1, 1]."""
        wide = per_block.repeat_interleave(self.config.stream.block_frames, dim=1)
        return wide[:, :, None, None, None]

    @torch.no_grad()
    def _estimate(self, clean: Tensor, text: object, step: Tensor) -> Tensor:
        """The model's own clean estimate of every block, from noise at the sampler's levels."""
        sigma = self._sigmas[step]
        state = add_noise(clean, self._normal(clean), self._per_frame(sigma))
        velocity = self._velocity(clean, state, sigma, text)
        return clean_from_velocity(state, velocity.float(), self._per_frame(sigma))

    def _velocity(self, history: Tensor, state: Tensor, sigma: Tensor, text: object) -> Tensor:
        """Velocity of the noisy part of [history, state]; the last block is nobody's history."""
        time_BF = timestep(sigma).repeat_interleave(self.config.stream.block_frames, dim=1)
        seen = len(self._frames) - state.shape[1]
        time_BF = torch.cat([torch.zeros_like(time_BF[:, :seen]), time_BF], dim=1)
        both = torch.cat([history[:, :seen], state], dim=1)
        out = self.model(both, time_BF, self._frames, text, None, self._sight)
        return out[:, seen:]  # type: ignore[no-any-return]


class Average:
    """Exponential moving average of the trained weights."""

    def __init__(self, model: CausalWan, decay: float) -> None:
        self._live = [p for p in model.parameters() if p.requires_grad]
        self._mean = [p.detach().clone() for p in self._live]
        self._decay = decay

    def update(self, step: int) -> None:
        """Take the current weights in; early on the average is shorter."""
        keep = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._mean, [p.detach() for p in self._live], 1 - keep)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the live weights and the average."""
        for live, mean in zip(self._live, self._mean, strict=True):
            held = live.detach().clone()
            live.copy_(mean)
            mean.copy_(held)


def fit(config: PretrainConfig, model: CausalWan, trainer: Trainer, sampler: Sampler) -> None:
    """Run the schedule; leave the averaged weights in the model and curve.jsonl in the folder."""
    fitting, ranks = config.fitting, model.spec.ranks
    optimizer = build_optimizer(model, model.config, config.optimizer, ranks)
    average, started = Average(model, fitting.ema_decay), time.monotonic()
    curve = config.run_folder / "curve.jsonl"
    recent: list[Tensor] = []
    done, step = 0.0, 0
    with log.Progress(fitting.steps, first=is_first(ranks), label="step") as progress:
        while done < 1.0:
            loss = _train_step(config, trainer, optimizer, step, done)
            average.update(step)
            recent.append(loss)
            step += 1
            spent = (time.monotonic() - started) / fitting.max_seconds if fitting.max_seconds else 0
            done = max(step / fitting.steps, spent)
            if step % 100 == 0 or done >= 1.0:
                mean = torch.stack(recent).mean().item()
                recent.clear()
                if not math.isfinite(mean):
                    raise ValueError(f"the loss is {mean} at step {step}: lower optimizer.lr")
                progress.update(step, loss=mean)
                _append(curve, ranks, step=step, loss=mean, seconds=time.monotonic() - started)
            if step % fitting.sample_every == 0 or done >= 1.0:
                average.swap()
                scores = sampler.show(config.run_folder / f"samples_{step:06d}.png")
                _append(curve, ranks, step=step, **scores)
                logger.info("step %d: %s", step, scores)
                if done < 1.0:
                    average.swap()


def _train_step(
    config: PretrainConfig, trainer: Trainer, optimizer: Optimizer, step: int, done: float
) -> Tensor:
    fitting = config.fitting
    optimizer.zero_grad()
    with torch.autocast(trainer.model.spec.ranks.device.type, torch.bfloat16, fitting.autocast):
        loss = trainer.loss(own_estimates=done >= fitting.own_estimates_from)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.finalize()
    optimizer.step(step, scale=0.5 * (1 + math.cos(math.pi * min(done, 1.0))) + 0.01)
    return loss.detach()


def _append(path: Path, ranks: Ranks, **values: float) -> None:
    if is_first(ranks):
        with path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def pretrain(config: PretrainConfig) -> None:
    """The whole recipe, from videos to weights."""
    ranks = start_ranks(config.parallel, config.device)
    config.run_folder.mkdir(parents=True, exist_ok=True)
    log.setup(is_first(ranks), config.run_folder)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.seed)
    settings.dump(config, config.run_folder / "config.yaml")
    codec = load_codec(config.codec, config.model.latent_channels).to(ranks.device)
    corpus = load_corpus(config, codec, ranks.device)
    save_codec(codec, config.run_folder / "codec.safetensors", torch.bfloat16)
    model = CausalWan(config.model, Spec.build(config.model, config.parallel, ranks, None))
    initialise(model, config.seed)
    sampler = Sampler(model, codec.eval(), config.stream, load_prompts(config.samples))
    fit(config, model, Trainer(config, model, corpus), sampler)
    note = {"made_by": "python -m megatron_kvpo.training.pretrain", "seed": str(config.seed)}
    save_weights(model, config.run_folder / "transformer.safetensors", torch.bfloat16, note)
    if is_first(ranks):
        plot_curve(config.run_folder / "curve.jsonl")
    logger.info("weights and curve are in %s", config.run_folder)
    stop_ranks()


if __name__ == "__main__":
    pretrain(settings.load(PretrainConfig, sys.argv[1], sys.argv[2:]))
