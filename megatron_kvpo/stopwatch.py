"""Where the time of an update goes: seconds and floating-point operations of named stages.

Nothing is measured, and nothing waits for a GPU, unless a Stopwatch is running.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class Stage:
    """What a stage has cost since the stopwatch began."""

    seconds: float = 0.0
    """Without the stages inside it."""

    flops: float = 0.0
    """Counted from shapes, on this rank. A pass with a graph counts its backward too."""

    passes: int = 0
    """Forward passes of the transformer x rows."""


@dataclass(slots=True)
class Stopwatch:
    """Measures while its `with` block runs; only one runs at a time.

    with Stopwatch() as watch:
        ...
    watch.stages["replay"].seconds
    """

    stages: dict[str, Stage] = field(default_factory=dict)
    _inside: list[str] = field(default_factory=list)
    _since: float = 0.0

    def __enter__(self) -> Stopwatch:
        global _running
        if _running is not None:
            raise ValueError("a stopwatch is running already: end it first")
        _running = self
        self._enter("other")
        return self

    def __exit__(self, *error: object) -> None:
        global _running
        self._leave()
        _running = None

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages.values())

    def _enter(self, name: str) -> None:
        self._charge()
        self._inside.append(name)
        self.stages.setdefault(name, Stage())

    def _leave(self) -> None:
        self._charge()
        self._inside.pop()

    def _charge(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._inside:
            self.stages[self._inside[-1]].seconds += now - self._since
        self._since = now


_running: Stopwatch | None = None


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Charge what happens inside to a stage, and not to the stage around it."""
    watch = _running
    if watch is None:
        yield
        return
    watch._enter(name)
    try:
        yield
    finally:
        watch._leave()


def running() -> bool:
    """Whether anybody measures: counting can be left out if not."""
    return _running is not None


def count(flops: float, passes: int) -> None:
    """Add work to the stage that is going on."""
    if _running is not None:
        current = _running.stages[_running._inside[-1]]
        current.flops += flops
        current.passes += passes
