"""Clips at the size and bit rate of training videos, for tools/benchmark_data.py to read."""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch.nn.functional import interpolate

from megatron_kvpo import log

logger = log.get_logger("megatron_kvpo.tools.benchmark_clips")

_FPS = 24
_KEY_FRAMES = {"g": "48"}
ENCODERS = {
    "h264": ("libx264", "mp4", {"preset": "veryfast", "b": "4M", "x264-params": "log-level=0"}),
    "hevc": ("libx265", "mp4", {"preset": "ultrafast", "b": "3M",
                                "x265-params": "log-level=0:keyint=48"}),
    "vp9": ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "8", "b": "3M",
                                   "row-mt": "1"}),
}  # fmt: skip
"""Key frames every two seconds and bit rates as they are common at 720p."""


def write(options: argparse.Namespace) -> tuple[dict[str, Path], dict[str, BaseException]]:
    """Each codec's folder of clips, and why a codec has none.

    Clips not there are written side by side, a thread a clip.
    """
    height, width = options.source
    folders = {
        codec: options.folder / f"{codec}_{height}x{width}_{options.seconds:g}s"
        for codec in options.codecs
    }
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        writing = {
            codec: [pool.submit(_file, codec, folder, n, options) for n in range(options.files)]
            for codec, folder in folders.items()
        }
    errors = {
        codec: error for codec, files in writing.items() for file in files
        if (error := file.exception()) is not None
    }  # fmt: skip
    return {codec: path for codec, path in folders.items() if codec not in errors}, errors


def _file(codec: str, folder: Path, number: int, options: argparse.Namespace) -> None:
    """Write a clip if it is not there."""
    encoder, suffix, settings = ENCODERS[codec]
    path = folder / f"{number}.{suffix}"
    if path.exists():
        return
    logger.info("writing %s", path)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    try:
        _write(unfinished, suffix, encoder, settings, number, options)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


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
