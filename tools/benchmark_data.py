"""Pixel frames a second that clips at training size come at: this package, PyAV, torchcodec.

    python -m tools.benchmark_data --output data.json [--backend gpu] [--consumes 40]

Writes a few clips of each codec to --folder (kept and used again), then draws random clips from
them with each reader in turn, in one run. Writes the JSON and a Markdown table, anew after every
turn; what fails is noted there. Code 1 if this package's reader or a whole codec did.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from tools import benchmark_clips, benchmark_report, provenance
from tools.benchmark_kernels import median

logger = log.get_logger("megatron_kvpo.tools.benchmark_data")

_MODULE = "tools.benchmark_data"
_REORDERED = 8
"""Pixel frames by which a file's index, in the order of decoding, may be off from what is shown."""

_OWN = "megatron_kvpo"
_LONGEST = 300
"""Characters of an error in a note."""

_FAILURES = (
    av.error.FFmpegError, RuntimeError, OSError, ValueError, LookupError, TypeError, AttributeError,
    ImportError,
)  # fmt: skip
"""What readers and their libraries raise."""

Read = Callable[[FileClip], Tensor]
Save = Callable[[dict[str, Any]], None]
Time = Callable[[int, int], float]
"""Seconds for so many batches (second) from a step (first) on."""


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

    def save(found: dict[str, Any]) -> None:
        provenance.write_json(found, options.output)
        options.output.with_suffix(".md").write_text(table(found))

    found = measure(options, save)
    return 1 if any(note["reader"] in ("", _OWN) for note in found["notes"]) else 0


def measure(options: argparse.Namespace, save: Save) -> dict[str, Any]:
    """The record of every codec and reader, given to `save` whenever it grows.

    What fails becomes one of its notes, and the others are measured.
    """
    found = _head(options)
    notes = found["notes"]
    save(found)
    folders, errors = benchmark_clips.write(options)
    for codec, error in errors.items():
        logger.error("%s is not measured", codec, exc_info=error)
        notes.append(_note(codec, "", f"not measured, not written: {_line(error)}"))
    samples = [path for folder in folders.values() for path in sorted(folder.glob("0.*"))]
    others = _others(options, samples[0], notes) if samples else {}
    with ThreadPoolExecutor(options.threads) as pool:
        for codec, folder in folders.items():
            _measure_codec(codec, folder, others, pool, options, found, save)
            found["load"].append(round(os.getloadavg()[0], 1))
    save(found)
    return found


def _measure_codec(
    codec: str, folder: Path, others: Mapping[str, Read], pool: ThreadPoolExecutor,
    options: argparse.Namespace, found: dict[str, Any], save: Save,
) -> None:  # fmt: skip
    """Add a row a reader."""
    clip = ClipSpec(num_pixel_frames=options.clip_frames, size=tuple(options.size), start="random")
    before, notes = found["rows"], found["notes"]
    try:
        pipeline = VideoPipeline(
            folder, clip, batch_size=options.batch, backend=options.backend,
            num_threads=options.threads,
        )  # fmt: skip
    except _FAILURES as error:
        logger.exception("%s is not measured", codec)
        notes.append(_note(codec, "", f"not measured: {_line(error)}"))
        return
    readers: dict[str, Time] = {
        _OWN: lambda step, count: _drain(pipeline.batches(step), count),
        **{name: partial(_timed, pipeline, read, pool, options) for name, read in others.items()},
    }
    for spans in _turns(codec, readers, options, notes):
        front_ends = {_OWN: _used(pipeline)}
        found["rows"] = before + [
            _row(codec, name, options, spans[name], front_ends.get(name, ""))
            for name in readers if spans[name]
        ]  # fmt: skip
        save(found)
    for row in found["rows"][len(before) :]:
        rate = row["median_frames_per_s"]
        logger.info("%s %s: %.0f pixel frames a second", codec, row["reader"], rate)


def _head(options: argparse.Namespace) -> dict[str, Any]:
    """A record without rows."""
    versions = {name: _version(name) for name in ("av", "nvidia-dali-cuda130", "torchcodec")}
    made = provenance.made_by(_MODULE, 1)
    return {
        "name": options.output.stem, **made, "versions": {**made["versions"], **versions},
        "config": {key: str(value) if isinstance(value, Path) else value
                   for key, value in vars(options).items()},
        "load": [round(os.getloadavg()[0], 1)], "rows": [], "notes": [],
    }  # fmt: skip


def _turns(
    codec: str, readers: Mapping[str, Time], options: argparse.Namespace,
    notes: list[dict[str, str]],
) -> Iterator[dict[str, list[float]]]:  # fmt: skip
    """Seconds of each reader so far, after every turn and every failure.

    They take turns, so that a busy moment of the machine is shared. One that fails is left out from
    then on, and noted.
    """
    spans: dict[str, list[float]] = {name: [] for name in readers}
    left = dict(readers)
    for turn in range(-1, options.repeats):
        for name, time_from in list(left.items()):
            try:
                if turn < 0:  # warms up
                    time_from(0, 1)
                else:
                    spans[name].append(time_from((turn + 1) * options.batches, options.batches))
            except _FAILURES as error:
                logger.exception("%s %s failed", codec, name)
                timings = f"after {len(spans[name])} of {options.repeats} timings"
                notes.append(_note(codec, name, f"failed {timings}: {_line(error)}"))
                del left[name]
                yield spans
        yield spans


def _used(pipeline: VideoPipeline) -> str:
    return " + ".join(name for name, count in pipeline.decoder.decoded.items() if count)


def _note(codec: str, reader: str, text: str) -> dict[str, str]:
    """`reader` is empty for all of a codec, `codec` for all of a reader."""
    return {"codec": codec, "reader": reader, "note": text}


def _line(error: BaseException) -> str:
    """What an error says, as one line of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_LONGEST]


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
    return row


def _drain(stream: Iterator[Any], count: int) -> float:
    """Seconds from the opening of the endless stream on, nothing decoded before."""
    with contextlib.closing(stream):  # type: ignore[type-var]
        started = time.perf_counter()
        for _ in itertools.islice(stream, count):
            _finish()
        return time.perf_counter() - started


def _timed(
    pipeline: VideoPipeline, read: Read, pool: ThreadPoolExecutor, options: argparse.Namespace,
    step: int, count: int,
) -> float:  # fmt: skip
    """Seconds of a reader, a thread a clip, for clips drawn in the same manner.

    All threads have work, also where a batch has fewer clips: they read ahead.
    """
    files = pipeline.report.good
    clips = [
        cut(files[n % len(files)], pipeline.clip, 0, n)
        for n in range(step * options.batch, (step + count) * options.batch)
    ]
    started = time.perf_counter()
    made = pool.map(read, clips)
    for _ in range(count):
        torch.stack(list(itertools.islice(made, options.batch)))
        _finish()
    return time.perf_counter() - started


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _others(
    options: argparse.Namespace, sample: Path, notes: list[dict[str, str]]
) -> dict[str, Read]:
    """PyAV alone on the CPU, and torchcodec if it is installed and loads.

    On backend gpu torchcodec decodes there if it can decode `sample` so, else on the CPU.
    """
    target = _target(options)
    found: dict[str, Read] = {"PyAV": lambda clip: _by_pyav(clip).to(target)}
    try:
        from torchcodec.decoders import VideoDecoder
        from torchcodec.transforms import CenterCrop, Resize
    except _FAILURES as error:
        text = f"left out, it is not installed or does not load: {_line(error)}"
        notes.append(_note("", "torchcodec", text))
        if not isinstance(error, ImportError):
            logger.exception("torchcodec does not load")
        return found
    name, device = "torchcodec", "cuda" if options.backend == "gpu" else "cpu"
    if device == "cuda" and (reason := _no_cuda(VideoDecoder, sample, notes)):
        name, device = f"torchcodec (CPU: {reason})", "cpu"

    def by_torchcodec(clip: FileClip) -> Tensor:
        (top, left), (bottom, right) = clip.roi
        shown = round(bottom) - round(top), round(right) - round(left)
        own = [] if device == "cuda" else [CenterCrop(shown), Resize(clip.size)]
        decoder = VideoDecoder(
            str(clip.file.path), device=device, num_ffmpeg_threads=1, transforms=own
        )
        video: Tensor = decoder.get_frames_at(clip.frames.tolist()).data.float()
        if not own:
            video = video[:, :, round(top) : round(bottom), round(left) : round(right)]
            video = interpolate(video, clip.size, mode="bilinear", antialias=True)
        return (video.transpose(0, 1) / 127.5 - 1).to(target)

    return {**found, name: by_torchcodec}


def _target(options: argparse.Namespace) -> torch.device:
    """Where clips are wanted."""
    return torch.device("cuda" if options.backend == "gpu" else "cpu")


def _no_cuda(decoder: Callable[..., Any], sample: Path, notes: list[dict[str, str]]) -> str:
    """Why torchcodec decodes nothing on CUDA, noted; "" if it does."""
    try:
        decoder(str(sample), device="cuda", num_ffmpeg_threads=1).get_frames_at([0])
    except _FAILURES as error:
        built = "unsupported device" not in str(error).lower()
        reason = "it fails on CUDA" if built else "this build has no CUDA"
        logger.exception("torchcodec is measured on the CPU: %s", reason)
        text = f"measured on the CPU, because {reason}: {_line(error)}"
        notes.append(_note("", "torchcodec", text))
        return reason
    return ""


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
    if found["notes"]:
        lines.append("")
    for note in found["notes"]:
        about = ", ".join(filter(None, (note["codec"], note["reader"])))
        lines.append(f"- {about}: {note['note']}")
    return "\n".join(lines) + "\n"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="a .json file")
    parser.add_argument("--backend", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_data"))
    parser.add_argument(
        "--codecs", nargs="+", choices=benchmark_clips.ENCODERS, default=[*benchmark_clips.ENCODERS]
    )
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
