"""The shapes world's videos as a stream of latents: written, decoded and encoded at the start."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kvpo import log
from megatron_kvpo.data.clips import cut
from megatron_kvpo.data.encoding import segments_of
from megatron_kvpo.data.shapes import write_dataset
from megatron_kvpo.data.video import ClipSpec, VideoPipeline, load_videos
from megatron_kvpo.model.codec import ShapesCodec, load_codec, save_codec
from megatron_kvpo.model.text_encoder import WordEncoder
from megatron_kvpo.parallel.groups import Ranks, is_first
from megatron_kvpo.parallel.seeds import generator
from megatron_kvpo.records import LatentBatch
from megatron_kvpo.training.codec_fit import fit_codec
from megatron_kvpo.training.pretrain_config import PretrainConfig

logger = log.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Encoded videos in memory, as a LatentStream: each row is one segment, drawn among all."""

    latent_NFCHW: Tensor
    segment_S3: Tensor
    """(video, first frame, one past the last) of each segment."""

    text_SXD: Tensor
    seed: int
    rows: range
    """This data rank's rows of a batch."""

    batch_size: int
    origin: str
    """Of the videos and the codec."""

    def batches(self, step: int = 0) -> Iterator[LatentBatch]:
        """See LatentStream.batches."""
        for number in itertools.count(step):
            rng = generator("shapes corpus", self.seed, number)
            drawn = torch.randint(len(self.segment_S3), (self.batch_size,), generator=rng)
            picked = drawn[self.rows.start : self.rows.stop].to(self.segment_S3.device)
            segment_B3 = self.segment_S3[picked]
            row = torch.arange(len(picked), device=picked.device)
            yield LatentBatch(
                latent_BFCHW=self.latent_NFCHW[segment_B3[:, 0]],
                segment_S3=torch.cat([row[:, None], segment_B3[:, 1:]], dim=1),
                text_SXD=self.text_SXD[picked], index_B=segment_B3[:, 0],
            )  # fmt: skip

    def fingerprint(self) -> str:
        """See LatentStream.fingerprint."""
        return self.origin


def load_corpus(config: PretrainConfig, ranks: Ranks) -> tuple[Corpus, ShapesCodec]:
    """Write the videos if need be, decode them through DALI, fit the codec, encode everything.

    A codec whose file is named (codec.weights), or that this run has fitted before, is taken as it
    is. Collective: the first rank writes and fits.
    """
    videos, share = config.videos, config.fitting.batch_size // ranks.data.size
    codec = load_codec(config.codec, config.model.latent_channels).to(ranks.device)
    if is_first(ranks) and not (videos.folder / "manifest.jsonl").is_file():
        logger.info("writing %d videos to %s", videos.count, videos.folder)
        write_dataset(videos.folder, videos.count, videos.seed, codec=videos.codec,
                      num_latent_frames=config.stream.num_frames, size=videos.size,
                      workers=os.cpu_count() or 1)  # fmt: skip
    dist.barrier()
    started = time.monotonic()
    clip = ClipSpec(num_pixel_frames=codec.num_pixel_frames(config.stream.num_frames),
                    size=(videos.size, videos.size), dtype=torch.uint8)  # fmt: skip
    pipeline = VideoPipeline(videos.folder, clip, batch_size=64, shuffle=False,
                             num_threads=os.cpu_count() or 1, captioned=True)  # fmt: skip
    video_NCFHW = load_videos(pipeline)
    logger.info("decoded %d videos in %.0f s", len(video_NCFHW), time.monotonic() - started)
    codec, file = _codec(config, ranks, codec, video_NCFHW)
    with torch.no_grad():
        latents = [
            codec.encode(part.to(ranks.device).float() / 127.5 - 1)
            for part in torch.split(video_NCFHW, 64)
        ]
    entries = [found.index for found in pipeline.report.good]
    segment_S3, texts = _segments(pipeline, codec.temporal_stride, config.stream.num_frames)
    encoder = WordEncoder(config.model.text_dim, config.model.text_length)
    first = ranks.data.rank * share
    corpus = Corpus(
        latent_NFCHW=torch.cat(latents), segment_S3=segment_S3.to(ranks.device),
        text_SXD=encoder.encode(texts).to(ranks.device), seed=config.seed,
        rows=range(first, first + share), batch_size=config.fitting.batch_size,
        origin=_origin(videos.folder / "manifest.jsonl", file, entries),
    )  # fmt: skip
    return corpus, codec


def _codec(
    config: PretrainConfig, ranks: Ranks, codec: ShapesCodec, video_NCFHW: Tensor
) -> tuple[ShapesCodec, Path]:
    """The codec as its file has it, in bfloat16, and that file: a resumed run takes the same."""
    fitting, file = config.fitting, config.run_folder / "codec.safetensors"
    if is_first(ranks) and config.codec.weights is None and not file.is_file():
        curve = fit_codec(
            codec, video_NCFHW.permute(0, 2, 3, 4, 1), steps=fitting.codec_steps,
            batch_size=fitting.codec_batch, device=ranks.device, seed=config.seed,
        )  # fmt: skip
        logger.info("codec: %.1f dB after %d steps", curve["psnr"][-1], fitting.codec_steps)
        save_codec(codec, file, torch.bfloat16)
    elif is_first(ranks) and config.codec.weights is not None:
        save_codec(codec, file, torch.bfloat16)
    dist.barrier()
    file = config.codec.weights or file
    found = load_codec(
        dataclasses.replace(config.codec, weights=file), config.model.latent_channels
    )
    return found.to(ranks.device).requires_grad_(False).eval(), file


def _segments(pipeline: VideoPipeline, stride: int, num_frames: int) -> tuple[Tensor, list[str]]:
    """(video, first latent frame, one past the last) of all segments, and their texts."""
    segments, texts = [], []
    for row, file in enumerate(pipeline.report.good):
        shown = cut(file, pipeline.clip, 0, 0).segments
        for first, stop, text in segments_of(shown, file.segments[0].text, num_frames, stride):
            segments.append((row, first, stop))
            texts.append(text)
    return torch.tensor(segments), texts


def _origin(manifest: Path, codec: Path, entries: list[int]) -> str:
    """Hash of which videos, told how, through which codec."""
    digest = hashlib.sha256()
    for part in (manifest.read_bytes(), codec.read_bytes(), repr(entries).encode()):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:32]
