"""Settings of pre-training: what is trained, on what, towards which objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_kvpo.config import (
    CheckpointConfig,
    CodecConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicyConfig,
    StreamConfig,
)
from megatron_kvpo.data.sources import VideoSource
from megatron_kvpo.method_config import check_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class VideosConfig:
    """The training videos of the shapes world; unused where latents.folder is set."""

    folder: Path = Path("data/shapes")
    """Holds manifest.jsonl and the files; written when it is not there."""

    count: int = 4096
    seed: int = 7
    codec: Literal["vp9", "h264"] = "vp9"
    size: int = 32
    """Pixel frames are square, size x size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamedVideosConfig:
    """Videos that are decoded and encoded while training runs, at the size of the model."""

    path: Path = Path("data/clips")
    """A folder, a JSONL or CSV manifest or tar shards: docs/data.md."""

    max_bad: float = 0.1
    """Share of files that may be unusable before the run stops."""

    check: Literal["decode", "packets"] = "decode"
    """How files are probed: VideoSource.check."""

    cache: Path | None = None
    """Folder of what probing found and of the report of skipped files. None: beside the data."""

    fps: float | None = None
    """Pixel frames a second, by timestamps. None takes the file's as they stand."""

    start: Literal["fixed", "random", "scene"] = "fixed"
    """Where clips begin: at `starts` or `every` so many, the batches of a cache; or anew in each
    epoch, anywhere or where a segment begins."""

    starts: tuple[int, ...] = (0,)
    """Pixel frames (at `fps`) of each file at which a clip begins."""

    every: int | None = None
    """Further clips begin every so many pixel frames, as far as a file goes."""

    backend: Literal["cpu", "gpu"] = "cpu"
    """What decodes; `gpu` is NVDEC."""

    threads: int = 2
    """Files that a rank decodes at once."""

    def __post_init__(self) -> None:
        check_positive("latents.videos", threads=self.threads, every=self.every or 1)
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"latents.videos.fps is {self.fps}: it must be above 0")
        if self.start != "fixed" and (self.starts != (0,) or self.every is not None):
            raise ValueError(
                f"latents.videos.start is {self.start}, and starts {list(self.starts)} or every "
                f"{self.every} are given too: these are for start fixed, leave them out"
            )
        _ = self.source

    @property
    def source(self) -> VideoSource:
        """As the pipeline takes it. ValueError for a share that is none."""
        return VideoSource(path=self.path, max_bad=self.max_bad, check=self.check,
                           cache=self.cache)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentsConfig:
    """Encoded videos: a cache, or videos that are encoded on the way."""

    folder: Path | None = None
    """A cache of latents and embeddings. Without it and `videos`: those of the shapes world."""

    videos: StreamedVideosConfig | None = None
    embeddings: Path | None = None
    """Of the texts of `videos` (tools.encode_prompts). None: the words of the shapes world."""

    empty_text: Path | None = None
    """Embeddings that hold the empty text (tools.encode_prompts --empty), which stands for a
    caption that is dropped. None: a text that is all padding."""

    def __post_init__(self) -> None:
        if self.folder is not None and self.videos is not None:
            raise ValueError(
                f"latents.folder is {self.folder} and latents.videos.path {self.videos.path}: "
                "training reads one of them, leave the other out"
            )
        if self.embeddings is not None and self.videos is None:
            raise ValueError(
                f"latents.embeddings is {self.embeddings} and there is no latents.videos: a cache "
                "and the shapes world bring their own, leave it out"
            )

    @property
    def given(self) -> bool:
        """Whether these are others than the shapes world's."""
        return self.folder is not None or self.videos is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedConfig:
    """Which weights train. What trains is float32, whatever model.dtype it is computed in."""

    mode: Literal["full", "lora"] = "full"
    lora_rank: int = 256
    lora_alpha: float = 256.0
    adapter: Path | None = None
    """Adapter to continue, as policy.adapter of a KVPO run. None starts at the base."""

    def __post_init__(self) -> None:
        check_positive("trained", lora_rank=self.lora_rank)
        if self.adapter is not None and self.mode == "full":
            raise ValueError(
                f"trained.adapter is {self.adapter} and trained.mode full: merge it first "
                "(tools/convert_checkpoint.py export --to merged) or set trained.mode to lora"
            )

    @property
    def policy(self) -> PolicyConfig | None:
        """The adapters as a model is built with them; None for bare layers."""
        if self.mode == "full":
            return None
        return PolicyConfig(mode="lora", lora_rank=self.lora_rank, lora_alpha=self.lora_alpha,
                            adapter=self.adapter)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class FittingConfig:
    """How long, and towards what."""

    codec_steps: int = 1500
    codec_batch: int = 32
    steps: int = 12000
    batch_size: int = 128
    """Clips of a step, over all data ranks."""

    micro_rows: int | None = None
    """Clips of one backward pass; a step takes as many passes as it needs. None is all at once."""

    max_seconds: float = 0.0
    """Wall-clock budget of the transformer's training; the schedule follows it. 0: by steps."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """Of the learning rate after optimizer.warmup_updates: falls to a hundredth, or stays."""

    forcing: Literal["teacher", "diffusion"] = "teacher"
    """What a noisy block sees of the blocks before it: their clean frames, as in streaming, or the
    noisy ones, each block at a level of its own."""

    sampler_levels: float = 0.8
    """Share of blocks trained at the sampler's own noise levels; the rest at any level, shifted by
    stream.shift."""

    weighting: Literal["flat", "bell"] = "flat"
    """Of blocks at any level: alike, or exp(-2 (sigma - 1/2)^2) less its value at 1, mean 1 over
    Wan's levels (the training weight of DiffSynth-Studio's flow matching)."""

    smallest_level: float = 0.02
    """Of blocks at any level."""

    own_estimates_from: float = 0.6
    """Share of training after which the model's own estimates come in. 1: never."""

    own_history: float = 0.5
    """Then: share of history blocks replaced by the model's estimate."""

    own_states: float = 0.5
    """Then: share of noisy states that start from the estimate of the step before."""

    caption_noise: float = 0.15
    """Share of samples that get another caption of the batch."""

    caption_drop: float = 0.0
    """Share of samples whose caption is dropped: latents.empty_text."""

    ema_decay: float = 0.999
    """Of the averaged weights, which are what a run leaves. 0 keeps none: the last ones are."""

    sample_every: int = 2000
    """Steps between samples of the shapes world's prompts. 0: none."""

    log_every: int = 100
    autocast: bool = False
    """bfloat16 matrix products of a float32 model whose weights all train; for GPUs."""

    def __post_init__(self) -> None:
        check_positive("fitting", steps=self.steps, batch_size=self.batch_size,
                       codec_steps=self.codec_steps, micro_rows=self.micro_rows or 1,
                       log_every=self.log_every)  # fmt: skip
        for name, value in (
            ("sampler_levels", self.sampler_levels), ("own_history", self.own_history),
            ("own_states", self.own_states), ("own_estimates_from", self.own_estimates_from),
            ("caption_noise", self.caption_noise), ("caption_drop", self.caption_drop),
            ("smallest_level", self.smallest_level),
        ):  # fmt: skip
            if not 0 <= value <= 1:
                raise ValueError(f"fitting.{name} is {value}: it is a share, in [0, 1]")
        if not 0 <= self.ema_decay < 1 or self.smallest_level == 0:
            raise ValueError(
                f"fitting.ema_decay {self.ema_decay} must lie in [0, 1) and fitting.smallest_level "
                f"{self.smallest_level} above 0"
            )
        if self.forcing == "diffusion" and self.own_estimates_from < 1:
            raise ValueError(
                f"fitting.forcing is diffusion and fitting.own_estimates_from "
                f"{self.own_estimates_from}: the model's own estimates stand for clean history; "
                "set fitting.own_estimates_from to 1, or fitting.forcing to teacher"
            )


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
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    trained: TrainedConfig = field(default_factory=TrainedConfig)
    fitting: FittingConfig = field(default_factory=FittingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    """Figures of curve.jsonl and samples in trackers. There is no report, nor are there groups."""

    def __post_init__(self) -> None:
        if self.model.fp8 and self.trained.mode == "full":
            raise ValueError(
                f"model.fp8 is {list(self.model.fp8)} and trained.mode full: products in 8 bits "
                "need a frozen base. Train an adapter (trained.mode lora), or leave model.fp8 out"
            )
        if self.fitting.autocast and self.model.dtype != "float32":
            raise ValueError(
                f"fitting.autocast is for a float32 model, model.dtype is {self.model.dtype}: "
                "leave one of them out"
            )
        if self.fitting.autocast and self.trained.mode == "lora":
            raise ValueError(
                "fitting.autocast is for weights that all train, trained.mode is lora: a frozen "
                "base and its adapter are multiplied in model.dtype; make that bfloat16 instead"
            )
        if self.parallel.branch > 1:
            raise ValueError(
                f"parallel.branch is {self.parallel.branch}: pre-training has no branches; leave "
                "those ranks to the data axis, parallel.branch 1"
            )
        if self.stream.num_frames > self.model.max_frames:
            raise ValueError(
                f"stream.num_frames {self.stream.num_frames} exceeds model.max_frames "
                f"{self.model.max_frames}"
            )
        if self.fitting.sample_every and self.latents.given:
            raise ValueError(
                f"fitting.sample_every is {self.fitting.sample_every}: samples on the way are for "
                "the shapes world; set it to 0 where latents.folder or latents.videos is set, and "
                "look at a checkpoint with tools.generate"
            )
        self._check_wan()
        if self.fitting.sample_every < 0:
            raise ValueError(f"fitting.sample_every is {self.fitting.sample_every}: use 0 or more")

    def _check_wan(self) -> None:
        """Wan's codec does not encode the shapes world, nor do its words tell Wan anything."""
        if self.codec.vae is None:
            return
        if not self.latents.given:
            raise ValueError(
                f"codec.vae is {self.codec.vae}, and neither latents.folder nor latents.videos "
                "says on what to train: name a cache of latents, or videos"
            )
        if self.latents.videos is not None and self.latents.embeddings is None:
            raise ValueError(
                f"codec.vae is {self.codec.vae} and latents.videos.path "
                f"{self.latents.videos.path}, without latents.embeddings: tools.encode_prompts "
                "makes them of the videos' texts"
            )

    @property
    def run_folder(self) -> Path:
        """Where this run writes."""
        return self.folder / self.name
