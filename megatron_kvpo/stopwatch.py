"""Where the time of an update goes: seconds and operations of named stages, and when each ran.

Nothing is measured unless a Stopwatch is running, and nothing waits for a GPU unless it says so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

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

    needed_flops: float = 0.0
    """As flops, without what is computed again: what the model's mathematics asks for."""

    tokens: float = 0.0
    """That forward passes of the transformer took in: this rank's share of them."""


@dataclass(frozen=True, slots=True)
class Span:
    """Something that went on, in seconds since the stopwatch began."""

    lane: str
    """Who did it: "run" is the process that measures."""

    name: str
    start_s: float
    stop_s: float


@dataclass(slots=True)
class Stopwatch:
    """Measures while its `with` block runs; only one runs at a time.

    with Stopwatch() as watch:
        ...
    watch.stages["replay"].seconds
    """

    stages: dict[str, Stage] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    """Those of the lane "run" follow each other without a gap; see `note_span` for others."""

    waits: bool = True
    """For the GPU, wherever a stage begins or ends. False leaves marks in its stream instead, which
    are read by `lap` alone, and keeps no spans: for runs that go on as if nobody measured."""

    opaque: frozenset[str] = frozenset()
    """Stages to which those inside them are charged."""

    _inside: list[str] = field(default_factory=list)
    _marks: list[tuple[torch.cuda.Event, str]] = field(default_factory=list)
    """Where the GPU's work for a stage ends, and that stage."""

    _began: float = 0.0
    _since: float = 0.0
    _last: int = -1
    """Where the last span of the run stands."""

    def __enter__(self) -> Stopwatch:
        global _running
        if _running is not None:
            raise ValueError("a stopwatch is running already: end it first")
        self._enter("other")
        self._began = self._since
        _running = self
        return self

    def __exit__(self, *error: object) -> None:
        global _running
        self._leave()
        with _lock:
            _running = None

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages.values())

    def lap(self) -> dict[str, Stage]:
        """What the stages have cost since the last lap. They begin anew."""
        self._charge()
        if self._marks:
            self._marks[-1][0].synchronize()
            for (since, _), (until, name) in pairwise(self._marks):
                self.stages[name].seconds += since.elapsed_time(until) / 1000
            del self._marks[:-1]
        found = {name: part for name, part in self.stages.items() if part != Stage()}
        self.stages = {name: Stage() for name in dict.fromkeys(self._inside)}
        return found

    def _enter(self, name: str) -> None:
        self._charge()
        if self._inside and self._inside[-1] in self.opaque:
            name = self._inside[-1]
        self._inside.append(name)
        self.stages.setdefault(name, Stage())

    def _leave(self) -> None:
        self._charge()
        self._inside.pop()

    def _charge(self) -> None:
        if not self.waits and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            mark.record()
            self._marks.append((mark, self._inside[-1] if self._inside else "other"))
            return
        if self.waits and torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._inside:
            self.stages[self._inside[-1]].seconds += now - self._since
            self._go_on(self._inside[-1], self._since - self._began, now - self._began)
        self._since = now

    def _go_on(self, name: str, start_s: float, stop_s: float) -> None:
        """The run's next span, or more of its last one."""
        if stop_s <= start_s or not self.waits:
            return
        with _lock:
            if self._last >= 0 and self.spans[self._last].name == name:
                start_s = self.spans[self._last].start_s
                self.spans[self._last] = Span("run", name, start_s, stop_s)
            else:
                self._last = len(self.spans)
                self.spans.append(Span("run", name, start_s, stop_s))


_running: Stopwatch | None = None
_listeners: list[Callable[[str, str], None]] = []
_lock = threading.Lock()
"""Of the spans, and of who may still add some."""


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Charge what happens inside to a stage, and not to the stage around it."""
    for tell in _listeners:
        tell("begins", name)
    with _charged(name):
        yield
    for tell in _listeners:
        tell("ends", name)


def passing(place: str) -> None:
    """Say where a stage has come to, for whoever listens."""
    for tell in _listeners:
        tell("at", place)


@contextmanager
def listening(tell: Callable[[str, str], None]) -> Iterator[None]:
    """Inside, tell("begins", stage), tell("ends", stage) and tell("at", place) are called.

    A stage that fails does not end.
    """
    _listeners.append(tell)
    try:
        yield
    finally:
        _listeners.remove(tell)


@contextmanager
def _charged(name: str) -> Iterator[None]:
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


def count(
    flops: float, passes: int, *, needed_flops: float = 0.0, tokens: float = 0.0
) -> None:  # fmt: skip
    """Add work to the stage that is going on: see the fields of `Stage`."""
    if _running is not None:
        current = _running.stages[_running._inside[-1]]
        current.flops += flops
        current.passes += passes
        current.needed_flops += needed_flops
        current.tokens += tokens


def note_span(lane: str, name: str, start: float, stop: float) -> None:
    """Add what went on elsewhere, in seconds of time.perf_counter(). Any thread may call it.

    Only what went on while somebody measured is kept.
    """
    with _lock:
        watch = _running
        if watch is not None and watch.waits and stop > max(start, watch._began):
            start_s = max(start, watch._began) - watch._began
            watch.spans.append(Span(lane, name, start_s, stop - watch._began))
