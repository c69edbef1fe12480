"""Speaking to the person at the terminal: the only place that prints.

The first rank logs to stderr and to run.log; the others speak up from WARNING on. stdout is kept
for results, so that `python -m megatron_kvpo.train ... | tail -1` is one JSON object.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from tqdm import tqdm

_ROOT = "megatron_kvpo"
_COLUMNS = 79
_LEAST_BAR = 12
"""Columns of a progress bar with its edges, which words leave to it."""

_RECENT_UPDATES = 20
"""Updates that the time left is judged by."""

_in_run = False
"""Whether a run has its folder, so that its settings were found good."""


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: `get_logger(__name__)`. Loggers outside the package join it."""
    inside = name == _ROOT or name.startswith(f"{_ROOT}.")
    return logging.getLogger(name if inside else f"{_ROOT}.{name}")


def setup(first: bool, folder: Path | None = None, rank: int | None = None) -> None:
    """Point the package's loggers at stderr and, on the first rank, at folder/run.log (appended).

    Args:
        first: whether this rank is the one that reports.
        folder: of the run; made if missing. None writes no file.
        rank: shown in the other ranks' warnings; None reads RANK.
    """
    global _in_run
    _in_run = folder is not None
    root = logging.getLogger(_ROOT)
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.propagate = False
    root.setLevel(logging.INFO if first else logging.WARNING)
    shown = os.environ.get("RANK", "?") if rank is None else rank
    stderr = _StderrHandler()
    stderr.setFormatter(_Formatter("" if first else f"rank {shown}: "))
    root.addHandler(stderr)
    if first and folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder / "run.log", encoding="utf-8")
        file.setFormatter(_Formatter("", date=True))
        root.addHandler(file)


def emit_result(line: str) -> None:
    """Print one line to stdout, at once: the run's result. ValueError if it is not one line."""
    if "\n" in line:
        raise ValueError(f"a result is one line, this one has {line.count(chr(10)) + 1}")
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class _StderrHandler(logging.Handler):
    """Writes above a progress bar, if there is one, and to whatever stderr is by now."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "file_only", False):
            tqdm.write(self.format(record), file=sys.stderr)
            sys.stderr.flush()


class _Formatter(logging.Formatter):
    """`17:38:05 message`; a warning names its level, a progress line stands alone on a terminal."""

    def __init__(self, prefix: str, date: bool = False) -> None:
        super().__init__(datefmt="%Y-%m-%d %H:%M:%S" if date else "%H:%M:%S")
        self._prefix = prefix
        self._always_stamp = date

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        if self._always_stamp or not getattr(record, "progress", False):
            text = f"{self.formatTime(record, self.datefmt)} {self._prefix}{text}"
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        return text


class Progress:
    """How far the run is: a bar on a terminal, else one line an update. At most 79 columns.

    What does not fit is left out whole: seconds first, then values from the last on. Every line
    also goes to run.log. Silent on ranks other than the first.
    """

    def __init__(
        self, total: int, *, first: bool = True, start: int = 0, label: str = "update"
    ) -> None:
        """Count from `start` (updates done before a resume) to `total`. ValueError if above it."""
        if not 0 <= start <= total:
            raise ValueError(f"progress starts at {start} of {total}: start within the total")
        self._total, self._first, self._label = total, first, label
        self._ended_s: deque[tuple[int, float]] = deque(maxlen=_RECENT_UPDATES + 1)
        self._ended_s.append((start, time.monotonic()))
        self._logger = get_logger("progress")
        self._bar: Any = None
        if first and sys.stderr.isatty():
            self._bar_columns = min(shutil.get_terminal_size().columns - 1, _COLUMNS)
            self._bar = tqdm(total=total, initial=start, file=sys.stderr, ncols=self._bar_columns,
                             bar_format=f"{label} {{n}}/{{total}} |{{bar}}|")  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def seconds_per_update(self) -> float:
        """Mean over the last 20 updates; nan before the first."""
        (first, start_s), (last, end_s) = self._ended_s[0], self._ended_s[-1]
        return (end_s - start_s) / (last - first) if last > first else math.nan

    def update(self, done: int, **values: float) -> None:
        """Say that `done` updates are finished; `values` (reward, gain, loss) in that order."""
        self._ended_s.append((done, time.monotonic()))
        if not self._first:
            return
        seconds = self.seconds_per_update
        head = f"{self._label} {done:>{len(str(self._total))}}/{self._total}"
        pace = f"{seconds:.3g} s/{self._label}"
        left = f"left {format_duration(seconds * (self._total - done))}"
        if self._bar is not None:
            words = _fitted(self._bar_columns - len(head) - 1 - _LEAST_BAR, values, pace, left)
            escaped = words.replace("{", "{{").replace("}", "}}")
            self._bar.bar_format = f"{head} |{{bar}}|{escaped}"
            self._bar.n = done
            self._bar.refresh()
        line = f"{head}{_fitted(_COLUMNS - len(head), values, pace, left)}"
        extra = {"progress": True, "file_only": self._bar is not None}
        self._logger.info("%s", line, extra=extra)


def _fitted(columns: int, values: Mapping[str, float], pace: str, left: str) -> str:
    """As many of the values, the pace and the time left as there is room for; each after a space.

    Numbers have three digits, or two if all fit so. The pace goes first, the time left last.
    """
    numbers: list[str] = []
    for digits in (3, 2):
        numbers = [f"{name} {value:+.{digits}g}" for name, value in values.items()]
        words = "".join(f" {word}" for word in (*numbers, pace, left))
        if len(words) <= columns:
            return words
    numbers = [f"{name} {value:+.3g}" for name, value in values.items()]
    while True:
        words = "".join(f" {word}" for word in (*numbers, left))
        if len(words) <= columns or not numbers:
            return words if len(words) <= columns else ""
        numbers.pop()


def run_command(main: Callable[[], int], logger: logging.Logger) -> NoReturn:
    """End the process with what `main` returns; bad input is one line of the log and code 2.

    Kinds of RuntimeError, such as CUDA's, are no bad input: Python shows their traceback.
    """
    try:
        sys.exit(main())
    except (ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise
        _refuse(error, logger, first=True)


def run_training(
    main: Callable[[str, list[str]], object], arguments: Sequence[str], smaller: str = ""
) -> None:  # fmt: skip
    """Call `main` with a recipe's path and its overrides, which `arguments` are.

    Bad input, a ValueError before the run's log is open, is one line and code 2. What ends a run
    later is in run.log too, with its traceback; `smaller`: settings that it names where a GPU's
    memory is full.
    """
    try:
        if not arguments:
            raise ValueError("name a recipe, then what differs: RECIPE [section.key=value ...]")
        with ExitStack() as stack:
            stack.push(functools.partial(_note_end, smaller))
            main(arguments[0], list(arguments[1:]))
    except ValueError as error:
        if _in_run:
            raise
        _refuse(error, get_logger("run"), first=os.environ.get("RANK", "0") == "0")


def _note_end(smaller: str, kind: object, error: BaseException | None, trace: object) -> None:
    """Note in run.log, if there is one, what ends the run; Python shows it on stderr."""
    if isinstance(error, Exception):
        if isinstance(error, RuntimeError):
            import torch  # a run has it; launchers, which log too, do without

            if isinstance(error, torch.OutOfMemoryError):
                error.add_note(f"The GPU's memory is full. What needs less of it: {smaller}")
        logger = get_logger("run")
        logger.critical("the run ends", exc_info=error, extra={"file_only": True})


def _refuse(error: Exception, logger: logging.Logger, first: bool) -> NoReturn:
    """Bad input is one line and code 2."""
    setup(first)
    logger.error("%s", error)
    sys.exit(2)


def format_duration(seconds: float) -> str:
    """`1:02:03`, `2:03`, or `?` when it is not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
