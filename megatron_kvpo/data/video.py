"""Video files to batches of clips: the order, the place in it, and what to do when a file fails.

sources.py says where videos stand, probe.py which of them can be used, clips.py which pixel frames
make a clip, graph.py how these become a tensor.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from megatron_kvpo.data.clips import ClipSpec, FileClip, Schedule, cut, rank_share, untold
from megatron_kvpo.data.graph import Backend, Decoder
from megatron_kvpo.data.probe import (
    Failures,
    VideoFile,
    VideoReport,
    probe_path,
    probe_source,
)
from megatron_kvpo.data.sources import VideoSource
from megatron_kvpo.parallel.seeds import generator

T = TypeVar("T")

__all__ = [
    "ClipSpec", "VideoBatch", "VideoFile", "VideoPipeline", "VideoReport", "VideoSource",
    "decode_file", "load_videos", "probe_file",
]  # fmt: skip

_MOST = 64
_AHEAD = 2
"""Batches that wait decoded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoBatch:
    """Clips and where they come from."""

    video_BCFHW: Tensor
    """RGB, F pixel frames, float32 in [-1, 1] or uint8."""

    index_B: Tensor
    """Manifest entry of each clip, int64, on the CPU."""

    start_s_B: Tensor
    """Where each clip begins in its file, float64, on the CPU."""

    segments: tuple[tuple[tuple[int, str], ...], ...]
    """Of each clip: the first pixel frame in the clip that a text governs, and the text, from
    pixel frame 0 on. Empty for a clip without captions."""


class VideoPipeline:
    """A source's videos in a seeded order, as batches, from any position on.

    Order: epoch e is a permutation drawn from (seed, e) alone. Every batch_size x world_size
    consecutive videos of one bucket are one step, of which each rank takes its contiguous share.
    """

    def __init__(
        self,
        source: str | Path | VideoSource,
        clip: ClipSpec,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        backend: Backend = "cpu",
        num_threads: int = 2,
        captioned: bool = False,
    ) -> None:
        """Probes every file that the source names; bad ones are skipped, reported and counted.

        With `captioned` one that is told in no text is a bad one.
        Raises ValueError if the source is missing or ill-formed, no file is usable, or more than
        source.max_bad are not.
        """
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {world_size}: out of range")
        self.source = source if isinstance(source, VideoSource) else VideoSource(path=Path(source))
        self.clip = clip
        self.decoder = Decoder(
            clip.dtype, backend, min(batch_size, _MOST), num_threads, self.source.folder
        )
        self.report = probe_source(
            self.source, lambda file: (untold(file) if captioned else None) or clip.fault(file),
            num_threads,
        )  # fmt: skip
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.epoch_number = 0
        self.position = 0
        """Videos of this epoch's order that all ranks together have consumed."""
        self._buckets = [clip.sizes.index(clip.size_of(file)) for file in self.report.good]
        self._schedule = Schedule(
            [sorted(set(self._buckets)).index(bucket) for bucket in self._buckets],
            batch_size * world_size, seed, shuffle,
        )  # fmt: skip
        self._failures = Failures(self.source, self.report)

    def __len__(self) -> int:
        """Usable videos."""
        return len(self.report.good)

    def epoch(self) -> Iterator[VideoBatch]:
        """The rest of the current epoch; afterwards the next one is current.

        A bucket's last step may be smaller, and leaves out what does not divide over the ranks.
        """
        place, epoch = 0, self.epoch_number
        steps = self._schedule.epoch(epoch)
        for number, step in enumerate(steps):
            start, place = place, place + len(step)
            if place <= self.position:
                continue
            step = step[max(0, self.position - start) :]
            self.position = place
            if number == len(steps) - 1:
                self.epoch_number, self.position = epoch + 1, 0
            mine = rank_share(step, self.rank, self.world_size)
            if mine:
                yield self._batch([(row, epoch) for row in mine])

    def batches(self, step: int = 0) -> Iterator[VideoBatch]:
        """Without end, over epochs, from global step `step` on, decoded ahead on a thread.

        A step's clips are a function of (seed, step, batch_size x world_size) and the usable files.
        Close or drop the iterator to end the thread. ValueError for a step below 0.
        """
        if step < 0:
            raise ValueError(f"step {step} must be at least 0")
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        return read_ahead(self._step, step, _AHEAD, device)

    def _step(self, step: int) -> VideoBatch:
        return self._batch(rank_share(self._schedule.step(step), self.rank, self.world_size))

    def _batch(self, rows: Sequence[tuple[int, int]]) -> VideoBatch:
        """Decode (file, epoch) rows. A file that fails is replaced by another of its bucket."""
        while True:
            clips = [self._clip(row, epoch) for row, epoch in rows]
            video_BCFHW, failed = self.decoder.decode(clips)
            if not failed:
                break
            for place, reason in failed.items():
                self._give_up(clips[place].file, reason)
        return VideoBatch(
            video_BCFHW=video_BCFHW,
            index_B=torch.tensor([clip.file.index for clip in clips]),
            start_s_B=torch.tensor([clip.start_s for clip in clips], dtype=torch.float64),
            segments=tuple(clip.segments for clip in clips),
        )

    def _clip(self, row: int, epoch: int) -> FileClip:
        """The row's clip, or that of the first substitute that has not failed."""
        file, attempt = self.report.good[row], 0
        while file.index in self._failures:
            attempt += 1
            file = self._substitute(row, epoch, attempt)
        return cut(file, self.clip, self.seed, epoch)

    def _substitute(self, row: int, epoch: int, attempt: int) -> VideoFile:
        """A function of (seed, epoch, file, attempt): all layouts of ranks take the same one."""
        bucket = self._buckets[row]
        others = [r for r, other in enumerate(self._buckets) if other == bucket]
        draw = generator("substitute", self.seed, epoch, self.report.good[row].index, attempt)
        return self.report.good[others[int(torch.randint(len(others), (), generator=draw))]]

    def _give_up(self, file: VideoFile, reason: str) -> None:
        """Report a file that failed though its probe was good. ValueError if there are too many."""
        self._failures.add(file, reason)
        left = zip(self._buckets, self.report.good, strict=True)
        if {bucket for bucket, f in left if f.index not in self._failures} != set(self._buckets):
            summary = self._failures.now().summary()
            raise ValueError(f"no usable video is left in a bucket; {summary}")

    def state_dict(self) -> dict[str, int]:
        """Where `epoch` stands after the batches handed out so far; `batches` needs none."""
        return {"epoch": self.epoch_number, "position": self.position, "videos": len(self),
                "global_batch": self._schedule.batch}  # fmt: skip

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from there, on any number of ranks.

        ValueError if the number of usable videos has changed, or, with several buckets, the global
        batch.
        """
        if state["videos"] != len(self):
            raise ValueError(
                f"the saved position counts {state['videos']} usable videos, the folder now has "
                f"{len(self)}: restore the files, or start the stream anew"
            )
        batch = self._schedule.batch
        if len(set(self._buckets)) > 1 and state.get("global_batch", batch) != batch:
            raise ValueError(
                f"the saved position counts batches of {state['global_batch']} over all ranks, now "
                f"they hold {batch}, which cuts the buckets otherwise: keep batch_size x world_size"
            )
        self.epoch_number, self.position = state["epoch"], state["position"]


def load_videos(pipeline: VideoPipeline) -> Tensor:
    """A whole epoch as one tensor [N, C, F, H, W], in the order of `pipeline.report.good`.

    ValueError if the clips have several sizes or a file could not be decoded after all.
    """
    if len(pipeline.clip.sizes) > 1:
        raise ValueError(f"one tensor has one size, not {len(pipeline.clip.sizes)} buckets")
    rows = {file.index: row for row, file in enumerate(pipeline.report.good)}
    videos, seen = torch.empty(0), set()
    for batch in pipeline.epoch():
        if not videos.numel():
            videos = batch.video_BCFHW.new_empty((len(rows), *batch.video_BCFHW.shape[1:]))
        taken = [rows[int(index)] for index in batch.index_B]
        videos[taken] = batch.video_BCFHW
        seen.update(taken)
    lost = [file.name for row, file in enumerate(pipeline.report.good) if row not in seen]
    if lost:
        raise ValueError(
            f"{len(lost)} videos were probed but not decoded, the first is {lost[0]}: see "
            f"{pipeline.source.report_path}, repair or remove them and start again"
        )
    return videos


def decode_file(path: str | Path, clip: ClipSpec, backend: Backend = "cpu") -> Tensor:
    """One file through the same graph: `video_CFHW`. ValueError with the file if it is unusable."""
    try:
        file = probe_file(Path(path), clip)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    video_BCFHW, failed = Decoder(clip.dtype, backend, 1, 1).decode([cut(file, clip, 0, 0)])
    if failed:
        raise ValueError(f"{path}: {failed[0]}")
    return video_BCFHW[0]


def probe_file(path: Path, clip: ClipSpec, index: int = 0) -> VideoFile:
    """Decode a file once. ValueError with the reason if it is not whole or too short."""
    file = probe_path(path, index)
    reason = clip.fault(file)
    if reason is not None:
        raise ValueError(reason)
    return file


def read_ahead(
    read: Callable[[int], T], step: int, depth: int, device: torch.device
) -> Iterator[T]:
    """read(step), read(step + 1), ... without an end, `depth` of them in advance by a thread.

    What `read` raises is raised here, in its turn. The thread, whose CUDA device is `device` if
    that is one, ends with the iterator.
    """
    if step < 0 or depth < 1:
        raise ValueError(f"step {step} must be 0 or more, and {depth} batches ahead at least 1")
    return _read_ahead(read, step, depth, device)


def _read_ahead(
    read: Callable[[int], T], step: int, depth: int, device: torch.device
) -> Iterator[T]:
    def enter() -> None:
        if device.type == "cuda":  # a thread begins on GPU 0, whatever its parent uses
            torch.cuda.set_device(device)

    pool = ThreadPoolExecutor(1, "videos-ahead", initializer=enter)
    waiting = deque(pool.submit(read, step + number) for number in range(depth))
    try:
        for number in itertools.count(step + depth):
            value = waiting.popleft().result()
            waiting.append(pool.submit(read, number))
            yield value
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
