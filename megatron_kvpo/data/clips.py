"""Which pixel frames of a file make a clip, at which size, and under which texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_kvpo.data.probe import VideoFile
from megatron_kvpo.data.sources import Segment
from megatron_kvpo.parallel.seeds import generator
from megatron_kvpo.world import pixel_start

T = TypeVar("T")

STARTS = ("random", "scene")
_NEAR_S = 1e-3
"""Times closer than this are one: Matroska rounds its timestamps to milliseconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSpec:
    """Which pixel frames of each file are taken, and at which size.

    Frames are resized so that they cover the size, with the proportions that the file is shown in,
    and what stands over is cut off evenly.
    """

    num_pixel_frames: int = 0
    """Of a clip; or give `seconds`."""

    seconds: float | None = None
    """Length of a clip, with `fps`: round(seconds * fps / stride) pixel frames."""

    size: tuple[int, int] | None = None
    """Height and width of every clip; or give `buckets`."""

    buckets: tuple[tuple[int, int], ...] = ()
    """Heights and widths: a file goes to the nearest in proportions; a batch holds one of them."""

    fps: float | None = None
    """Pixel frames a second after resampling: at each time the frame that is shown then, so files
    of any rate, also a variable one, come out alike. None takes the file's frames as they stand."""

    start: int | str = 0
    """First pixel frame taken (after resampling); `random`, anew in each epoch; or `scene`, the
    beginning of one of the file's segments, anew in each epoch."""

    stride: int = 1
    """Every stride-th pixel frame is taken (after resampling)."""

    dtype: torch.dtype = torch.float32
    """float32 in [-1, 1], or uint8 in [0, 255]: the same values before normalisation."""

    def __post_init__(self) -> None:
        if self.seconds is not None:
            if self.num_pixel_frames or self.fps is None:
                raise ValueError(f"{self}: `seconds` stands with fps, not with num_pixel_frames")
            count = round(self.seconds * self.fps / self.stride)
            object.__setattr__(self, "num_pixel_frames", count)
            object.__setattr__(self, "seconds", None)
        if (self.size is None) == (not self.buckets):
            raise ValueError(f"{self}: give either a size or buckets")
        sides = [side for size in self.sizes for side in size]
        if min(self.num_pixel_frames, self.stride, *sides) < 1:
            raise ValueError(f"{self}: number, sizes and stride must be above 0, start at least 0")
        if self.fps is not None and not (self.fps > 0 and math.isfinite(self.fps)):
            raise ValueError(f"fps {self.fps} must be above 0: None keeps the file's frames")
        if self.start not in STARTS and (not isinstance(self.start, int) or self.start < 0):
            raise ValueError(f"start {self.start!r}: a pixel frame from 0 on, or one of {STARTS}")
        if self.dtype not in (torch.float32, torch.uint8):
            raise ValueError(f"clips of {self.dtype} cannot be had: use float32 or uint8")

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Every size that a batch can have."""
        return self.buckets if self.size is None else (self.size,)

    @property
    def reach(self) -> int:
        """Pixel frames from a clip's first to its last (after resampling)."""
        return self.stride * (self.num_pixel_frames - 1)

    def size_of(self, file: VideoFile) -> tuple[int, int]:
        """The size whose proportions are nearest; of equal ones the largest that is no upscale."""
        shown = math.log(file.width * file.sample_aspect / file.height)

        def distance(size: tuple[int, int]) -> tuple[float, bool, int]:
            height, width = size
            over = height > file.height
            area = height * width
            return round(abs(math.log(width / height) - shown), 6), over, area if over else -area

        return min(self.sizes, key=distance)

    def last_start(self, file: VideoFile) -> int:
        """The last pixel frame (after resampling) at which a clip can begin; below 0: none."""
        if self.fps is None:
            return file.num_pixel_frames - 1 - self.reach
        return math.ceil((float(file.times_s[-1]) - _NEAR_S) * self.fps) - 1 - self.reach

    def fault(self, file: VideoFile) -> str | None:
        """Why a whole file cannot serve, or None."""
        start = self.start if isinstance(self.start, int) else 0
        if start > self.last_start(file):
            if self.fps is None:
                needed = start + self.reach + 1
                return f"too short: {file.num_pixel_frames} pixel frames, {needed} needed"
            end_s, last_s = file.times_s[-1], (start + self.reach) / self.fps
            return f"too short: {end_s:.3f} s, more than {last_s:.3f} s needed"
        if self.start == "scene" and not len(_scenes(file, self)):
            return "no segment is long enough before the file ends"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class FileClip:
    """One row of a batch, before it is decoded."""

    file: VideoFile
    size: tuple[int, int]
    frames: NDArray[np.int64]
    """Pixel frames of the file, counted from 0; one may stand several times."""

    start_s: float
    """Of the first, from the file's beginning."""

    segments: tuple[tuple[int, str], ...]
    """First pixel frame in the clip, and text. Empty for a file without captions."""

    @property
    def roi(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Upper left and lower right corner, (y, x), of what `size` shows of a pixel frame."""
        height, width = float(self.file.height), float(self.file.width)
        ratio = self.size[1] / self.size[0] / self.file.sample_aspect
        tall, wide = min(height, width / ratio), min(width, height * ratio)
        top, left = (height - tall) / 2, (width - wide) / 2
        return (top, left), (top + tall, left + wide)


def cut(file: VideoFile, clip: ClipSpec, seed: int, epoch: int) -> FileClip:
    """The clip of a file in an epoch: a function of (seed, epoch, file.index) and the settings."""
    times_s = file.times_s
    first, start_s = _start(file, clip, times_s, seed, epoch)
    steps = np.arange(clip.num_pixel_frames) * clip.stride
    if clip.fps is None:
        frames = first + steps
        shown_s = times_s[frames]
    else:
        shown_s = start_s + steps / clip.fps
        frames = np.searchsorted(times_s[:-1], shown_s + _NEAR_S, side="right") - 1
    return FileClip(file=file, size=clip.size_of(file), frames=frames, start_s=float(shown_s[0]),
                segments=_texts(file, times_s, shown_s))  # fmt: skip


def _start(
    file: VideoFile, clip: ClipSpec, times_s: NDArray[np.float64], seed: int, epoch: int
) -> tuple[int, float]:
    """First pixel frame of the file, and the time of the clip's first pixel frame."""
    if isinstance(clip.start, int):
        return clip.start, clip.start / clip.fps if clip.fps else float(times_s[clip.start])
    chosen = _scenes(file, clip) if clip.start == "scene" else _fitting(times_s, clip)
    draw = torch.randint(len(chosen), (), generator=generator("clip", seed, epoch, file.index))
    first = int(chosen[int(draw)])
    return first, float(times_s[first])


def _fitting(times_s: NDArray[np.float64], clip: ClipSpec) -> NDArray[np.int64]:
    """Pixel frames at which a clip can begin."""
    if clip.fps is None:
        return np.arange(max(0, len(times_s) - 1 - clip.reach))
    latest = times_s[-1] - clip.reach / clip.fps - _NEAR_S
    return np.flatnonzero(times_s[:-1] < latest)


def _scenes(file: VideoFile, clip: ClipSpec) -> NDArray[np.int64]:
    """Pixel frames at which a segment begins and a clip fits; 0 for a file without segments."""
    times_s = file.times_s
    begins = [_begin_s(segment, times_s) for segment in file.segments] or [0.0]
    frames = np.searchsorted(times_s[:-1], np.array(begins) - _NEAR_S)
    return np.intersect1d(frames, _fitting(times_s, clip))


def _begin_s(segment: Segment, times_s: NDArray[np.float64]) -> float:
    """When a segment begins in its file; past the end, infinity."""
    if segment.unit == "s":
        return segment.start
    frame = int(segment.start)
    if segment.unit == "latent_frame":
        frame = pixel_start(frame)
    return float(times_s[frame]) if frame < len(times_s) - 1 else math.inf


def _texts(
    file: VideoFile, times_s: NDArray[np.float64], shown_s: NDArray[np.float64]
) -> tuple[tuple[int, str], ...]:
    """Segments that govern a pixel frame of the clip. Before the first segment the text is ""."""
    begins = [(_begin_s(segment, times_s), segment.text) for segment in file.segments]
    found: dict[int, str] = {}
    for begin_s, text in sorted(begins, key=lambda pair: pair[0]):
        first = int(np.searchsorted(shown_s, begin_s - _NEAR_S))
        if first < len(shown_s):
            found[first] = text  # a segment that shows no frame is replaced by the next
    if found and 0 not in found:
        found[0] = ""
    return tuple(sorted(found.items()))


def untold(file: VideoFile) -> str | None:
    """Why a file's texts cannot serve, or None."""
    if not file.segments:
        return "no caption is given"
    empty = [number for number, part in enumerate(file.segments) if not part.text.strip()]
    return f"the text of segment {empty[0]} is empty" if empty else None


def rank_share(rows: Sequence[T], rank: int, world_size: int) -> list[T]:
    """A data rank's contiguous share of a global step's rows."""
    each = len(rows) // world_size
    return list(rows[rank * each : (rank + 1) * each])


class Schedule:
    """Which files each step uses: a function of (seed, step) and the global batch alone.

    A bucket's files pass in permutations, one an epoch, cut into batches without a gap. Of several
    buckets each takes its turn as often as its number of files says, exactly over any N steps.
    """

    def __init__(self, buckets: Sequence[int], batch: int, seed: int, shuffle: bool) -> None:
        """`buckets` names each file's bucket, in order; `batch` is of all ranks together."""
        self.batch, self._seed, self._shuffle = batch, seed, shuffle
        self._buckets = np.array(buckets)
        self._sizes = np.bincount(self._buckets)
        self._turns: tuple[int, NDArray[np.int64]] = (0, np.zeros_like(self._sizes))
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def order(self, epoch: int) -> NDArray[np.int64]:
        """All files in the order of an epoch."""
        if not self._shuffle:
            return np.arange(len(self._buckets))
        drawn = generator("videos", self._seed, epoch)
        return torch.randperm(len(self._buckets), generator=drawn).numpy()

    def epoch(self, epoch: int) -> list[list[int]]:
        """An epoch in steps: each file once, those that fill no batch in smaller ones.

        A step stands where its last file does.
        """
        order = self.order(epoch)
        places: list[tuple[int, list[int]]] = []
        for bucket in range(len(self._sizes)):
            own = np.flatnonzero(self._buckets[order] == bucket)
            for start in range(0, len(own), self.batch):
                some = own[start : start + self.batch]
                places.append((int(some[-1]), order[some].tolist()))
        return [files for _, files in sorted(places)]

    def step(self, step: int) -> list[tuple[int, int]]:
        """(file, epoch) of each row of the global batch of `step`, from 0."""
        bucket, turn = self._turn(step)
        size = int(self._sizes[bucket])
        rows = []
        for place in range(turn * self.batch, (turn + 1) * self.batch):
            epoch, row = divmod(place, size)
            rows.append((int(self._bucket_order(bucket, epoch)[row]), epoch))
        return rows

    def _turn(self, step: int) -> tuple[int, int]:
        """Bucket of a step, and how often it had its turn before: who is furthest behind."""
        total = len(self._buckets)
        rounds, within = divmod(step, total)
        done, taken = self._turns
        if within < done:
            done, taken = 0, np.zeros_like(self._sizes)
        for place in range(done, within):
            taken[np.argmax(self._sizes * (place + 1) - taken * total)] += 1
        self._turns = within, taken
        bucket = int(np.argmax(self._sizes * (within + 1) - taken * total))
        return bucket, int(rounds * self._sizes[bucket] + taken[bucket])

    def _bucket_order(self, bucket: int, epoch: int) -> NDArray[np.int64]:
        held = self._orders.get(bucket)
        if held is None or held[0] != epoch:
            order = self.order(epoch)
            held = epoch, order[self._buckets[order] == bucket]
            self._orders[bucket] = held
        return held[1]
