"""Processes that open untrusted files for this one, and are replaced when they die."""

from __future__ import annotations

import functools
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 600.0
"""A decoder that has said nothing for so long is replaced."""


class DecoderDied(ValueError):
    """A file's decoder ended or hung, and was replaced: the file is not to be trusted."""


class Worker:
    """One process of a module that calls `serve`, and the memory file for its pixel frames."""

    def __init__(self, module: str = "megatron_kvpo.data.decode") -> None:
        self._shared = os.memfd_create("pixel-frames")
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(self._shared)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[self._shared],
            env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
        )  # fmt: skip
        # A new session: Ctrl-C stops this process, which then ends the worker by closing its input.
        self.usable = True
        self.end = ""
        """How it ended by itself, or why it was ended within a request."""

    def ask(self, request: dict[str, Any], patience_s: float) -> dict[str, Any]:
        """The reply, or {"error": how the process ended}."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._line(time.monotonic() + patience_s)
        except BrokenPipeError:
            line = b""
        if line is None:
            self.close()
            self.end = f"said nothing for {patience_s:.0f} s"
            return {"error": f"the decoder {self.end} and was stopped"}
        if not line.endswith(b"\n"):
            self.end = f"died of {_cause(self._process.wait())}"
            self.close()
            return {"error": f"the decoder {self.end}"}
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _line(self, deadline: float) -> bytes | None:
        """Up to the end of a line or of the output; None if neither comes in time."""
        assert self._process.stdout is not None
        pipe, parts = self._process.stdout.fileno(), [b""]
        ready = select.poll()
        ready.register(pipe, select.POLLIN)
        while not parts[-1].endswith(b"\n"):
            if not ready.poll(1000 * max(0.0, deadline - time.monotonic())):
                return None
            parts.append(os.read(pipe, 1 << 20))
            if not parts[-1]:
                break
        return b"".join(parts)

    @property
    def failed(self) -> bool:
        """Whether it ended by an exit status of its own: nothing that a request did to it."""
        status = self._process.returncode
        return status is not None and status >= 0

    def pixels(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """A copy of what the process wrote."""
        video = np.empty(shape, np.uint8)
        flat, done = video.reshape(-1), 0
        while done < flat.size:
            read = os.preadv(self._shared, [flat[done:].data], done)
            if not read:
                raise ValueError(f"{done} of {flat.size} bytes of pixel frames were decoded")
            done += read
        return video

    def close(self) -> None:
        """End the process."""
        if self.usable:
            self.usable = False
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):  # of a request that was never read
                        pipe.close()
            os.close(self._shared)


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """Answer requests, one JSON object a line, until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like a reply
    for line in sys.stdin:
        replies.write(json.dumps(answer(json.loads(line))) + "\n")
        replies.flush()
    return 0


def _cause(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


class Workers:
    """At most `most` processes, started when first needed; safe to use from any thread."""

    def __init__(self, most: int) -> None:
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(most):
            self._idle.put(None)
        self.deaths = 0
        """Processes that had to be replaced."""
        self._lock = threading.Lock()

    def probe(self, path: Path, offset: int, size: int, *, decode: bool) -> dict[str, Any]:
        """See decode.probe. ValueError with the reason, also if the process died of the file."""
        request = {"do": "probe", "path": str(path), "offset": offset, "size": size,
                   "decode": decode}  # fmt: skip
        found: dict[str, Any] = self._run(request)[0]
        return found

    def frames(self, path: Path, offset: int, size: int, wanted: list[int], *,
               timed: bool, turn: tuple[bool, bool, bool]) -> NDArray[np.uint8]:  # fmt: skip
        """Pixel frames uint8 [F, H, W, 3]: see decode.frames. ValueError as in `probe`."""
        request = {"do": "frames", "path": str(path), "offset": offset, "size": size,
                   "wanted": wanted, "timed": timed, "turn": turn}  # fmt: skip
        video: NDArray[np.uint8] = self._run(request)[1]
        return video

    def _run(self, request: dict[str, Any]) -> tuple[Any, Any]:
        worker, answered = self._idle.get(), False
        try:
            if worker is None or not worker.usable:
                worker = Worker()
            reply = worker.ask(request, PATIENCE_S)
            if not worker.usable:
                with self._lock:
                    self.deaths += 1
                raise DecoderDied(reply["error"])
            pixels = None
            if request["do"] == "frames" and "ok" in reply:
                pixels = worker.pixels(tuple(reply["ok"]))
            answered = True
            if "error" in reply:
                raise ValueError(reply["error"])
            return reply["ok"], pixels
        finally:
            if worker is not None and not answered:
                worker.close()  # it may still be at work for the request that was given up
            self._idle.put(worker)

    def close(self) -> None:
        """End all idle processes; later requests start new ones."""
        held = []
        while not self._idle.empty():
            held.append(self._idle.get_nowait())
        for worker in held:
            if worker is not None:
                worker.close()
            self._idle.put(None)


@functools.cache
def workers(most: int) -> Workers:
    """This process's pool of that size, shared by all pipelines."""
    return Workers(most)
