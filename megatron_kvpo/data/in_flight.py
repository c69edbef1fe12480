"""What DALI had in hand when its process died, and whether that was the death of it.

A fault inside DALI's decoder ends its process, and would end the next one at the same clip. So each
process notes what it gives to DALI. Whoever starts next tries the clips that a dead one left noted,
in a process of their own, and what ends that one is PyAV's from then on. A run that died of
something else thus goes on as it would have.
"""

from __future__ import annotations

import fcntl
import functools
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_kvpo.data.clips import FileClip
from megatron_kvpo.data.probe import whole_rows
from megatron_kvpo.data.workers import Worker, serve

logger = logging.getLogger(__name__)

FOLDER = ".dali"
CRASHED = "crashed.jsonl"
PATIENCE_S = 300.0
"""A trial that takes longer hangs."""

Key = tuple[str, int]
"""Path and offset of a video."""


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class _Clip:
    """As much of a FileClip as DALI's graph reads."""

    file: _File
    frames: NDArray[np.int64]
    roi: tuple[tuple[float, float], tuple[float, float]]
    size: tuple[int, int]


class InFlight:
    """The notes of one process on what it gives to DALI, beside a source's probes."""

    def __init__(self, folder: Path, backend: str) -> None:
        """Nothing is written before the first `holding`."""
        self._folder, self._backend = folder / FOLDER, backend
        self._notes: TextIO | None = None
        self._tried = False

    def refused(self) -> set[Key]:
        """Videos that DALI died of, as they stand. Tries what dead processes have left.

        Processes of one machine that ask together wait for the first.
        """
        if not self._folder.is_dir():
            return set()
        try:
            with self._alone():
                crashed = self._folder / CRASHED
                for clip, reason in _tried(_left_behind(self._folder, self._backend)):
                    logger.warning("DALI %s at %s: PyAV decodes it from now on", reason,
                                   clip["path"])  # fmt: skip
                    with crashed.open("a") as out:
                        out.write(json.dumps({"reason": reason, **clip}) + "\n")
                return {
                    (row["path"], row["offset"])
                    for row in _rows(crashed)
                    if row["backend"] == self._backend and _as_noted(row)
                }
        except OSError as error:
            logger.warning("notes on what DALI decodes are not read (%s)", error)
            return set()

    @contextmanager
    def holding(self, clips: Sequence[FileClip]) -> Iterator[None]:
        """Inside, these clips are in DALI's hands."""
        notes = self._opened()
        if notes is not None:
            notes.write("".join(json.dumps(_noted(c, self._backend)) + "\n" for c in clips))
            notes.flush()
        try:
            yield
        finally:
            if notes is not None:
                notes.seek(0)
                notes.truncate()

    def _opened(self) -> TextIO | None:
        """Locked as long as this process lives, by which others know that it does."""
        if not self._tried:
            self._tried = True
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                with self._alone():
                    path = self._folder / f"{os.getpid()}-{uuid4().hex[:8]}.notes"
                    self._notes = path.open("w")
                    fcntl.flock(self._notes, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                logger.warning("what DALI decodes is not noted (%s): give `cache` a folder", error)
        return self._notes

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, no other process of this machine looks for notes or begins some."""
        with (self._folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _noted(clip: FileClip, backend: str) -> dict[str, Any]:
    file = clip.file
    return {
        "backend": backend, "path": str(file.path), "offset": file.offset, "bytes": file.size,
        "mtime_ns": file.path.stat().st_mtime_ns, "frames": clip.frames.tolist(),
        "roi": [list(map(float, corner)) for corner in clip.roi], "size": list(clip.size),
    }  # fmt: skip


def _as_noted(row: dict[str, Any]) -> bool:
    """Whether the file is what it was."""
    with suppress(OSError):
        return bool(Path(row["path"]).stat().st_mtime_ns == row["mtime_ns"])
    return False


def _rows(path: Path) -> list[dict[str, Any]]:
    return list(whole_rows(path.read_text().splitlines())) if path.exists() else []


def _left_behind(folder: Path, backend: str) -> list[dict[str, Any]]:
    """Clips in notes that nobody holds any more. These notes go, of other backends they stay."""
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.notes")):
        with path.open("a") as notes:
            try:
                fcntl.flock(notes, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # its process lives
            rows = _rows(path)
            if all(row["backend"] == backend for row in rows):
                found += filter(_as_noted, rows)
                path.unlink()
    return found


def _tried(clips: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
    """Those of which another process dies, and how."""
    if clips:
        logger.info("trying %d clips that a dead process had in DALI's hands", len(clips))
    worker: Worker | None = None
    try:
        for clip in clips:
            if worker is None or not worker.usable:
                worker = Worker("megatron_kvpo.data.in_flight")
            device = torch.cuda.current_device() if clip["backend"] == "gpu" else None
            worker.ask({**clip, "device": device}, PATIENCE_S)
            if worker.failed:  # nothing about a clip: it could not begin
                logger.warning("clips that a dead process had in DALI's hands cannot be tried: it "
                               "%s", worker.end)  # fmt: skip
                return
            if not worker.usable:
                yield clip, worker.end
    finally:
        if worker is not None:
            worker.close()


def _try(row: dict[str, Any]) -> dict[str, Any]:
    """Have DALI decode a clip, well or not."""
    (top, left), (bottom, right) = row["roi"]
    clip = _Clip(
        _File(Path(row["path"]), row["offset"], row["bytes"]), np.array(row["frames"]),
        ((top, left), (bottom, right)), tuple(row["size"]),
    )  # fmt: skip
    _decoder(row["backend"], row["device"]).try_native(clip)
    return {}


@functools.cache
def _decoder(backend: str, device: int | None) -> Any:
    from megatron_kvpo.data.graph import Decoder  # which imports this module

    if device is not None:
        torch.cuda.set_device(device)
    return Decoder(torch.uint8, backend, 1, 1)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(serve(_try))
