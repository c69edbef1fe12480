"""Pixel frames a second that clips at training size come at: this package, PyAV, torchcodec.

    python -m tools.benchmark_data --output data.json [--backend gpu] [--consumes 40]

Writes a few clips of each codec to --folder (kept and used again), then draws random clips from
them with each reader in turn, in one run. Writes the JSON and a Markdown table.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor
from torch.nn.functional import interpolate

from megatron_kvpo import log
from megatron_kvpo.data.clips import ClipSpec, FileClip, cut
from megatron_kvpo.data.video import VideoPipeline
from tools import benchmark_report, provenance
from tools.benchmark_kernels import median

logger = log.get_logger("megatron_kvpo.tools.benchmark_data")

_MODULE = "tools.benchmark_data"
_FPS = 24
_KEY_FRAMES = {"g": "48"}
_ENCODERS = {
    "h264": ("libx264", "mp4", {"preset": "veryfast", "b": "4M", "x264-params": "log-level=0"}),
    "hevc": ("libx265", "mp4", {"preset": "ultrafast", "b": "3M",
                                "x265-params": "log-level=0:keyint=48"}),
    "vp9": ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "8", "b": "3M",
                                   "row-mt": "1"}),
}  # fmt: skip
"""Key frames every two seconds and bit rates as they are common at 720p."""

_REORDERED = 8
"""Pixel frames by which a file's index, in the order of decoding, may be off from what is shown."""

Read = Callable[[FileClip], Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write. ValueError for options that cannot run so."""
    options = _parse(arguments)
    if options.output.suffix != ".json":
        raise ValueError(f"--output {options.output} must end in .json")
    if min(options.repeats, options.batches, options.batch, options.threads, options.files) < 1:
        raise ValueError("--repeats, --batches, --batch, --threads and --files are 1 or more")
    if options.backend == "gpu" and not torch.cuda.is_available():
        raise ValueError("--backend gpu needs a CUDA device, there is none: use cpu")
    log.setup(True)
    found = measure(options)
    provenance.write_json(found, options.output)
    options.output.with_suffix(".md").write_text(table(found))
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The record of every codec and reader."""
    clip = ClipSpec(num_pixel_frames=options.clip_frames, size=tuple(options.size), start="random")
    rows, load = [], [os.getloadavg()[0]]
    with ThreadPoolExecutor(options.threads) as pool:
        for codec in options.codecs:
            pipeline = VideoPipeline(
                _files(codec, options), clip, batch_size=options.batch, backend=options.backend,
                num_threads=options.threads,
            )  # fmt: skip
            rows += _of_codec(codec, pipeline, pool, options)
            load.append(os.getloadavg()[0])
    versions = {name: _version(name) for name in ("av", "nvidia-dali-cuda130", "torchcodec")}
    made = provenance.made_by(_MODULE, 1)
    return {
        "name": options.output.stem, **made, "versions": {**made["versions"], **versions},
        "config": {key: str(value) if isinstance(value, Path) else value
                   for key, value in vars(options).items()},
        "load": [round(value, 1) for value in load], "rows": rows,
    }  # fmt: skip


def _of_codec(
    codec: str, pipeline: VideoPipeline, pool: ThreadPoolExecutor, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each reader; they take turns, so that a busy moment of the machine is shared."""
    readers: dict[str, Callable[[int], float]] = {
        "megatron_kvpo": lambda step: _drain(pipeline.batches(step), options.batches),
        **{name: partial(_timed, pipeline, read, pool, options)
           for name, read in _others(options).items()},
    }  # fmt: skip
    spans: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(-1, options.repeats):
        for name, time_from in readers.items():
            span = time_from((turn + 1) * options.batches)
            if turn >= 0:  # the first turn warms up
                spans[name].append(span)
    used = [front_end for front_end, count in pipeline.decoder.decoded.items() if count]
    front_ends = {"megatron_kvpo": " + ".join(used)}
    return [_row(codec, name, options, spans[name], front_ends.get(name, "")) for name in readers]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _row(
    codec: str, reader: str, options: argparse.Namespace, spans: list[float], front_end: str
) -> dict[str, Any]:
    frames = options.batches * options.batch * options.clip_frames
    rates = sorted(frames / span for span in spans)
    row: dict[str, Any] = {
        "codec": codec, "reader": reader, "front_end": front_end, "repeats": len(spans),
        "pixel_frames": frames, "min_frames_per_s": rates[0],
        "median_frames_per_s": median(rates), "max_frames_per_s": rates[-1],
    }  # fmt: skip
    if options.consumes:
        row["feeds"] = row["median_frames_per_s"] / options.consumes
    logger.info("%s %s: %.0f pixel frames a second", codec, reader, row["median_frames_per_s"])
    return row


def _drain(stream: Iterator[Any], count: int) -> float:
    """Seconds from the opening of the endless stream on, nothing decoded before."""
    started = time.perf_counter()
    for _ in itertools.islice(stream, count):
        _finish()
    span = time.perf_counter() - started
    stream.close()  # type: ignore[attr-defined]
    return span


def _timed(
    pipeline: VideoPipeline, read: Read, pool: ThreadPoolExecutor, options: argparse.Namespace,
    step: int,
) -> float:  # fmt: skip
    """Seconds of a reader, a thread a clip, for clips drawn in the same manner."""
    files = pipeline.report.good
    clips = [
        cut(files[n % len(files)], pipeline.clip, 0, n)
        for n in range(step * options.batch, (step + options.batches) * options.batch)
    ]
    started = time.perf_counter()
    for start in range(0, len(clips), options.batch):
        torch.stack(list(pool.map(read, clips[start : start + options.batch])))
        _finish()
    return time.perf_counter() - started


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _others(options: argparse.Namespace) -> dict[str, Read]:
    """PyAV alone on the CPU, and torchcodec on the backend if it is installed and loads."""
    device = torch.device("cuda" if options.backend == "gpu" else "cpu")
    found: dict[str, Read] = {"PyAV": lambda clip: _by_pyav(clip).to(device)}
    try:
        from torchcodec.decoders import VideoDecoder
        from torchcodec.transforms import CenterCrop, Resize
    except (ImportError, OSError, RuntimeError) as error:
        logger.info("torchcodec is left out: %s", str(error).strip().splitlines()[:1])
        return found

    def by_torchcodec(clip: FileClip) -> Tensor:
        (top, left), (bottom, right) = clip.roi
        shown = round(bottom) - round(top), round(right) - round(left)
        own = [] if options.backend == "gpu" else [CenterCrop(shown), Resize(clip.size)]
        decoder = VideoDecoder(
            str(clip.file.path), device=str(device), num_ffmpeg_threads=1, transforms=own
        )
        video = decoder.get_frames_at(clip.frames.tolist()).data.float()
        if not own:
            video = video[:, :, round(top) : round(bottom), round(left) : round(right)]
            video = interpolate(video, clip.size, mode="bilinear", antialias=True)
        return video.transpose(0, 1) / 127.5 - 1

    return {**found, "torchcodec": by_torchcodec}


def _by_pyav(clip: FileClip) -> Tensor:
    """Seek, decode, convert and resize with PyAV on this thread, normalise with torch."""
    pts = clip.file.pts
    wanted, ahead = set(pts[clip.frames].tolist()), _REORDERED * int(pts[1] - pts[0])
    last, reformatter, found = max(wanted), VideoReformatter(), []
    height, width = clip.size
    with av.open(str(clip.file.path)) as container:
        stream: Any = container.streams.video[0]
        stream.codec_context.thread_count = 1
        container.seek(max(0, min(wanted) - ahead), stream=stream, backward=True)
        for frame in container.decode(stream):
            if frame.pts in wanted:
                rgb = reformatter.reformat(
                    frame, width, height, "rgb24", interpolation="BILINEAR", threads=1
                )
                found.append(rgb.to_ndarray())
            if frame.pts is not None and frame.pts >= last:
                break
    return torch.from_numpy(np.stack(found)).permute(3, 0, 1, 2).float() / 127.5 - 1


def _files(codec: str, options: argparse.Namespace) -> Path:
    """A folder with the clips of a codec, written if they are not there."""
    height, width = options.source
    folder: Path = options.folder / f"{codec}_{height}x{width}_{options.seconds:g}s"
    encoder, suffix, settings = _ENCODERS[codec]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(options.files):
        path = folder / f"{number}.{suffix}"
        if not path.exists():
            logger.info("writing %s", path)
            partial = path.with_name(f".{path.name}")
            _write(partial, suffix, encoder, settings, number, options)
            partial.replace(path)
    return folder


def _write(
    path: Path, suffix: str, encoder: str, settings: dict[str, str], seed: int,
    options: argparse.Namespace,
) -> None:  # fmt: skip
    """A textured ground that drifts under grain: motion and detail for the encoder to code."""
    height, width = options.source
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((1, 3, height // 16, width // 16), np.float32))
    ground = interpolate(coarse, (2 * height, 2 * width), mode="bicubic")[0].permute(1, 2, 0)
    ground_HWC = (ground * 255).clamp(0, 255).byte().numpy()
    grain_HWC = rng.integers(0, 32, (height, width, 3), np.uint8)
    with av.open(str(path), "w", format="webm" if suffix == "webm" else "mp4") as container:
        stream: Any = container.add_stream(encoder, rate=_FPS, options={**_KEY_FRAMES, **settings})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(round(options.seconds * _FPS)):
            y, x = 2 * number % height, 3 * number % width
            image = ground_HWC[y : y + height, x : x + width] // 2 + 40
            image += np.roll(grain_HWC, 7 * number, axis=1)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def table(found: dict[str, Any]) -> str:
    """One line a codec and reader."""
    config, versions = found["config"], found["versions"]
    height, width = config["source"]
    consumes = config["consumes"]
    lines = [
        f"{benchmark_report.head(found)}Clips of {config['clip_frames']} pixel frames at "
        f"{config['size'][0]} x {config['size'][1]}, float32, drawn at random from {height} x "
        f"{width} files of {config['seconds']:g} s; batches of {config['batch']}, "
        f"{config['threads']} threads, backend {config['backend']}. DALI "
        f"{versions['nvidia-dali-cuda130']}, PyAV {versions['av']}, torchcodec "
        f"{versions['torchcodec']}."
        + f" The machine's load before and after each codec: {found['load']}."
        + (f" Training consumes {consumes:g} pixel frames a second." if consumes else "")
        + "\n",
        "| codec | reader | pixel frames a second: median (min to max) |"
        + (" feeds training so many times over |" if consumes else ""),
        "|---|---|---|" + ("---|" if consumes else ""),
    ]
    for row in found["rows"]:
        rates = [row[f"{name}_frames_per_s"] for name in ("median", "min", "max")]
        reader = row["reader"] + (f" ({row['front_end']})" if row["front_end"] else "")
        line = f"| {row['codec']} | {reader} | {rates[0]:.0f} ({rates[1]:.0f} to {rates[2]:.0f}) |"
        lines.append(line + (f" {row['feeds']:.1f} |" if consumes else ""))
    return "\n".join(lines) + "\n"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="a .json file")
    parser.add_argument("--backend", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_data"))
    parser.add_argument("--codecs", nargs="+", choices=_ENCODERS, default=[*_ENCODERS])
    parser.add_argument("--files", type=int, default=2, help="of each codec")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each file")
    parser.add_argument("--source", type=int, nargs=2, default=[720, 1280], metavar=("H", "W"))
    parser.add_argument("--size", type=int, nargs=2, default=[480, 832], metavar=("H", "W"))
    parser.add_argument("--clip-frames", type=int, default=81, help="pixel frames of a clip")
    parser.add_argument("--batch", type=int, default=2, help="clips")
    parser.add_argument("--batches", type=int, default=3, help="of one timing")
    parser.add_argument("--repeats", type=int, default=3, help="timings, after one batch that "
                        "does not count")  # fmt: skip
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--consumes", type=float, metavar="FRAMES_PER_SECOND",
                        help="pixel frames that training takes, for the table")  # fmt: skip
    return parser.parse_args(arguments)


if __name__ == "__main__":
    log.run_command(main, logger)
