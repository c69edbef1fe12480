"""Batches of latents straight from videos, encoded anew each time.

`EncodedVideos` takes the clips of a cache of the same settings, in its order: the same batches.
`DrawnClips` begins each clip somewhere else in every epoch, as no cache can.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from megatron_kvpo.data.encoding import (
    Codec,
    EncodingSpec,
    TextEncoder,
    encode_clip,
    segments_of,
    text_tokens,
)
from megatron_kvpo.data.graph import Backend
from megatron_kvpo.data.latent_clips import ClipSet, Decoded, VideoClip
from megatron_kvpo.data.latents import ClipOrder, check_shared, joined, moved, placed
from megatron_kvpo.data.probe import Failures
from megatron_kvpo.data.sources import VideoSource
from megatron_kvpo.data.video import VideoBatch, VideoPipeline, read_ahead
from megatron_kvpo.model.umt5 import padded
from megatron_kvpo.model.wan_vae import WanVae
from megatron_kvpo.parallel.seeds import generator
from megatron_kvpo.records import LatentBatch

_MOST_TEXTS = 4096
"""Embeddings that are remembered."""


class BatchEncoder:
    """Pixels and texts to a LatentBatch, clip by clip."""

    def __init__(
        self, spec: EncodingSpec, codec: Codec, encoder: TextEncoder, device: torch.device
    ) -> None:
        self.spec, self.codec, self.encoder, self.device = spec, codec, encoder, device
        self._texts: OrderedDict[str, Tensor] = OrderedDict()

    def batch(
        self, index: Sequence[int], videos: Sequence[Tensor],
        segments: Sequence[Sequence[tuple[int, int, str]]],
    ) -> LatentBatch:  # fmt: skip
        """Of video_CFHW of one shape each, and (first latent frame, one past the last, text)."""
        latents = [encode_clip(self.codec, video, self.spec.dtype, self.device).float()
                   for video in videos]  # fmt: skip
        texts = [self._tokens(text) for told in segments for _, _, text in told]
        batch = joined(
            index, latents, [[(first, stop) for first, stop, _ in told] for told in segments],
            padded(texts, self.spec.text_length, self.spec.text_dim),
        )  # fmt: skip
        return moved(batch, self.device)

    def kept(self, batches: Iterator[LatentBatch]) -> Iterator[LatentBatch]:
        """The same, with the codec on the device until the last."""
        codec = self.codec
        with codec.resident(self.device) if isinstance(codec, WanVae) else nullcontext():
            yield from batches

    def _tokens(self, text: str) -> Tensor:
        if text not in self._texts:
            self._texts[text] = text_tokens(self.encoder, text)
            if len(self._texts) > _MOST_TEXTS:
                self._texts.popitem(last=False)
        return self._texts[text]


class EncodedVideos:
    """The batches of a LatentCache without the cache."""

    def __init__(
        self, source: VideoSource, spec: EncodingSpec, codec: Codec, encoder: TextEncoder, *,
        batch_size: int = 1, seed: int = 0, rank: int = 0, world_size: int = 1,
        device: torch.device | str = "cpu", backend: Backend = "cpu", num_threads: int = 2,
        ahead: int = 2,
    ) -> None:  # fmt: skip
        """Probe every file.

        Args:
            source: the videos.
            spec: EncodingSpec.of(codec, encoder, ...).
            codec: encodes them.
            encoder: of their texts.
            batch_size: clips of a step, over all data ranks.
            seed: of the order.
            rank: data rank.
            world_size: data ranks.
            device: where clips are encoded and batches go.
            backend: what decodes: `gpu` is NVDEC.
            num_threads: files that are decoded at once.
            ahead: batches that a thread decodes in advance.

        Raises:
            ValueError: as ClipSet does, and for a text that the encoder lacks.
        """
        self.spec, self._device, self._ahead = spec, placed(device), ahead
        self._encode = BatchEncoder(spec, codec, encoder, self._device)
        self._set = ClipSet(source, spec, codec.temporal_stride, backend=backend,
                            num_threads=num_threads)  # fmt: skip
        encoder.require(self._set.texts)
        self._clips = self._set.usable
        self._failures = Failures(source, self._set.report)
        self._buckets: dict[tuple[int, ...], list[int]] = {}
        for index, clip in self._clips.items():
            self._buckets.setdefault((clip.num_frames, *clip.size), []).append(index)
        self.order = ClipOrder(self._buckets, batch_size=batch_size, seed=seed, rank=rank,
                               world_size=world_size)  # fmt: skip
        self._fingerprint = self._set.fingerprint()

    def __len__(self) -> int:
        """Usable clips."""
        return len(self._clips)

    def fingerprint(self) -> str:
        """See LatentStream.fingerprint."""
        return self._fingerprint

    def batches(self, step: int = 0) -> Iterator[LatentBatch]:
        """See LatentStream.batches. A file that fails is replaced by another clip of its shape.

        ValueError if too many fail.
        """
        read = read_ahead(self._decoded, step, self._ahead, self._device)
        return self._encode.kept(self._encoded(clips) for clips in read)

    def _decoded(self, step: int) -> list[Decoded]:
        wanted = self.order.clips_of(step)
        while True:
            clips = [self._standing_for(index) for index in wanted]
            found = self._set.decode(clips)
            for clip, decoded in zip(clips, found, strict=True):
                if isinstance(decoded, str) and clip.file and clip.file.index not in self._failures:
                    self._failures.add(clip.file, decoded)
            whole = [decoded for decoded in found if isinstance(decoded, Decoded)]
            if len(whole) == len(wanted):
                return whole

    def _standing_for(self, index: int) -> VideoClip:
        """The clip, or the first substitute that has not failed, drawn from (seed, clip)."""
        clip, attempt = self._clips[index], 0
        others = self._buckets[clip.num_frames, *clip.size]
        if all(self._has_failed(self._clips[other]) for other in others):
            raise ValueError(
                f"no clip of {clip.num_frames} latent frames of {list(clip.size)} is left; "
                f"{self._failures.now().summary()}"
            )
        while self._has_failed(clip):
            attempt += 1
            draw = generator("substitute", self.order.seed, index, attempt)
            clip = self._clips[others[int(torch.randint(len(others), (), generator=draw))]]
        return clip

    def _has_failed(self, clip: VideoClip) -> bool:
        return clip.file is not None and clip.file.index in self._failures

    def _encoded(self, clips: Sequence[Decoded]) -> LatentBatch:
        return self._encode.batch([decoded.clip.index for decoded in clips],
                                  [decoded.video_CFHW for decoded in clips],
                                  [decoded.segments for decoded in clips])  # fmt: skip


class DrawnClips:
    """A clip of each file in an epoch, that begins where (seed, epoch, file) says."""

    def __init__(
        self, source: VideoSource, spec: EncodingSpec, codec: Codec, encoder: TextEncoder, *,
        start: Literal["random", "scene"], batch_size: int = 1, seed: int = 0, rank: int = 0,
        world_size: int = 1, device: torch.device | str = "cpu", backend: Backend = "cpu",
        num_threads: int = 2,
    ) -> None:  # fmt: skip
        """Arguments and errors as of EncodedVideos; `start` as in ClipSpec.

        `spec` has one length; its starts count for nothing. `index_B` is a file's place in the
        source.
        """
        if len(spec.num_frames) > 1 or spec.every is not None or spec.starts != (0,):
            raise ValueError(
                f"clips that begin at {start} places have one length and no other starts: not "
                f"{list(spec.num_frames)} latent frames from {list(spec.starts)} on, every "
                f"{spec.every}"
            )
        check_shared(batch_size, rank, world_size)
        self.spec, self._start = spec, start
        self._stride = codec.temporal_stride
        self._encode = BatchEncoder(spec, codec, encoder, placed(device))
        self._pipeline = VideoPipeline(
            source, spec.pixels(spec.num_frames[0], self._stride, start),
            batch_size=batch_size // world_size, seed=seed, rank=rank, world_size=world_size,
            backend=backend, num_threads=num_threads, captioned=True,
        )  # fmt: skip
        self._files = {file.index: file for file in self._pipeline.report.good}
        texts = [part.text for file in self._files.values() for part in file.segments]
        encoder.require(list(dict.fromkeys(texts)))

    def __len__(self) -> int:
        """Usable files."""
        return len(self._files)

    def fingerprint(self) -> str:
        """See LatentStream.fingerprint."""
        files = [(f.index, f.name, f.size, [(p.text, p.start, p.unit) for p in f.segments])
                 for f in self._files.values()]  # fmt: skip
        text = json.dumps([self._start, self.spec.to_json(), files])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def batches(self, step: int = 0) -> Iterator[LatentBatch]:
        """See LatentStream.batches, and VideoPipeline for files that fail."""
        decoded = self._pipeline.batches(step)
        return self._encode.kept(self._encoded(batch) for batch in decoded)

    def _encoded(self, batch: VideoBatch) -> LatentBatch:
        index, frames = batch.index_B.tolist(), self.spec.num_frames[0]
        told = [segments_of(shown, self._files[file].segments[0].text, frames, self._stride)
                for file, shown in zip(index, batch.segments, strict=True)]  # fmt: skip
        return self._encode.batch(index, list(batch.video_BCFHW), told)
