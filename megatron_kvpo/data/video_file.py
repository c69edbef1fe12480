"""Writing a video file while its frames come in."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from torch import Tensor

_OPTIONS = {"preset": "medium", "crf": "16"}


class VideoWriter:
    """An H.264 file that grows by frames. It appears under its name when it is closed, whole.

    with VideoWriter(Path("out.mp4"), fps=16) as writer:
        writer.write(frames_FCHW)
    """

    def __init__(self, path: Path, fps: int, scale: int = 1) -> None:
        """`scale` repeats each pixel that many times both ways. ValueError for another suffix."""
        if path.suffix != ".mp4":
            raise ValueError(f"{path} is no .mp4 file: videos are written as H.264 in mp4")
        if fps < 1 or scale < 1:
            raise ValueError(f"fps {fps} and scale {scale} must be at least 1")
        self.path, self.num_frames = path, 0
        self._scale = scale
        path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = path.with_name(f".{path.stem}.{os.getpid()}.mp4")
        self._container = av.open(str(self._partial), "w")
        self._stream = self._container.add_stream("libx264", rate=fps, options=dict(_OPTIONS))

    def write(self, frames_FCHW: Tensor) -> None:
        """Append RGB pixel frames in [0, 1], any device. ValueError for an odd size."""
        frames = (frames_FCHW.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
        pixels = frames.cpu().numpy().repeat(self._scale, axis=1).repeat(self._scale, axis=2)
        height, width = pixels.shape[1:3]
        if height % 2 or width % 2:
            raise ValueError(f"H.264 needs an even size, frames are {width} x {height}: scale by 2")
        if not self.num_frames:
            self._stream.height, self._stream.width = height, width
            self._stream.pix_fmt = "yuv420p"
        for frame in pixels:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            self._container.mux(self._stream.encode(picture))
        self.num_frames += len(pixels)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.num_frames:
            self._container.mux(self._stream.encode())
        self._container.close()
        if self.num_frames and (error is None or isinstance(error, KeyboardInterrupt)):
            os.replace(self._partial, self.path)
        else:
            self._partial.unlink(missing_ok=True)
