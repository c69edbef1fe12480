"""wandb and TensorBoard beside the files of a run: guests, each on a thread of its own.

Whatever they do, the run neither waits for them nor ends with them. What they are told stands in
metrics.jsonl and rewards.jsonl too, but for pictures.
"""

from __future__ import annotations

import importlib.util
import io
import netrc
import os
import queue
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import av
import numpy as np
from PIL import Image

from megatron_kvpo.config import LogConfig
from megatron_kvpo.log import get_logger
from megatron_kvpo.training.filmstrips import Frames

logger = get_logger(__name__)

Mode: TypeAlias = Literal["online", "offline", "disabled"]
Rows: TypeAlias = Sequence[Mapping[str, Any]]

PICTURES = (".gif", ".mp4", ".png")
"""What may be shown."""

_MOST_WAITING = 1000
"""Things that a guest may be behind by. More are left out."""

_PATIENCE_S = 60.0
"""For a guest at the end of a run."""

_LARGEST_GIF = 8 * 2**20
"""Bytes; TensorBoard shows a strip of a larger one's frames."""

_STRIP = 10
"""Pixel frames of a strip."""

_FAILURES = (
    OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError,
    ImportError, EOFError,
)  # fmt: skip


class Tracker(Protocol):
    """Where figures and pictures of a run are looked at. A step is an update."""

    errors: tuple[type[Exception], ...]
    """That its methods may raise besides the usual ones."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Figures by name, which may be not finite."""

    def picture(self, step: int, name: str, path: Path, caption: str) -> None:
        """A file with one of the suffixes PICTURES."""

    def table(self, step: int, name: str, rows: Rows) -> None:
        """Rows with the same keys. None: it has no such value."""

    def flush(self) -> None:
        """Leave nothing in memory that a kill would lose."""

    def close(self, failed: bool) -> None:
        """The run ends."""


class Guest:
    """A tracker on a thread of its own. What goes wrong there is one warning."""

    def __init__(
        self, name: str, start: Callable[[], Tracker | None], patience_s: float = _PATIENCE_S
    ) -> None:  # fmt: skip
        """`start` runs on the thread too; None is a tracker that has said why it does not come."""
        self.name, self._start, self._patience_s = name, start, patience_s
        self._todo: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_MOST_WAITING)
        self._left_out, self._gone = 0, threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def tell(self, action: Callable[[Tracker], None]) -> None:
        """Have the tracker do something, later. Never waits, never raises."""
        if self._gone.is_set():
            return
        try:
            self._todo.put_nowait(action)
        except queue.Full:
            if not self._left_out:
                logger.warning("%s is behind by %d entries: what follows is left out until it has "
                               "caught up", self.name, _MOST_WAITING)  # fmt: skip
            self._left_out += 1

    def close(self, *, failed: bool) -> None:
        """Let it finish what it was told, as long as its patience lasts."""
        for last in (lambda tracker: tracker.close(failed), None):
            try:
                if not self._gone.is_set():
                    self._todo.put(last, timeout=self._patience_s)
            except queue.Full:
                break
        self._thread.join(self._patience_s)
        if self._thread.is_alive():
            logger.warning("%s has not finished after %g s and is left behind: its last entries "
                           "may be missing there", self.name, self._patience_s)  # fmt: skip
        elif self._left_out:
            logger.warning("%s lacks %d entries: it was too slow", self.name, self._left_out)

    def _work(self) -> None:
        errors: tuple[type[Exception], ...] = _FAILURES
        try:
            tracker = self._start()
            if tracker is None:
                return
            errors = (*_FAILURES, *tracker.errors)
            while (action := self._todo.get()) is not None:
                action(tracker)
                if self._todo.empty():
                    tracker.flush()
        except errors as error:
            logger.warning("%s stopped (%s: %s): the run goes on with its files alone", self.name,
                           type(error).__name__, error)  # fmt: skip
        finally:
            self._gone.set()


def check_installed(config: LogConfig) -> None:
    """ValueError if TensorBoard is asked for and not there."""
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "log.tensorboard is true and the package tensorboard is not installed: pip install "
            "tensorboard, or set log.tensorboard=false"
        )


def invite(
    config: LogConfig, name: str, folder: Path, settings: Mapping[str, Any], resume_at: int
) -> list[Guest]:  # fmt: skip
    """The guests that a recipe names. First rank only.

    Args:
        config: which.
        name: of the run.
        folder: of the run, existing: `wandb`, `wandb_id.txt` and `tensorboard` go there.
        settings: the whole recipe, to be shown.
        resume_at: first step that will be told; 0 starts afresh.
    """
    guests = []
    mode = wandb_mode(config.wandb)
    if mode != "disabled":
        guests.append(Guest("wandb", lambda: Wandb.start(config, mode, name, folder, settings,
                                                         resumed=resume_at > 0)))  # fmt: skip
    if config.tensorboard:
        guests.append(Guest("TensorBoard", lambda: TensorBoard(folder / "tensorboard", resume_at)))
    return guests


class TensorBoard:
    """Events in a folder of the run."""

    errors: tuple[type[Exception], ...] = ()

    def __init__(self, folder: Path, resume_at: int) -> None:
        """What earlier starts wrote of `resume_at` and later is said to be void."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=resume_at)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See Tracker; names are those of metrics.jsonl."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path, caption: str) -> None:
        """A GIF moves, a .png is whole, of others a strip of frames is shown."""
        if path.suffix == ".gif" and path.stat().st_size <= _LARGEST_GIF:
            self._add_gif(step, name, path)
        else:
            self._writer.add_image(name, strip_of(path), step, dataformats="HWC")
        if caption:
            self._writer.add_text(f"{name}_caption", caption, step)

    def _add_gif(self, step: int, name: str, path: Path) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as first:
            image = Summary.Image(height=first.height, width=first.width, colorspace=3,
                                  encoded_image_string=data)  # fmt: skip
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        self._writer.file_writer.add_summary(summary, step)

    def table(self, step: int, name: str, rows: Rows) -> None:
        """As text."""
        self._writer.add_text(name, markdown(rows), step)

    def flush(self) -> None:
        """To the file."""
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Also the file."""
        self._writer.close()


class Wandb:
    """A run of wandb, the same one over all starts that resume each other."""

    def __init__(self, run: Any, errors: tuple[type[Exception], ...]) -> None:
        self._run, self.errors = run, errors
        self._first = int(run.step)
        """wandb takes nothing for a step before its last one, and says so for each."""

        self._told = False

    @staticmethod
    def start(
        config: LogConfig, mode: Mode, name: str, folder: Path, settings: Mapping[str, Any], *,
        resumed: bool,
    ) -> Wandb | None:  # fmt: skip
        """None if it is missing or fails. Online falls back to offline."""
        try:
            import wandb
        except ImportError as error:
            logger.warning("wandb cannot be imported (%s): metrics.jsonl only", error)
            return None
        attempts: list[Mode] = [mode, "offline"] if mode == "online" else [mode]
        for attempt in attempts:
            try:
                run = wandb.init(
                    project=config.project, name=name, id=wandb_id(folder, resumed),
                    group=config.group, tags=list(config.tags) or None,
                    resume="allow" if attempt == "online" else None, allow_val_change=resumed,
                    dir=str(folder), mode=attempt, config=dict(settings),
                    settings=wandb.Settings(silent=True, console="off", init_timeout=30,
                                            finish_timeout=_PATIENCE_S - 10),
                )  # fmt: skip
                run.define_metric("update")
                run.define_metric("*", step_metric="update")
            except (wandb.errors.Error, OSError, TimeoutError, ValueError) as error:
                logger.warning("wandb does not start %s: %s", attempt, error)
                resumed = True  # the same id again
            else:
                logger.info("wandb %s, run %s", attempt, run.id)
                return Wandb(run, (wandb.errors.Error,))
        return None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See Tracker. What comes for one step is one row there."""
        self._log(step, dict(values))

    def picture(self, step: int, name: str, path: Path, caption: str) -> None:
        """See Tracker."""
        import wandb

        if path.suffix == ".png":
            self._log(step, {name: wandb.Image(str(path), caption=caption or None)})
            return
        video = wandb.Video(str(path), caption=caption or None, format=path.suffix[1:])
        self._log(step, {name: video})

    def table(self, step: int, name: str, rows: Rows) -> None:
        """See Tracker."""
        import wandb

        columns = list(rows[0])
        data = [[row[column] for column in columns] for row in rows]
        self._log(step, {name: wandb.Table(columns=columns, data=data)})

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step >= self._first:
            self._run.log({"update": step, **values}, step=step)
        elif not self._told:
            logger.info("wandb has this run up to update %d: what comes before is not sent again",
                        self._first - 1)  # fmt: skip
            self._told = True

    def flush(self) -> None:
        """Nothing: its own process writes."""

    def close(self, failed: bool) -> None:
        """See Tracker."""
        self._run.finish(exit_code=int(failed))


def wandb_mode(wanted: Literal["auto", "online", "offline", "disabled"]) -> Mode:
    """`auto`: what WANDB_MODE says, else online when there is a key, else offline."""
    if wanted != "auto":
        return wanted
    asked = os.environ.get("WANDB_MODE", "")
    modes: tuple[Mode, ...] = ("online", "offline", "disabled")
    for mode in modes:
        if asked == mode:
            return mode
    return "online" if _logged_in() else "offline"


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].strip("/")
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def wandb_id(folder: Path, resumed: bool) -> str:
    """The id this run has had before, if it resumes, else a new one, kept in wandb_id.txt."""
    path = folder / "wandb_id.txt"
    if resumed and path.is_file():
        kept = path.read_text().strip()
        if kept:
            return kept
    fresh = uuid.uuid4().hex[:12]
    path.write_text(fresh + "\n")
    return fresh


def markdown(rows: Rows) -> str:
    """A table as Markdown; numbers with four digits, None as nothing."""

    def cell(value: Any) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
        return text.replace("|", "\\|")

    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([cell(row[c]) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def strip_of(path: Path) -> Frames:
    """Frames of a video side by side, evenly spaced, or the picture. uint8 [H, W, 3]."""
    if path.suffix == ".png":
        with Image.open(path) as image:
            whole: Frames = np.asarray(image.convert("RGB"))
            return whole
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    chosen = np.linspace(0, len(frames) - 1, min(_STRIP, len(frames))).round().astype(int)
    return np.concatenate([frames[i] for i in chosen], axis=1)
