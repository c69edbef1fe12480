"""What the files of a source hold, found once and remembered; which of them cannot be used."""

from __future__ import annotations

import fcntl
import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from megatron_kvpo.data.sources import Entry, Segment, VideoSource, read_entries
from megatron_kvpo.data.workers import DecoderDied, workers

logger = logging.getLogger(__name__)

CACHE = ".probe.jsonl"
_FORMAT = 1
"""Raised when a stored probe's keys or their meaning change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoFile:
    """A file, or a shard's member, that the probe found whole."""

    path: Path
    index: int
    """Its entry's place in the source, from 0."""

    codec: str
    """libavcodec's name."""

    height: int
    width: int
    """Pixels of a decoded frame, turned as the file asks."""

    name: str = ""
    segments: tuple[Segment, ...] = ()
    offset: int = 0
    size: int = 0
    """Bytes of the video within `path`."""

    pixel_format: str = "yuv420p"
    sample_aspect: float = 1.0
    """Width of a pixel over its height."""

    turn: tuple[bool, bool, bool] = (False, False, False)
    """Swap rows and columns, then flip rows, then flip columns."""

    matrix: int = 2
    """Luma and chroma to RGB: libavutil's AVCOL_SPC number."""

    full_range: bool = False
    time_base: float
    """Seconds of one unit of a timestamp."""

    timed: bool
    """Frames are found by timestamps; else by counting, as the file has none that are good."""

    indexed: bool
    """Packets and pixel frames are one to one, so a decoder may count either."""

    first_pts: int = 0
    deltas: tuple[tuple[int, int], ...] = field(repr=False)
    """(difference, how often) of the timestamps, in order."""

    @property
    def pts(self) -> NDArray[np.int64]:
        """Timestamp of each pixel frame."""
        values = [value for value, _ in self.deltas]
        steps = np.repeat(np.array(values, np.int64), [count for _, count in self.deltas])
        return np.concatenate([[self.first_pts], self.first_pts + np.cumsum(steps)])

    @property
    def times_s(self) -> NDArray[np.float64]:
        """Seconds from the first pixel frame at which each is shown, and where the last ends."""
        pts = self.pts - self.first_pts
        last = pts[-1] - pts[-2] if len(pts) > 1 else 1
        return np.append(pts, pts[-1] + last) * self.time_base

    @property
    def num_pixel_frames(self) -> int:
        """That were decoded, or counted."""
        return 1 + sum(count for _, count in self.deltas)


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoReport:
    """What the probe found."""

    good: tuple[VideoFile, ...]
    rejected: tuple[tuple[str, str], ...]
    """(file, reason) of each file left out."""

    entries: tuple[Entry, ...] = ()
    """All that the source names, by index."""

    def summary(self, most: int = 5) -> str:
        """One line: how many files were left out, and the first of them with reasons."""
        total = len(self.good) + len(self.rejected)
        first = "; ".join(f"{file}: {reason}" for file, reason in self.rejected[:most])
        return f"{len(self.rejected)} of {total} videos cannot be used: {first}"


def probe_source(
    source: VideoSource, fault: Callable[[VideoFile], str | None], num_threads: int = 2
) -> VideoReport:
    """Try every file, or recall what was found; `fault` says why a whole one cannot serve.

    What is found stands in source.folder/.probe.jsonl, by size and time of change, and what was
    left out in source.report_path. Processes of one machine that probe the same data wait for the
    first. ValueError with the first reasons if none is usable or more than max_bad are not.
    """
    entries = read_entries(source)
    with _Cache(source) as cache, ThreadPoolExecutor(num_threads) as pool:
        found = list(pool.map(lambda entry: _file(entry, cache, num_threads), entries))
        if cache.added:
            logger.info("probed %d of %d videos, the others are known from %s",
                        cache.added, len(entries), cache.path)  # fmt: skip
    good, rejected = [], []
    for entry, file in zip(entries, found, strict=True):
        reason = file if isinstance(file, str) else fault(file)
        if isinstance(file, VideoFile) and reason is None:
            good.append(file)
        else:
            rejected.append((entry.name, str(reason)))
    report = VideoReport(good=tuple(good), rejected=tuple(rejected), entries=tuple(entries))
    write_skipped(source, report.rejected)
    if not good:
        raise ValueError(f"no usable video in {source.path}; {report.summary()}")
    check_share(source, len(rejected), len(entries), report.summary())
    if rejected:
        logger.warning("%s", report.summary())
    return report


def check_share(source: VideoSource, bad: int, total: int, summary: str) -> None:
    """Raise ValueError if more than max_bad of the files are bad."""
    if bad > source.max_bad * total:
        raise ValueError(
            f"{summary}; that is more than max_bad {source.max_bad:g} of the files: repair or "
            f"remove those in {source.report_path}, or raise max_bad"
        )


class Failures:
    """Files that failed though their probe was good, reported and counted."""

    def __init__(self, source: VideoSource, report: VideoReport) -> None:
        self._source, self._report = source, report
        self._reasons: dict[int, tuple[str, str]] = {}

    def __contains__(self, index: object) -> bool:
        return index in self._reasons

    def add(self, file: VideoFile, reason: str) -> None:
        """Take a file in. ValueError if it makes too many of the source's, or the last one."""
        self._reasons[file.index] = file.name, reason
        logger.warning("%s is left out from now on: %s", file.name, reason)
        write_skipped(self._source, [(file.name, reason)], "a")
        summary = self.now().summary()
        bad = len(self._report.rejected) + len(self._reasons)
        check_share(self._source, bad, bad + len(self.now().good), summary)
        if not self.now().good:
            raise ValueError(f"no usable video is left; {summary}")

    def now(self) -> VideoReport:
        """The probe's report with what has failed since."""
        good = tuple(file for file in self._report.good if file.index not in self._reasons)
        rejected = (*self._report.rejected, *self._reasons.values())
        return replace(self._report, good=good, rejected=rejected)


def write_skipped(
    source: VideoSource, rejected: Sequence[tuple[str, str]], mode: str = "w"
) -> None:
    """Write or append the report: a JSON object a line, `file` and `reason`."""
    if not rejected and not source.report_path.exists():
        return
    try:
        with source.report_path.open(mode) as out:
            out.writelines(
                json.dumps({"file": file, "reason": reason}) + "\n" for file, reason in rejected
            )
    except OSError as error:
        logger.warning("no report of skipped videos (%s): set `cache` to a folder", error)


def probe_path(path: Path, index: int = 0) -> VideoFile:
    """Decode one file whole, without a cache. ValueError with the reason if that fails."""
    entry = Entry(index=index, name=path.name, path=path)
    size = _stat(entry)[0]
    return _made(entry, workers(1).probe(path, 0, size, decode=True), size)


def _file(entry: Entry, cache: _Cache, num_threads: int) -> VideoFile | str:
    try:
        size, mtime_ns = _stat(entry)
        probe = cache.get(entry, size, mtime_ns)
        if probe is None:
            probe = cache.make(entry, size, mtime_ns, num_threads)
    except ValueError as error:
        return str(error)
    return probe["error"] if "error" in probe else _made(entry, probe, size)


def _stat(entry: Entry) -> tuple[int, int]:
    """Bytes of the video and time of change of the file. ValueError if it is not there whole."""
    if not entry.path.is_file():
        raise ValueError("no such file")
    stat = entry.path.stat()
    size = stat.st_size if entry.size is None else entry.size
    if size == 0:
        raise ValueError("the file is empty")
    if entry.offset + size > stat.st_size:
        raise ValueError(
            f"truncated: ends at byte {entry.offset + size} of a shard of {stat.st_size}"
        )
    return size, stat.st_mtime_ns


def _made(entry: Entry, probe: dict[str, Any], size: int) -> VideoFile:
    values = {**probe, "turn": tuple(probe["turn"]),
              "deltas": tuple((value, count) for value, count in probe["deltas"])}  # fmt: skip
    return VideoFile(path=entry.path, index=entry.index, name=entry.name, offset=entry.offset,
                     segments=entry.segments, size=size, **values)  # fmt: skip


class _Cache:
    """Probes by file, size and time of change, in a file that grows by lines.

    Locked while in use, so that of several processes the first probes and the others read.
    """

    def __init__(self, source: VideoSource) -> None:
        self.path = source.folder / CACHE
        self.added = 0
        self._decode = source.check == "decode"
        self._known: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._file: TextIO | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> _Cache:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+", encoding="utf-8")
            fcntl.flock(self._file, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("probes are not kept (%s): set `cache` to a folder", error)
        if self._file is not None:
            self._known.update(_stored(self._file))
            self._file.write("\n")  # ends a line that a killed process left half written
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def _key(self, entry: Entry, size: int, mtime_ns: int, decoded: bool) -> tuple[Any, ...]:
        inside = entry.path.is_relative_to(self.path.parent)
        path = entry.path.relative_to(self.path.parent) if inside else entry.path.absolute()
        return path.as_posix(), entry.offset, size, mtime_ns, decoded

    def get(self, entry: Entry, size: int, mtime_ns: int) -> dict[str, Any] | None:
        """What is known, or None. What decoding found also answers who asks for packets."""
        whole = self._known.get(self._key(entry, size, mtime_ns, True))
        if whole is not None or self._decode:
            return whole
        return self._known.get(self._key(entry, size, mtime_ns, False))

    def make(self, entry: Entry, size: int, mtime_ns: int, num_threads: int) -> dict[str, Any]:
        """Probe in another process and keep the result. DecoderDied is not kept."""
        try:
            probe = workers(num_threads).probe(entry.path, entry.offset, size, decode=self._decode)
        except DecoderDied:
            raise  # another time it may live
        except ValueError as error:
            probe = {"error": str(error)}
        key = self._key(entry, size, mtime_ns, self._decode)
        with self._lock:
            self.added += 1
            if self._file is not None:
                self._file.write(json.dumps({"format": _FORMAT, "key": key, "probe": probe}) + "\n")
                self._file.flush()
        return probe


def _stored(file: TextIO) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Probes of a cache."""
    file.seek(0)
    for row in whole_rows(file):
        if row.get("format") == _FORMAT:
            yield tuple(row["key"]), row["probe"]


def whole_rows(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """JSON objects, one a line; one that a killed process left half written counts for nothing."""
    for line in lines:
        with suppress(json.JSONDecodeError):
            yield json.loads(line)
