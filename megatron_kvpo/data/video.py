"""Video files to batches of clips, through NVIDIA DALI.

One graph resizes and normalises; what differs is where its pixel frames come from. The `native`
front end decodes inside DALI (on a CPU VP8, VP9 and MJPEG; with backend `gpu` on NVDEC), the
`frames` front end feeds it frames that PyAV decoded (H.264 and the rest on a CPU).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from megatron_kvpo.data.prompts import permutation

logger = logging.getLogger(__name__)

Backend = Literal["cpu", "gpu"]
FrontEnd = Literal["native", "frames"]

MANIFEST = "manifest.jsonl"
NATIVE_CODECS: dict[Backend, frozenset[str]] = {
    "cpu": frozenset({"vp8", "vp9", "mjpeg"}),
    "gpu": frozenset({"vp8", "vp9", "mjpeg", "h264", "hevc", "av1", "mpeg4"}),
}
"""What DALI's own decoder reads. libavcodec's names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSpec:
    """Which pixel frames of each file are taken, and at which size."""

    num_pixel_frames: int
    size: tuple[int, int]
    """Height and width after resizing."""

    start: int = 0
    """First pixel frame taken."""

    stride: int = 1
    """Every stride-th pixel frame is taken."""

    dtype: torch.dtype = torch.float32
    """float32 in [-1, 1], or uint8 in [0, 255]: the same values before normalisation."""

    def __post_init__(self) -> None:
        if min(self.num_pixel_frames, self.stride, *self.size) < 1 or self.start < 0:
            raise ValueError(f"{self}: number, size and stride must be above 0, start at least 0")
        if self.dtype not in (torch.float32, torch.uint8):
            raise ValueError(f"clips of {self.dtype} cannot be had: use float32 or uint8")

    @property
    def needed(self) -> int:
        """Pixel frames that a file must hold."""
        return self.start + self.stride * (self.num_pixel_frames - 1) + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoFile:
    """A file that the probe decoded as far as its clip needs."""

    path: Path
    index: int
    """Its entry's place in the manifest, from 0."""

    codec: str
    height: int
    width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoReport:
    """What the probe found."""

    good: tuple[VideoFile, ...]
    rejected: tuple[tuple[str, str], ...]
    """(file, reason) of each file left out."""

    def summary(self, most: int = 5) -> str:
        """One line: how many files were left out, and the first of them with reasons."""
        total = len(self.good) + len(self.rejected)
        first = "; ".join(f"{file}: {reason}" for file, reason in self.rejected[:most])
        return f"{len(self.rejected)} of {total} videos cannot be used: {first}"


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoBatch:
    """Clips and where they come from."""

    video_BCFHW: Tensor
    """RGB, F pixel frames, float32 in [-1, 1] or uint8."""

    index_B: Tensor
    """Manifest entry of each clip, int64, on the CPU."""


class VideoPipeline:
    """A folder's videos in a seeded order, as batches, from any position on.

    Order: epoch e is a permutation drawn from (seed, e) alone. Every batch_size x world_size
    consecutive videos are one step, of which each rank takes its contiguous share; an epoch's
    last step may be smaller, and leaves out what does not divide over the ranks.
    """

    def __init__(
        self,
        folder: str | Path,
        clip: ClipSpec,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        backend: Backend = "cpu",
        num_threads: int = 2,
    ) -> None:
        """Probes every file named by folder/manifest.jsonl; bad ones are skipped with a warning.

        Raises ValueError if the manifest is missing or ill-formed or no file is usable.
        """
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {world_size}: out of range")
        self.report = probe_folder(Path(folder), clip, num_threads)
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.epoch_number = 0
        self.position = 0
        """Videos of this epoch's order that all ranks together have consumed."""
        self._decoder = _ClipDecoder(clip, backend, min(batch_size, 64), num_threads)

    def __len__(self) -> int:
        """Usable videos."""
        return len(self.report.good)

    def epoch(self) -> Iterator[VideoBatch]:
        """The rest of the current epoch; afterwards the next one is current."""
        order = self._order()
        while self.position < len(order):
            step = order[self.position : self.position + self.batch_size * self.world_size]
            each = len(step) // self.world_size
            mine = step[self.rank * each : (self.rank + 1) * each]
            self.position += len(step)
            last = self.position >= len(order)
            if last:
                self.epoch_number, self.position = self.epoch_number + 1, 0
            if mine:
                files = [self.report.good[i] for i in mine]
                yield VideoBatch(
                    video_BCFHW=self._decoder.decode(files),
                    index_B=torch.tensor([file.index for file in files]),
                )
            if last:
                return

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands after the batches handed out so far."""
        return {"epoch": self.epoch_number, "position": self.position, "videos": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from there. ValueError if the number of usable videos has changed."""
        if state["videos"] != len(self):
            raise ValueError(
                f"the saved position counts {state['videos']} usable videos, the folder now has "
                f"{len(self)}: restore the files, or start the stream anew"
            )
        self.epoch_number, self.position = state["epoch"], state["position"]

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(len(self)))
        return permutation(len(self), "videos", self.seed, self.epoch_number)


def load_videos(pipeline: VideoPipeline) -> Tensor:
    """A whole epoch as one tensor [N, C, F, H, W], in the order of `pipeline.report.good`."""
    rows = {file.index: row for row, file in enumerate(pipeline.report.good)}
    videos = torch.empty(0)
    for batch in pipeline.epoch():
        if not videos.numel():
            videos = batch.video_BCFHW.new_empty((len(rows), *batch.video_BCFHW.shape[1:]))
        videos[[rows[int(index)] for index in batch.index_B]] = batch.video_BCFHW
    return videos


def decode_file(path: str | Path, clip: ClipSpec, backend: Backend = "cpu") -> Tensor:
    """One file through the same graph: `video_CFHW`. ValueError with the file if it is unusable."""
    try:
        file = probe_file(Path(path), clip)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return _ClipDecoder(clip, backend, 1, 1).decode([file])[0]


def probe_folder(folder: Path, clip: ClipSpec, num_threads: int = 2) -> VideoReport:
    """Try every file of the manifest. ValueError with the first reasons if none is usable."""
    entries = _read_manifest(folder / MANIFEST)

    def probe(entry: tuple[int, str]) -> VideoFile | str:
        try:
            return probe_file(folder / entry[1], clip, entry[0])
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(num_threads) as pool:
        found = list(pool.map(probe, entries))
    report = VideoReport(
        good=tuple(file for file in found if isinstance(file, VideoFile)),
        rejected=tuple(
            (name, file) for (_, name), file in zip(entries, found, strict=True)
            if isinstance(file, str)
        ),
    )  # fmt: skip
    if not report.good:
        raise ValueError(f"no usable video in {folder}; {report.summary()}")
    if report.rejected:
        logger.warning("%s", report.summary())
    return report


def probe_file(path: Path, clip: ClipSpec, index: int = 0) -> VideoFile:
    """Decode a file as far as its clip reaches. ValueError with the reason if that fails."""
    if not path.is_file():
        raise ValueError("no such file")
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    count = 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("no video stream in it")
            stream = _single_threaded(container)
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise ValueError(f"pixel frame {count} is corrupt")
                count += 1
                if count == clip.needed:
                    return VideoFile(
                        path=path, index=index, codec=stream.codec_context.name,
                        height=frame.height, width=frame.width,
                    )  # fmt: skip
    except av.FFmpegError as error:
        raise ValueError(f"cannot be decoded past {count} pixel frames ({error})") from error
    raise ValueError(f"too short: {count} pixel frames, {clip.needed} needed")


def _read_manifest(path: Path) -> list[tuple[int, str]]:
    """(place, file name) of each entry."""
    if not path.is_file():
        raise ValueError(f"no manifest at {path}: write one JSON object a line with a key 'file'")
    entries: list[tuple[int, str]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entries.append((len(entries), str(json.loads(line)["file"])))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} line {number}: {line[:80]!r} is no JSON object with a key 'file'"
            ) from error
    return entries


def _single_threaded(container: Any) -> Any:
    """The video stream, decoded on this thread (files are spread over threads), strictly."""
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"err_detect": "explode"}
    return stream


def _read_frames(file: VideoFile, clip: ClipSpec) -> NDArray[np.uint8]:
    """The clip's pixel frames by PyAV, uint8 [F, H, W, 3]."""
    reformatter, frames = VideoReformatter(), []
    with av.open(str(file.path)) as container:
        for count, frame in enumerate(container.decode(_single_threaded(container))):
            if count >= clip.start and (count - clip.start) % clip.stride == 0:
                rgb = reformatter.reformat(frame, format="rgb24", threads=1)
                frames.append(rgb.to_ndarray())
            if count + 1 == clip.needed:
                break
    return np.stack(frames)


class _ClipDecoder:
    """Runs batches of files through DALI. The graphs are built when first needed."""

    def __init__(self, clip: ClipSpec, backend: Backend, most: int, num_threads: int) -> None:
        self.clip, self.backend = clip, backend
        self.most, self.num_threads = most, num_threads
        self._graphs: dict[FrontEnd, Any] = {}
        self._refused: set[Path] = set()
        self._import_dali()

    def decode(self, files: Sequence[VideoFile]) -> Tensor:
        """`video_BCFHW` in the order of `files`; DALI's own memory where one graph made it all."""
        rows: dict[FrontEnd, list[int]] = {}
        for row, file in enumerate(files):
            rows.setdefault(self._front_end(file), []).append(row)
        parts: list[Tensor] = []
        placed: list[int] = []
        for front_end, chosen in rows.items():
            for i in range(0, len(chosen), self.most):
                some = chosen[i : i + self.most]
                parts.append(self._run(front_end, [files[row] for row in some]))
                placed += some
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts)[torch.tensor(placed).argsort().to(parts[0].device)]

    def _front_end(self, file: VideoFile) -> FrontEnd:
        known = file.codec in NATIVE_CODECS[self.backend] and file.path not in self._refused
        return "native" if known else "frames"

    def _run(self, front_end: FrontEnd, files: Sequence[VideoFile]) -> Tensor:
        if front_end == "frames":
            with ThreadPoolExecutor(self.num_threads) as pool:
                return self._feed(
                    "frames", list(pool.map(partial(_read_frames, clip=self.clip), files))
                )
        try:
            return self._feed("native", [np.fromfile(file.path, np.uint8) for file in files])
        except RuntimeError as error:  # one bad sample spoils DALI's batch and its graph
            del self._graphs["native"]
            if len(files) > 1:
                return torch.cat([self._run(self._front_end(file), [file]) for file in files])
            logger.warning("DALI refuses %s, PyAV decodes it", files[0].path)
            logger.debug("%s", error)
            self._refused.add(files[0].path)
            return self._run("frames", files)

    def _feed(self, front_end: FrontEnd, samples: list[NDArray[np.uint8]]) -> Tensor:
        if front_end not in self._graphs:
            self._graphs[front_end] = self._build(front_end)
        graph = self._graphs[front_end]
        graph.feed_input("samples", samples)
        (output,) = graph.run()
        return from_dlpack(output.as_tensor())

    def _build(self, front_end: FrontEnd) -> Any:
        """Samples -> pixel frames [F, H, W, C] -> resize -> [C, F, H, W], normalised or uint8."""
        dali, fn, types = self._import_dali()
        gpu, clip = self.backend == "gpu", self.clip
        graph = dali.Pipeline(
            batch_size=self.most, num_threads=self.num_threads, prefetch_queue_depth=1,
            device_id=torch.cuda.current_device() if gpu else None,
        )  # fmt: skip
        with graph:
            if front_end == "native":
                video = fn.decoders.video(
                    fn.external_source(name="samples", dtype=types.UINT8, ndim=1),
                    device="mixed" if gpu else "cpu", start_frame=clip.start, stride=clip.stride,
                    sequence_length=clip.num_pixel_frames, pad_mode="none",
                )  # fmt: skip
            else:
                frames = fn.external_source(name="samples", dtype=types.UINT8, layout="FHWC")
                video = frames.gpu() if gpu else frames
            video = fn.resize(
                video, size=clip.size, interp_type=types.INTERP_LINEAR, antialias=True
            )
            if clip.dtype == torch.uint8:
                video = fn.transpose(video, perm=[3, 0, 1, 2])
            else:
                video = fn.crop_mirror_normalize(
                    video,
                    dtype=types.FLOAT,
                    mean=[127.5] * 3,
                    std=[127.5] * 3,
                    output_layout="CFHW",
                )
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
