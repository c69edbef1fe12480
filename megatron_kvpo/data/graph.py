"""Clips to pixels through NVIDIA DALI: one graph, two front ends.

`native` decodes inside DALI: on a CPU VP8, VP9 and MJPEG, with backend `gpu` on NVDEC. `frames`
feeds the same graph with what PyAV decoded in other processes: every other codec, and whatever
DALI would get wrong or refuses.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from megatron_kvpo.data.clips import FileClip
from megatron_kvpo.data.in_flight import InFlight
from megatron_kvpo.data.probe import VideoFile
from megatron_kvpo.data.workers import workers

logger = logging.getLogger(__name__)

Backend = Literal["cpu", "gpu"]
FrontEnd = Literal["native", "frames"]

NATIVE_CODECS: dict[Backend, frozenset[str]] = {
    "cpu": frozenset({"vp8", "vp9", "mjpeg"}),
    "gpu": frozenset({"vp8", "vp9", "mjpeg", "h264", "hevc", "av1", "mpeg4"}),
}
"""What DALI's own decoder reads. libavcodec's names."""

NATIVE_FORMATS: dict[Backend, frozenset[str]] = {
    "cpu": frozenset({"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p"}),
    "gpu": frozenset({"yuv420p", "yuvj420p"}),
}
"""8 bits; NVDEC has 4:2:0 for all its codecs. DALI's conversion there wants even sides."""

BT601 = frozenset({2, 5, 6})
"""AVCOL_SPC numbers that DALI's conversion is right for; 2, unspecified, is read so by FFmpeg."""

LUMA_WEIGHTS: dict[int, tuple[float, float]] = {
    1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593),
}  # fmt: skip
"""Shares of red and blue in luma, by AVCOL_SPC number: ITU-T H.273, table 4."""

MOST_BYTES = 1 << 30
"""Decoded pixel frames that stand side by side in memory."""

MOST_FILE_BYTES = 1 << 28
"""A larger file is not handed to DALI, which takes files whole; PyAV seeks in it."""

_REFUSALS = 3
"""A codec of which DALI has refused so many files and decoded none is not offered again."""


class Decoder:
    """Runs clips of one size through DALI. The graphs are built when first needed."""

    def __init__(
        self, dtype: torch.dtype, backend: Backend, most: int, num_threads: int,
        folder: Path | None = None,
    ) -> None:  # fmt: skip
        """ValueError for a GPU that is not there; ImportError, saying what to install.

        `folder`: where clips are noted while DALI has them, so that none kills two processes.
        """
        self._import_dali()
        if backend == "gpu" and not torch.cuda.is_available():
            raise ValueError("backend 'gpu' needs a CUDA device, there is none: use 'cpu'")
        self.dtype, self.backend = dtype, backend
        self.most, self.num_threads = most, num_threads
        self.decoded: dict[FrontEnd, int] = {"native": 0, "frames": 0}
        """Clips that each front end has made."""
        self._graphs: dict[FrontEnd, Any] = {}
        self._notes = None if folder is None else InFlight(folder, backend)
        self._refused = set() if self._notes is None else self._notes.refused()
        self._by_codec: dict[str, tuple[int, int]] = {}
        self._codecs = _native_codecs(backend)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")

    def decode(self, clips: Sequence[FileClip]) -> tuple[Tensor, dict[int, str]]:
        """`video_BCFHW` in the order of `clips`; and the reason of each row that failed.

        Failed rows are left out of the tensor. It is DALI's own memory where one graph made all.
        One thread at a time; others wait.
        """
        with self._lock:
            return self._decode(clips)

    def _decode(self, clips: Sequence[FileClip]) -> tuple[Tensor, dict[int, str]]:
        rows: dict[FrontEnd, list[int]] = {}
        for row, clip in enumerate(clips):
            rows.setdefault(self._front_end(clip), []).append(row)
        parts: list[Tensor] = []
        placed: list[int] = []
        failed: dict[int, str] = {}
        for front_end, chosen in rows.items():
            for some in self._chunks(chosen, clips):
                made, bad = self._run(front_end, [clips[row] for row in some])
                failed |= {some[place]: reason for place, reason in bad.items()}
                if made is not None:
                    parts.append(made)
                    placed += [row for place, row in enumerate(some) if place not in bad]
        if not parts:
            return torch.empty(0), failed
        if len(parts) == 1:
            return parts[0], failed
        return torch.cat(parts)[torch.tensor(placed).argsort().to(parts[0].device)], failed

    def _chunks(self, rows: Sequence[int], clips: Sequence[FileClip]) -> Iterator[list[int]]:
        """Rows that go through a graph together."""
        held: list[int] = []
        total = 0
        for row in rows:
            clip = clips[row]
            size = len(clip.frames) * clip.file.height * clip.file.width * 3
            if held and (len(held) == self.most or total + size > MOST_BYTES):
                yield held
                held, total = [], 0
            held.append(row)
            total += size
        yield held

    def _front_end(self, clip: FileClip) -> FrontEnd:
        """What DALI decodes as it should: see docs/data.md."""
        file = clip.file
        refused, decoded = self._by_codec.get(file.codec, (0, 0))
        known = (
            file.codec in self._codecs and file.pixel_format in NATIVE_FORMATS[self.backend]
            and file.indexed and not any(file.turn) and file.size <= MOST_FILE_BYTES
            and (file.matrix in BT601 or (self.backend == "gpu" and file.matrix in LUMA_WEIGHTS))
            and not (self.backend == "gpu" and (file.height % 2 or file.width % 2))
            and (str(file.path), file.offset) not in self._refused
            and (decoded > 0 or refused < _REFUSALS)
        )  # fmt: skip
        return "native" if known else "frames"

    def _run(
        self, front_end: FrontEnd, clips: Sequence[FileClip]
    ) -> tuple[Tensor | None, dict[int, str]]:
        if front_end == "frames":
            return self._run_frames(clips)
        try:
            samples = list(self._pool.map(_bytes, clips))
            with nullcontext() if self._notes is None else self._notes.holding(clips):
                video_BCFHW = self._feed("native", samples, clips)
        except (RuntimeError, OSError) as error:  # one bad sample spoils DALI's batch and its graph
            self._graphs.pop("native", None)
            return self._apart(clips, error)
        for clip in clips:
            refused, decoded = self._by_codec.get(clip.file.codec, (0, 0))
            self._by_codec[clip.file.codec] = refused, decoded + 1
        return _recoloured(video_BCFHW, [clip.file for clip in clips]), {}

    def try_native(self, clip: FileClip) -> None:
        """Give a clip to DALI for what that does to this process. What it raises is no matter."""
        try:
            self._feed("native", [_bytes(clip)], [clip])
        except (RuntimeError, OSError):
            self._graphs.clear()

    def _apart(
        self, clips: Sequence[FileClip], error: Exception
    ) -> tuple[Tensor | None, dict[int, str]]:
        """The clips of a batch that DALI refused, one by one; what it refuses alone, by PyAV."""
        if len(clips) == 1:
            file = clips[0].file
            logger.warning("DALI refuses %s, PyAV decodes it", file.name or file.path)
            logger.debug("%s", error)
            self._refused.add((str(file.path), file.offset))
            refused, decoded = self._by_codec.get(file.codec, (0, 0))
            self._by_codec[file.codec] = refused + 1, decoded
            return self._run_frames(clips)
        parts, failed = [], {}
        for place, clip in enumerate(clips):
            made, bad = self._run(self._front_end(clip), [clip])
            if bad:
                failed[place] = bad[0]
            if made is not None:
                parts.append(made)
        return (torch.cat(parts) if parts else None), failed

    def _run_frames(self, clips: Sequence[FileClip]) -> tuple[Tensor | None, dict[int, str]]:
        found = list(self._pool.map(self._frames, clips))
        failed = {row: video for row, video in enumerate(found) if isinstance(video, str)}
        samples = [video for video in found if not isinstance(video, str)]
        whole = [clip for row, clip in enumerate(clips) if row not in failed]
        return (self._feed("frames", samples, whole) if whole else None), failed

    def _frames(self, clip: FileClip) -> NDArray[np.uint8] | str:
        """A clip's pixel frames by PyAV in another process; or why there are none."""
        file = clip.file
        wanted = (file.pts[clip.frames] if file.timed else clip.frames).tolist()
        try:
            return workers(self.num_threads).frames(
                file.path, file.offset, file.size, wanted, timed=file.timed, turn=file.turn
            )
        except ValueError as error:
            return str(error)

    def _feed(
        self, front_end: FrontEnd, samples: list[NDArray[np.uint8]], clips: Sequence[FileClip]
    ) -> Tensor:
        if front_end not in self._graphs:
            self._graphs[front_end] = self._build(front_end)
        graph = self._graphs[front_end]
        graph.feed_input("samples", samples)
        graph.feed_input("roi", [np.array(clip.roi, np.float32) for clip in clips])
        graph.feed_input("size", [np.array(clip.size, np.float32) for clip in clips])
        if front_end == "native":
            graph.feed_input("chosen", [clip.frames.astype(np.int32) for clip in clips])
        (output,) = graph.run()
        video_BCFHW: Tensor = from_dlpack(output.as_tensor())
        self.decoded[front_end] += len(clips)
        return video_BCFHW

    def _build(self, front_end: FrontEnd) -> Any:
        """Samples -> pixel frames [F, H, W, C] -> crop, resize -> [C, F, H, W], normalised."""
        dali, fn, types = self._import_dali()
        gpu = self.backend == "gpu"
        graph = dali.Pipeline(
            batch_size=self.most, num_threads=self.num_threads, prefetch_queue_depth=1,
            device_id=torch.cuda.current_device() if gpu else None,
        )  # fmt: skip
        with graph:
            if front_end == "native":
                video = fn.decoders.video(
                    fn.external_source(name="samples", dtype=types.UINT8, ndim=1),
                    device="mixed" if gpu else "cpu",
                    frames=fn.external_source(name="chosen", dtype=types.INT32, ndim=1),
                )
            else:
                frames = fn.external_source(name="samples", dtype=types.UINT8, layout="FHWC")
                video = frames.gpu() if gpu else frames
            roi = fn.external_source(name="roi", dtype=types.FLOAT, ndim=2)
            video = fn.resize(
                video, size=fn.external_source(name="size", dtype=types.FLOAT, ndim=1),
                roi_start=roi[0], roi_end=roi[1], interp_type=types.INTERP_LINEAR, antialias=True,
            )  # fmt: skip
            if self.dtype == torch.uint8:
                video = fn.transpose(video, perm=[3, 0, 1, 2])
            else:
                video = fn.crop_mirror_normalize(
                    video, dtype=types.FLOAT, mean=[127.5] * 3, std=[127.5] * 3,
                    output_layout="CFHW",
                )  # fmt: skip
            graph.set_outputs(video)
        graph.build()
        return graph

    @staticmethod
    def _import_dali() -> tuple[Any, Any, Any]:
        try:
            from nvidia import dali
            from nvidia.dali import fn, types
        except ImportError as error:
            raise ImportError(
                "videos are decoded by NVIDIA DALI, which is not installed: `make venv`, or "
                "`pip install nvidia-dali-cuda130`, which this package requires"
            ) from error
        return dali, fn, types


def _bytes(clip: FileClip) -> NDArray[np.uint8]:
    file = clip.file
    return np.fromfile(file.path, np.uint8, count=file.size, offset=file.offset)


def _native_codecs(backend: Backend) -> frozenset[str]:
    """Without AV1 on GPUs that have no decoder for it: those before 8.6, and 9.0 (Hopper)."""
    found = NATIVE_CODECS[backend]
    if backend == "gpu":
        capability = torch.cuda.get_device_capability()
        if capability < (8, 6) or capability == (9, 0):
            found -= {"av1"}
    return found


def to_bt601_inverse(matrix: int) -> Tensor:
    """[3, 3] from RGB that was read as BT.601 to what the AVCOL_SPC number `matrix` says."""
    return _to_rgb(*LUMA_WEIGHTS[matrix]) @ _to_rgb(*LUMA_WEIGHTS[5]).inverse()


def _to_rgb(red: float, blue: float) -> Tensor:
    """[3, 3] from (Y, Cb, Cr) to RGB for shares `red` and `blue` of luma. ITU-T H.273, 8.3."""
    green = 1 - red - blue
    cb, cr = 2 * (1 - blue), 2 * (1 - red)
    return torch.tensor(
        [[1, 0, cr], [1, -cb * blue / green, -cr * red / green], [1, cb, 0]], dtype=torch.float64
    )


def _recoloured(video_BCFHW: Tensor, files: Sequence[VideoFile]) -> Tensor:
    """Undo that DALI reads every file as BT.601, as far as nothing was cut off at 0 and 255."""
    if all(file.matrix in BT601 for file in files):
        return video_BCFHW
    identity = torch.eye(3, dtype=torch.float64)
    matrix_BCC = torch.stack(
        [identity if f.matrix in BT601 else to_bt601_inverse(f.matrix) for f in files]
    ).to(video_BCFHW.device, torch.float32)
    video = torch.einsum("bcd,bdfhw->bcfhw", matrix_BCC, video_BCFHW.float())
    if video_BCFHW.dtype == torch.uint8:
        return video.round().clamp(0, 255).byte()
    return video.clamp(-1, 1)
