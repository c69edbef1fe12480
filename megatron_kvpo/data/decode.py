"""One video file by PyAV: what it holds, and chosen pixel frames of it.

Runs as a process of its own (`python -m megatron_kvpo.data.decode FD`, driven by workers.py), so
that a file which kills its decoder kills nothing else. Imports no torch, to start fast.
"""

from __future__ import annotations

import io
import itertools
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from megatron_kvpo.data.workers import serve

UNSPECIFIED = 2
"""libavutil's AVCOL_SPC_UNSPECIFIED, read as BT.601: what swscale and DALI do."""

_FULL_RANGE = 2
_OPTIONS = {"protocol_whitelist": "file"}
"""A file that names others (playlists, concat scripts) reaches no network."""


class Part(io.RawIOBase):
    """`size` bytes of a file from `offset` on, as a file: a member of a tar shard."""

    def __init__(self, path: str, offset: int, size: int) -> None:
        self._file = open(path, "rb")  # noqa: SIM115  closed with this object
        self._offset, self._size, self._place = offset, size, 0

    def readable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def seekable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        """See io.RawIOBase."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, base + place)
        return self._place

    def tell(self) -> int:
        """See io.RawIOBase."""
        return self._place

    def read(self, count: int = -1) -> bytes:
        """See io.RawIOBase."""
        left = max(0, self._size - self._place)
        self._file.seek(self._offset + self._place)
        found = self._file.read(left if count < 0 else min(count, left))
        self._place += len(found)
        return found

    def close(self) -> None:
        """See io.RawIOBase."""
        self._file.close()
        super().close()


def probe(path: str, offset: int, size: int, *, decode: bool = True) -> dict[str, Any]:
    """Format, colour, turn and the timestamp of every pixel frame.

    With `decode` all frames are decoded once; without it packets are counted and one frame is
    decoded. Timestamps are in units of `time_base` from the first frame on, run-length coded as
    [difference, count] pairs. ValueError with the reason for a file that is not whole.
    """
    packets = _packets(path, offset, size)
    frame, pts, whole = _decoded(path, offset, size, 0 if decode else 1)
    if not decode:
        if packets["whole"]:
            pts, whole = packets["pts"], True
        else:
            frame, pts, whole = _decoded(path, offset, size, 0)
    turn = _turn(frame)
    height, width = frame.height, frame.width
    sar = packets["sample_aspect"]
    if turn[0]:
        height, width, sar = width, height, 1 / sar
    return {
        "codec": packets["codec"], "pixel_format": frame.format.name, "height": height,
        "width": width, "sample_aspect": sar, "turn": list(turn),
        "matrix": int(frame.colorspace), "full_range": int(frame.color_range) == _FULL_RANGE,
        "time_base": packets["time_base"] if whole else packets["frame_s"],
        "first_pts": pts[0] if whole else 0, "timed": whole,
        "deltas": _runs(np.diff(np.array(pts)) if whole else np.ones(len(pts) - 1, np.int64)),
        "indexed": packets["whole"] and packets["count"] == len(pts) and (
            decode or packets["codec"] != "vp8"),  # VP8 has packets that show nothing
    }  # fmt: skip


def _packets(path: str, offset: int, size: int) -> dict[str, Any]:
    """What the container says without decoding."""
    with _opened(path, offset, size) as (container, stream):
        pts: list[int | None] = []
        usable = True
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            if packet.is_corrupt:
                raise ValueError(f"truncated or corrupt at packet {len(pts)}")
            usable = usable and not packet.is_discard
            pts.append(packet.pts)
        if "mp4" in container.format.name and stream.frames > len(pts):  # AVI counts repeats too
            raise ValueError(f"truncated: {len(pts)} of {stream.frames} pixel frames are there")
        numbers = sorted(value for value in pts if value is not None)
        rate = stream.average_rate or stream.guessed_rate
        return {
            "codec": stream.codec_context.codec.canonical_name, "count": len(pts), "pts": numbers,
            "whole": usable and len(set(numbers)) == len(pts) > 0,
            "time_base": float(stream.time_base), "frame_s": float(1 / rate) if rate else 1 / 25,
            "sample_aspect": float(stream.sample_aspect_ratio or 1) or 1.0,
        }  # fmt: skip


def _decoded(path: str, offset: int, size: int, most: int) -> tuple[Any, list[Any], bool]:
    """First frame, timestamps of `most` frames (0: all), and whether these are good to use."""
    pts: list[Any] = []
    first: Any = None
    try:
        with _opened(path, offset, size) as (container, stream):
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise ValueError(f"pixel frame {len(pts)} is corrupt")
                first = first or frame
                if (frame.height, frame.width) != (first.height, first.width):
                    raise ValueError(
                        f"pixel frame {len(pts)} is {frame.height} x {frame.width}, the first "
                        f"{first.height} x {first.width}"
                    )
                pts.append(frame.pts)
                if len(pts) == most:
                    break
    except av.FFmpegError as error:
        raise ValueError(
            f"cannot be decoded past {len(pts)} pixel frames ({error.strerror})"
        ) from error
    if not pts:
        raise ValueError("0 pixel frames in it")
    whole = None not in pts and all(a < b for a, b in itertools.pairwise(pts))
    return first, pts, whole


@contextmanager
def _opened(path: str, offset: int, size: int) -> Iterator[tuple[Any, Any]]:
    """A container and its video stream, decoded strictly, on one thread. ValueError if unusable."""
    whole = offset == 0 and size == os.path.getsize(path)
    try:
        source = path if whole else Part(path, offset, size)
        with av.open(source, options=dict(_OPTIONS)) as container:
            streams = [
                s for s in container.streams.video if not s.disposition & Disposition.attached_pic
            ]
            if not streams:
                raise ValueError("no video stream in it")
            stream: Any = streams[0]
            stream.codec_context.thread_count = 1  # files are spread over processes
            stream.codec_context.options = {"err_detect": "explode"}
            yield container, stream
    except av.FFmpegError as error:
        raise ValueError(f"cannot be opened or read ({error.strerror})") from error


def _runs(values: NDArray[np.int64]) -> list[list[int]]:
    """Run-length code: [value, count] pairs."""
    if not len(values):
        return []
    edges = np.flatnonzero(np.diff(values)) + 1
    starts = [0, *edges.tolist(), len(values)]
    return [[int(values[a]), b - a] for a, b in itertools.pairwise(starts)]


def _turn(frame: Any) -> tuple[bool, bool, bool]:
    """Whether to swap rows and columns, then flip rows, then flip columns.

    From the display matrix (a b u; c d v; x y w), which maps x to ax + cy and y to bx + dy.
    ValueError for an angle that is no multiple of 90 degrees.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, False, False
    a, b, _, c, d = (np.frombuffer(bytes(data), np.int32)[:5] / 65536).tolist()
    if max(min(abs(a), abs(b)), min(abs(c), abs(d))) > 0.01:
        raise ValueError(f"turned by {frame.rotation} degrees, which is no multiple of 90")
    if abs(b) > abs(a):
        return True, b < 0, c < 0
    return False, d < 0, a < 0


def turned(image_HWC: NDArray[np.uint8], turn: tuple[bool, bool, bool]) -> NDArray[np.uint8]:
    """A pixel frame as it is to be shown, a view."""
    swap, rows, columns = turn
    image = image_HWC.transpose(1, 0, 2) if swap else image_HWC
    return image[:: -1 if rows else 1, :: -1 if columns else 1]


def frames(path: str, offset: int, size: int, wanted: list[int], *,
           timed: bool, turn: tuple[bool, bool, bool]) -> Iterator[NDArray[np.uint8]]:  # fmt: skip
    """RGB pixel frames uint8 [H, W, 3] that are shown at the rising timestamps `wanted`.

    Without `timed`, `wanted` counts pixel frames from 0. Begins at the key frame before the first
    wanted one; where a container cannot seek there, at the beginning. ValueError if the file ends
    too early or cannot be decoded.
    """
    found = 0
    for seek in (True, False) if timed and wanted[0] else (False,):
        try:
            with _opened(path, offset, size) as (container, stream):
                if seek:
                    container.seek(wanted[0], stream=stream, backward=True)
                for image in _shown(container, stream, wanted, timed):
                    yield turned(image, turn)
                    found += 1
        except ValueError:
            if found or not seek:
                raise
        if found:
            return
    raise ValueError(f"no pixel frame at timestamp {wanted[0]}: the file has changed")


def _shown(
    container: Any, stream: Any, wanted: list[int], timed: bool
) -> Iterator[NDArray[np.uint8]]:
    """All wanted frames, or none if the first decoded one comes after the first wanted."""
    reformatter = VideoReformatter()
    done = 0
    last: Any = None
    for count, frame in enumerate(container.decode(stream)):
        if frame.is_corrupt:
            raise ValueError(f"pixel frame {count} is corrupt")
        time = frame.pts if timed else count
        if time is None:
            raise ValueError(f"pixel frame {count} has lost its timestamp")
        if last is None and time > wanted[0]:
            return
        held: tuple[Any, Any] = None, None
        while done < len(wanted) and wanted[done] <= time:
            source = frame if wanted[done] == time else last
            if held[0] is not source:
                rgb = reformatter.reformat(source, format="rgb24", threads=1)
                held = source, rgb.to_ndarray()
            yield held[1]
            done += 1
        if done == len(wanted):
            return
        last = frame
    raise ValueError(f"ends after {done} of {len(wanted)} pixel frames")


def _answer(request: dict[str, Any], shared: int) -> dict[str, Any]:
    """The reply to one request; pixel frames go to the memory file `shared`."""
    where = request["path"], request["offset"], request["size"]
    try:
        if request["do"] == "probe":
            return {"ok": probe(*where, decode=request["decode"])}
        wanted = request["wanted"]
        place = None
        found: tuple[int, ...] = ()
        for image in frames(*where, wanted, timed=request["timed"], turn=tuple(request["turn"])):
            if place is None:
                found = (len(wanted), *image.shape)
                if os.fstat(shared).st_size < np.prod(found):
                    os.ftruncate(shared, int(np.prod(found)))
                place = mmap.mmap(shared, 0)
                video = np.frombuffer(place, np.uint8, int(np.prod(found))).reshape(found)
                row = 0
            video[row] = image
            row += 1
        return {"ok": found}
    except (ValueError, OSError) as error:
        return {"error": str(error)}


def main() -> int:
    """Answer requests. The memory file for pixel frames is the first argument."""
    shared = int(sys.argv[1])
    return serve(lambda request: _answer(request, shared))


if __name__ == "__main__":
    sys.exit(main())
