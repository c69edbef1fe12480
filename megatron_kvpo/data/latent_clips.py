"""The clips of a source that are encoded, by number: what each takes of its file, its pixels."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kvpo.data.clips import ClipSpec, FileClip, cut, untold
from megatron_kvpo.data.encoding import EncodingSpec, data_fingerprint, segments_of
from megatron_kvpo.data.graph import Backend, Decoder
from megatron_kvpo.data.probe import VideoFile, VideoReport, probe_source
from megatron_kvpo.data.sources import Entry, Segment, VideoSource

_AT_ONCE = 8
"""Clips that go through a graph together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoClip:
    """Where a clip is found, or why it is not to be had."""

    index: int
    """Its number in the data set. Of the same source and settings it is the same, whichever files
    are damaged; with `every` the lengths of files count too."""

    name: str
    """Of the file, as its source writes it."""

    start: int
    """First pixel frame that is taken, at the rate of the spec."""

    segments: tuple[Segment, ...]
    """All that the file is told in."""

    file: VideoFile | None = None
    """None for a clip that cannot be used."""

    num_frames: int = 0
    """Latent frames."""

    size: tuple[int, int] = (0, 0)
    """Height and width, pixels."""

    reason: str = ""
    """Why it cannot be used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """A clip's pixels and what it is told in."""

    clip: VideoClip
    video_CFHW: Tensor
    """uint8."""

    segments: list[tuple[int, int, str]]
    """As `segments_of` gives them, in latent frames."""

    num_bytes: int
    """Of the file."""


class ClipSet:
    """All clips of a source, and their pixels."""

    def __init__(
        self, source: VideoSource, spec: EncodingSpec, temporal_stride: int, *,
        backend: Backend = "cpu", num_threads: int = 2,
    ) -> None:  # fmt: skip
        """Probe every file: one that is told in no text or fills no clip is a bad one.

        ValueError if the source is missing or ill-formed, no file is usable, more than
        source.max_bad are not, or for a GPU that is not there.
        """
        self.source, self.spec, self._stride = source, spec, temporal_stride
        self._decoder = Decoder(torch.uint8, backend, _AT_ONCE, num_threads, source.folder)
        shortest = self._pixels(spec.num_frames[-1], min(spec.starts))
        self.report: VideoReport = probe_source(
            source, lambda file: untold(file) or shortest.fault(file), num_threads
        )
        files = {file.index: file for file in self.report.good}
        reasons = [reason for _, reason in reversed(self.report.rejected)]
        self.clips: list[VideoClip] = []
        """By number; those that cannot be used are among them."""

        for entry in self.report.entries:
            file = files.get(entry.index)
            reason = reasons.pop() if file is None else ""
            self.clips += self._of_file(entry, file, reason)

    @property
    def usable(self) -> dict[int, VideoClip]:
        """Those that can be decoded, by number."""
        return {clip.index: clip for clip in self.clips if clip.file is not None}

    @property
    def texts(self) -> list[str]:
        """All that usable files are told in, each once."""
        return list(dict.fromkeys(part.text for f in self.report.good for part in f.segments))

    def origin(self) -> str:
        """32 hex digits of which clips the source promises, whether their files are good or not."""
        told = [(clip.name, clip.start, [dataclasses.astuple(part) for part in clip.segments])
                for clip in self.clips]  # fmt: skip
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]

    def fingerprint(self) -> str:
        """Of the usable clips: what a cache of them is called too."""
        return data_fingerprint(self.spec, {
            index: (clip.name, clip.file.size, self._told(clip, self._cut(clip)))
            for index, clip in self.usable.items() if clip.file is not None
        })  # fmt: skip

    def decode(self, clips: Sequence[VideoClip]) -> list[Decoded | str]:
        """Each clip's pixels, or why there are none. Those of one shape are decoded together."""
        found: dict[int, Decoded | str] = {clip.index: clip.reason for clip in clips}
        groups: dict[tuple[int, tuple[int, int]], list[VideoClip]] = {}
        for clip in clips:
            if clip.file is not None:
                groups.setdefault((clip.num_frames, clip.size), []).append(clip)
        for some in groups.values():
            cuts = [self._cut(clip) for clip in some]
            video_BCFHW, failed = self._decoder.decode(cuts)
            rows = iter(video_BCFHW)
            for place, (clip, shown) in enumerate(zip(some, cuts, strict=True)):
                found[clip.index] = failed[place] if place in failed else Decoded(
                    clip=clip, video_CFHW=next(rows), segments=self._told(clip, shown),
                    num_bytes=shown.file.size,
                )  # fmt: skip
        return [found[clip.index] for clip in clips]

    def _pixels(self, num_frames: int, start: int) -> ClipSpec:
        return self.spec.pixels(num_frames, self._stride, start)

    def _of_file(self, entry: Entry, file: VideoFile | None, reason: str) -> list[VideoClip]:
        """The clips of one file, or those that it was to give."""
        starts: Sequence[int] = self.spec.starts
        if file is not None and self.spec.every is not None:
            last = self._pixels(self.spec.num_frames[-1], 0).last_start(file)
            starts = range(starts[0], last + 1, self.spec.every)
        found = [
            VideoClip(index=len(self.clips) + place, name=entry.name, start=start,
                      segments=entry.segments, reason=reason)
            for place, start in enumerate(starts)
        ]  # fmt: skip
        return found if file is None else self._fitted(found, file)

    def _fitted(self, clips: Sequence[VideoClip], file: VideoFile) -> list[VideoClip]:
        """With the most latent frames that the file fills from each start on."""
        specs = [(n, self._pixels(n, 0)) for n in self.spec.num_frames]
        lasts = [(n, spec.last_start(file)) for n, spec in specs]
        size = specs[0][1].size_of(file)
        fitted = []
        for clip in clips:
            fitting = [n for n, last in lasts if clip.start <= last]
            if fitting:
                clip = dataclasses.replace(clip, file=file, num_frames=fitting[0], size=size)
            else:
                fault = self._pixels(self.spec.num_frames[-1], clip.start).fault(file)
                clip = dataclasses.replace(clip, reason=str(fault))
            fitted.append(clip)
        return fitted

    def _cut(self, clip: VideoClip) -> FileClip:
        assert clip.file is not None
        return cut(clip.file, self._pixels(clip.num_frames, clip.start), 0, 0)

    def _told(self, clip: VideoClip, shown: FileClip) -> list[tuple[int, int, str]]:
        first = clip.segments[0].text
        return segments_of(shown.segments, first, clip.num_frames, self._stride)
