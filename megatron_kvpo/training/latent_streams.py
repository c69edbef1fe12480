"""Where latents of pre-training come from: a cache on disk, or videos encoded on the way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_kvpo.data.encoded_videos import DrawnClips, EncodedVideos
from megatron_kvpo.data.encoding import EncodingSpec
from megatron_kvpo.data.latents import LatentCache
from megatron_kvpo.parallel.collect import from_first
from megatron_kvpo.parallel.groups import Axis, Ranks
from megatron_kvpo.records import LatentBatch, LatentStream
from megatron_kvpo.training.parts import codec_on, text_encoder
from megatron_kvpo.training.pretrain_config import PretrainConfig

StreamOpener = Callable[[PretrainConfig, Ranks], LatentStream]
"""Opens this data rank's stream."""


def opener(config: PretrainConfig) -> StreamOpener | None:
    """What the recipe names: latents.folder, latents.videos, or nothing, the shapes world."""
    if config.latents.folder is not None:
        return open_cache
    return None if config.latents.videos is None else open_videos


def open_cache(config: PretrainConfig, ranks: Ranks) -> LatentStream:
    """The cache of latents at latents.folder.

    ValueError if it cannot be read, or holds clips or texts that the model does not take.
    """
    assert config.latents.folder is not None
    cache = LatentCache(
        config.latents.folder, batch_size=config.fitting.batch_size, seed=config.seed,
        rank=ranks.data.rank, world_size=ranks.data.size, device=ranks.device,
    )  # fmt: skip
    model, spec = config.model, cache.spec
    wanted = (config.stream.num_frames, *model.frame_shape)
    wrong = sorted({line.shape for line in cache.manifest.lines} - {wanted})
    if wrong:
        raise ValueError(
            f"{cache.folder} holds clips [F, C, H, W] of {wrong}, stream.num_frames and the "
            f"model's sizes say {wanted}: change these or encode the videos anew"
        )
    if (spec.text_length, spec.text_dim) != (model.text_length, model.text_dim):
        raise ValueError(
            f"{cache.folder} holds texts of {spec.text_length} x {spec.text_dim}, the model takes "
            f"{model.text_length} x {model.text_dim}: encode them with its text encoder"
        )
    return cache


def open_videos(config: PretrainConfig, ranks: Ranks) -> LatentStream:
    """The videos of latents.videos, through the recipe's codec and latents.embeddings.

    The first of the tensor and context ranks that share a data rank decodes and encodes, the others
    are told: one set of bits. ValueError as EncodedVideos and DrawnClips raise it.
    """
    axes = (ranks.tensor, ranks.context)
    speaks = all(axis.rank == 0 for axis in axes)
    stream = _open_videos(config, ranks) if speaks else None
    if stream is not None and all(axis.size == 1 for axis in axes):
        return stream
    rows, model = config.fitting.batch_size // ranks.data.size, config.model
    return SharedStream(
        stream, (rows, config.stream.num_frames, *model.frame_shape),
        (model.text_length, model.text_dim), axes, ranks.device,
    )  # fmt: skip


def _open_videos(config: PretrainConfig, ranks: Ranks) -> LatentStream:
    videos, model = config.latents.videos, config.model
    assert videos is not None
    codec = codec_on(config, ranks.device)
    encoder = text_encoder(model, config.latents.embeddings)
    spec = EncodingSpec.of(
        codec, encoder, sizes=(model.pixel_size(codec.spatial_stride),),
        num_frames=(config.stream.num_frames,), starts=videos.starts, every=videos.every,
        fps=videos.fps,
    )  # fmt: skip
    open_clips = EncodedVideos if videos.start == "fixed" else (
        functools.partial(DrawnClips, start=videos.start)
    )  # fmt: skip
    return open_clips(
        videos.source, spec, codec, encoder, batch_size=config.fitting.batch_size,
        seed=config.seed, rank=ranks.data.rank, world_size=ranks.data.size, device=ranks.device,
        backend=videos.backend, num_threads=videos.threads,
    )  # fmt: skip


class SharedStream:
    """A stream that one rank has and the others along some axes are told. Collective."""

    def __init__(
        self, stream: LatentStream | None, shape: tuple[int, ...], text_shape: tuple[int, ...],
        axes: Sequence[Axis], device: torch.device,
    ) -> None:  # fmt: skip
        """`stream` is None on all ranks but the first; `shape` is of latent_BFCHW."""
        self._stream, self._shape, self._text_shape = stream, shape, text_shape
        self._axes, self._device = axes, device
        name = None if stream is None else list(bytes.fromhex(stream.fingerprint()))
        sent = None if name is None else torch.tensor(name, dtype=torch.uint8)
        self._name = bytes(self._told(sent, (16,), torch.uint8).tolist()).hex()

    def fingerprint(self) -> str:
        """See LatentStream.fingerprint."""
        return self._name

    def batches(self, step: int = 0) -> Iterator[LatentBatch]:
        """See LatentStream.batches; all ranks ask for the same ones."""
        own = None if self._stream is None else self._stream.batches(step)
        while True:
            yield self._shared(None if own is None else next(own))

    def _shared(self, batch: LatentBatch | None) -> LatentBatch:
        """Tensors in turn; the first says how many segments there are."""
        count = None if batch is None else torch.tensor([len(batch.segment_S3)])
        segments = int(self._told(count, (1,), torch.int64))
        latent = self._told(None if batch is None else batch.latent_BFCHW, self._shape)
        text = self._told(None if batch is None else batch.text_SXD, (segments, *self._text_shape))
        segment = self._told(
            None if batch is None else batch.segment_S3, (segments, 3), torch.int64
        )
        index = self._told(None if batch is None else batch.index_B, self._shape[:1], torch.int64)
        return LatentBatch(latent_BFCHW=latent, segment_S3=segment, text_SXD=text,
                           index_B=index.cpu())  # fmt: skip

    def _told(
        self, x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> Tensor:  # fmt: skip
        empty = torch.empty(shape, dtype=dtype, device=self._device)
        return from_first(empty if x is None else x.to(self._device).contiguous(), self._axes)
