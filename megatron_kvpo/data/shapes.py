"""Write the shapes world to disk: captioned videos for pre-training, prompts for the rest."""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Literal

import av
import numpy as np
from numpy.typing import NDArray

from megatron_kvpo.records import Prompt
from megatron_kvpo.world import (
    PIXEL_FPS,
    Scene,
    pixel_start,
    render,
    sample_scene,
    scene_from_texts,
)

Codec = Literal["vp9", "h264"]

MANIFEST = "manifest.jsonl"
SWITCH_MULTIPLE = 3
"""Segments begin at latent frames that are multiples of this: the block of the generator."""

MIN_SEGMENT_FRAMES = 6
MAX_SEGMENTS = 4

_ENCODERS = {
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "crf": "10", "b": "0"}),
    "h264": ("libx264", {"preset": "ultrafast", "crf": "10"}),
}
_SMALLEST_BATCH = 16


def draw_scene(seed: int, index: int, num_latent_frames: int = 21) -> tuple[Scene, tuple[int, ...]]:
    """Scene number `index` of a seed, and the latent frames at which its segments switch.

    1 to 4 segments, as many as fit at 6 latent frames each. The same arguments give the same scene.
    """
    rng = np.random.default_rng([seed, index])
    switches = _draw_switches(rng, num_latent_frames)
    scene = sample_scene(
        int(rng.integers(2**63)), pixel_start(num_latent_frames), [pixel_start(s) for s in switches]
    )
    return scene, switches


def _draw_switches(rng: np.random.Generator, num_latent_frames: int) -> tuple[int, ...]:
    """Cut a video into segments at multiples of 3, every way of cutting equally likely."""
    units = num_latent_frames // SWITCH_MULTIPLE
    least = MIN_SEGMENT_FRAMES // SWITCH_MULTIPLE
    if units < least:
        raise ValueError(
            f"num_latent_frames {num_latent_frames} is below {MIN_SEGMENT_FRAMES}, one segment"
        )
    num_segments = int(rng.integers(1, min(MAX_SEGMENTS, units // least) + 1))
    spare = units - num_segments * least
    cuts = np.sort(rng.permutation(spare + num_segments - 1)[: num_segments - 1])
    extra = cuts - np.arange(num_segments - 1)  # spare units before each switch
    return tuple(int(SWITCH_MULTIPLE * (least * (i + 1) + e)) for i, e in enumerate(extra.tolist()))


def write_dataset(
    folder: Path,
    count: int,
    seed: int,
    *,
    num_latent_frames: int = 21,
    codec: Codec = "vp9",
    size: int = 32,
    workers: int = 1,
) -> Path:
    """Write `count` captioned videos and their manifest; returns the manifest's path.

    The videos are 4:4:4 at `size` x `size`, `00000.mp4` and on, 4L - 3 pixel frames each. A line of
    the manifest: {"file", "segments", "switch_frames" (latent), "fps", "num_pixel_frames"}.
    The folder appears when it is whole, and not before.

    Raises:
        ValueError: nothing to write, unknown codec, or the folder exists already.
    """
    if codec not in _ENCODERS:
        raise ValueError(f"codec {codec!r} is unknown: choose one of {sorted(_ENCODERS)}")
    if count < 1 or workers < 1:
        raise ValueError(f"count {count} and workers {workers} must be 1 or more")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: delete it or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write = functools.partial(
            _write_range, partial, seed, num_latent_frames=num_latent_frames, codec=codec, size=size
        )
        rows = list(_in_order(write, count, workers))
        _write_lines(partial / MANIFEST, rows)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / MANIFEST


def _in_order(
    write: functools.partial[list[dict[str, object]]], count: int, workers: int
) -> Iterator[dict[str, object]]:
    """Rows 0 .. count - 1, made by `workers` processes."""
    step = max(_SMALLEST_BATCH, math.ceil(count / (4 * workers)))
    ranges = [range(start, min(start + step, count)) for start in range(0, count, step)]
    if workers == 1 or len(ranges) == 1:
        for part in ranges:
            yield from write(part)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(ranges)), mp_context=context) as pool:
        for rows in pool.map(write, ranges):
            yield from rows


def _write_range(
    folder: Path, seed: int, indices: range, *, num_latent_frames: int, codec: Codec, size: int
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for index in indices:
        scene, switches = draw_scene(seed, index, num_latent_frames)
        rows.append(_write_scene(folder, index, scene, switches, codec, size))
    return rows


def _write_scene(
    folder: Path, index: int, scene: Scene, switches: Sequence[int], codec: Codec, size: int
) -> dict[str, object]:
    name = f"{index:05d}.mp4"
    write_video(folder / name, render(scene, size), codec=codec)
    return {"file": name, "segments": scene.captions, "switch_frames": list(switches),
            "fps": PIXEL_FPS, "num_pixel_frames": scene.num_pixel_frames}  # fmt: skip


def write_prompt_videos(
    folder: Path, prompts: Sequence[Prompt], num_latent_frames: int, *, codec: Codec = "vp9",
    size: int = 32,
) -> None:  # fmt: skip
    """What each prompt asks for, as a real video: `00000.mp4` and on, and their manifest.

    The folder is replaced if it is there.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = []
    for index, prompt in enumerate(prompts):
        starts = [0, *(pixel_start(frame) for frame in prompt.switch_frames)]
        scene = scene_from_texts(prompt.segments, starts, pixel_start(num_latent_frames))
        rows.append(_write_scene(folder, index, scene, prompt.switch_frames, codec, size))
    _write_lines(folder / MANIFEST, rows)


def write_continuations(
    path: Path, count: int, seed: int, given_frames: int, *, num_latent_frames: int = 21,
    exclude: Collection[str] = frozenset(), codec: Codec = "vp9", size: int = 32,
) -> list[str]:  # fmt: skip
    """Write prompts that continue videos, and these videos beside them; their `prompt_text`s.

    Each is a scene that switches at latent frame `given_frames`; the video ends there. A line:
    {"segments", "switch_frames", "video": "<path's stem>/00000.mp4", "video_frames"}. For seed and
    exclude see `write_prompts`. ValueError for a folder of videos that is there already.
    """
    folder = path.with_suffix("")
    if folder.exists():
        raise ValueError(f"{folder} exists: delete it or choose another name")
    folder.mkdir(parents=True)
    rows: dict[str, dict[str, object]] = {}
    for index in range(200 * count):
        scene, switches = draw_scene(seed, index, num_latent_frames)
        text = prompt_text(scene.captions)
        if len(rows) == count or given_frames not in switches or text in rows or text in exclude:
            continue
        name = f"{len(rows):05d}.mp4"
        frames_FHWC = render(scene, size)[: pixel_start(given_frames)]
        write_video(folder / name, frames_FHWC, codec=codec)
        rows[text] = {"segments": scene.captions, "switch_frames": list(switches),
                      "video": f"{folder.name}/{name}", "video_frames": given_frames}  # fmt: skip
    if len(rows) < count:
        raise ValueError(
            f"found only {len(rows)} of {count} scenes that switch at latent frame {given_frames}: "
            f"ask for fewer, or a multiple of {SWITCH_MULTIPLE}"
        )
    _write_lines(path, list(rows.values()))
    return list(rows)


def write_video(path: Path, frames_FHWC: NDArray[np.uint8], *, codec: Codec = "vp9") -> None:
    """Encode uint8 RGB pixel frames at 16 a second, in one thread, colour at full resolution."""
    encoder, options = _ENCODERS[codec]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=PIXEL_FPS, options=dict(options))
        if not isinstance(stream, av.VideoStream):
            raise ValueError(f"{encoder} makes no video stream: choose a video codec")
        stream.height, stream.width = frames_FHWC.shape[1:3]
        stream.pix_fmt = "yuv444p"
        stream.codec_context.thread_count = 1
        for frame in frames_FHWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def prompt_text(segments: Sequence[str]) -> str:
    """One line for all segments of a prompt: what `write_prompts(exclude=...)` compares."""
    return "; then ".join(segments)


def write_prompts(
    path: Path,
    count: int,
    seed: int,
    *,
    num_latent_frames: int = 21,
    min_segments: int = 1,
    exclude: Collection[str] = frozenset(),
) -> list[str]:
    """Write `count` distinct prompts without videos; returns their `prompt_text`s.

    A line: {"segments": [...], "switch_frames": [...]} in latent frames. The file appears whole.

    Args:
        path: the JSONL file to write.
        count: prompts.
        seed: the prompts are a function of it (and of `exclude`).
        num_latent_frames: length of the videos that the prompts are for.
        min_segments: leave out prompts of fewer segments; 2 keeps those that switch.
        exclude: `prompt_text`s that may not occur, those of the training prompts for example.

    Raises:
        ValueError: the world has too few texts outside `exclude`.
    """
    path = Path(path)
    if count < 1:
        raise ValueError(f"count {count} must be 1 or more")
    rows: dict[str, dict[str, object]] = {}
    for index in range(20 * count + 1000):
        scene, switches = draw_scene(seed, index, num_latent_frames)
        segments = scene.captions
        text = prompt_text(segments)
        if len(segments) >= min_segments and text not in exclude and text not in rows:
            rows[text] = {"segments": segments, "switch_frames": list(switches)}
        if len(rows) == count:
            break
    else:
        raise ValueError(f"found only {len(rows)} of {count} new prompts: ask for fewer")
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_lines(path, list(rows.values()))
    return list(rows)


def _write_lines(path: Path, rows: Sequence[dict[str, object]]) -> None:
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(partial, path)
