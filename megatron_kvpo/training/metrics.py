"""A run's figures as they come: two .jsonl files always, wandb if wanted, the resolved config."""

from __future__ import annotations

import json
import math
import netrc
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias

import numpy as np
from torch import Tensor

from megatron_kvpo import settings
from megatron_kvpo.config import RunConfig
from megatron_kvpo.log import get_logger

logger = get_logger(__name__)

GROUPS = ("reward", "loss", "policy", "time", "data", "eval")
"""What a metric's name may begin with, before the slash; wandb shows one panel row for each.

The report draws `reward/*` against updates (`reward/composite` first) and takes `reward/x_se`, if
logged, as the standard error of `reward/x`; names under `policy/` and `loss/` that differ in
_min, _max, _mean or _std share a panel.
"""

Mode: TypeAlias = Literal["online", "offline", "disabled"]
Scalar: TypeAlias = float | int | Tensor | np.floating[Any] | np.integer[Any]


class Metrics:
    """Writes one JSON object per call of `log` into the run's folder, and sends it to wandb.

    A context manager. On ranks other than the first every method does nothing. wandb is a guest:
    what goes wrong with it is a warning, never the end of a run.
    """

    def __init__(self, config: RunConfig, first: bool, resume_at: int = 0) -> None:
        """Nothing is written before the `with`.

        Args:
            config: the run's, written beside the metrics as config.yaml.
            first: whether this rank reports.
            resume_at: the first update this run will log. Lines from it on, left by a run that
                went further than its last checkpoint, are dropped; 0 starts afresh.
        """
        self._config, self._first, self._resume_at = config, first, resume_at
        self._folder = config.run_folder
        self._file: Any = None
        self._rewards: Any = None
        self._wandb: Any = None
        self._warned: set[str] = set()

    def __enter__(self) -> Metrics:
        if not self._first:
            return self
        self._folder.mkdir(parents=True, exist_ok=True)
        settings.dump(self._config, self._folder / "config.yaml")
        path = self._folder / "metrics.jsonl"
        truncate(path, self._resume_at, self._resume_at < self._config.num_updates)
        self._file = path.open("a", encoding="utf-8")
        path = self._folder / "rewards.jsonl"
        truncate(path, self._resume_at)
        self._rewards = path.open("a", encoding="utf-8")
        self._wandb = _start_wandb(self._config, resumed=self._resume_at > 0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in (self._file, self._rewards):
            if file is not None:
                file.close()
        self._file = self._rewards = None
        if self._wandb is not None:
            self._guard(lambda run: run.finish(exit_code=0 if error is None else 1))
            self._wandb = None

    def log(
        self,
        update: int,
        values: Mapping[str, Scalar] | None = None,
        **groups: Mapping[str, Scalar],
    ) -> None:
        """Append one line: `log(3, {"loss/total": x})` or `log(3, loss={"total": x})`.

        A value that is not finite is written as null and named under "non_finite", with a
        warning. ValueError for a name outside GROUPS or a value that is not one number.
        """
        if not self._first:
            return
        flat = dict(values or {})
        for group, members in groups.items():
            flat.update({f"{group}/{name}": value for name, value in members.items()})
        numbers = {name: _number(name, value) for name, value in flat.items()}
        strange = sorted(name for name, value in numbers.items() if not math.isfinite(value))
        finite = {name: None if name in strange else value for name, value in numbers.items()}
        line: dict[str, Any] = {"update": int(update), **finite}
        if strange:
            line["non_finite"] = strange
            logger.warning("update %d: %s not finite", update, ", ".join(strange))
        if self._file is None:
            raise ValueError("metrics are logged outside `with Metrics(...)`: enter it first")
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        self._guard(lambda run: run.log({"update": int(update), **numbers}))

    def log_rewards(self, update: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append to rewards.jsonl what training.reward_log says of each group."""
        if self._rewards is None:
            return
        for line in lines:
            self._rewards.write(json.dumps({"update": update, **line}) + "\n")
        self._rewards.flush()

    def log_video(self, name: str, path: Path, update: int = 0, caption: str = "") -> None:
        """Show a .gif or .mp4 file in wandb. ValueError if it is missing or of another kind."""
        if not self._first:
            return
        if path.suffix not in (".gif", ".mp4") or not path.is_file():
            raise ValueError(f"no video at {path}: give an existing .gif or .mp4")
        _check_name(name)
        if self._wandb is None:
            return
        import wandb

        kind = path.suffix[1:]
        self._guard(lambda run: run.log(
            {"update": update, name: wandb.Video(str(path), caption=caption or None, format=kind)}
        ))  # fmt: skip

    def _guard(self, action: Any) -> None:
        """Do something with the wandb run; let go of it if that fails."""
        if self._wandb is None:
            return
        import wandb

        try:
            action(self._wandb)
        except (wandb.errors.Error, OSError, TimeoutError) as error:
            logger.warning("wandb stopped (%s): the run goes on with metrics.jsonl", error)
            self._wandb = None


def truncate(path: Path, resume_at: int, keep_evaluation: bool = False) -> None:
    """Keep the lines of a metrics.jsonl whose update is below `resume_at`, and whole ones only.

    With `keep_evaluation` also the evaluation of the weights that the run resumes with, which is
    numbered `resume_at` and would not come again.
    """
    if not path.is_file():
        return
    last = resume_at + (keep_evaluation and resume_at > 0)
    kept = [
        json.dumps(line) + "\n"
        for line in read_jsonl(path)
        if line["update"] < (last if _is_evaluation(line) else resume_at)
    ]
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(kept), encoding="utf-8")
    fresh.replace(path)


def _is_evaluation(line: Mapping[str, Any]) -> bool:
    return all(name.startswith("eval/") for name in line if name not in ("update", "non_finite"))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last one cut off in mid-write is left out.

    ValueError, with the line's number, for any other that is not an object with an update.
    """
    texts = path.read_text(encoding="utf-8").splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or "update" not in line:
                raise ValueError("no update in it")
        except ValueError as error:
            if number == len(texts):
                break
            raise ValueError(f"{path} line {number} is no metrics line: {error}") from error
        lines.append(line)
    return lines


def _check_name(name: str) -> None:
    group, slash, rest = name.partition("/")
    if group not in GROUPS or not slash or not rest:
        raise ValueError(f"metric {name!r} belongs to no group: begin with one of {list(GROUPS)}/")


def _number(name: str, value: Scalar) -> float:
    _check_name(name)
    size = value.numel() if isinstance(value, Tensor) else np.size(value)
    if size != 1:
        raise ValueError(f"metric {name} has {size} values: log one number, a mean say")
    number = float(value)
    return int(number) if isinstance(value, int | np.integer) else number


def _wandb_mode(wanted: Literal["auto", "online", "offline", "disabled"]) -> Mode:
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


def _start_wandb(config: RunConfig, resumed: bool) -> Any:
    """A wandb run, or None when disabled, missing or failing. Online falls back to offline."""
    mode = _wandb_mode(config.log.wandb)
    if mode == "disabled":
        return None
    try:
        import wandb
    except ImportError as error:
        logger.warning("wandb cannot be imported (%s): metrics.jsonl only", error)
        return None
    attempts: list[Mode] = [mode, "offline"] if mode == "online" else [mode]
    for attempt in attempts:
        try:
            run = wandb.init(
                project=config.log.project,
                name=config.name,
                id=_wandb_id(config.run_folder, resumed),
                resume="allow" if attempt == "online" else None,
                dir=str(config.run_folder),
                mode=attempt,
                config=settings.to_mapping(config),
                settings=wandb.Settings(
                    silent=True, console="off", init_timeout=30, finish_timeout=60
                ),
            )
            run.define_metric("update")
            run.define_metric("*", step_metric="update")
        except (wandb.errors.Error, OSError, TimeoutError, ValueError) as error:
            logger.warning("wandb does not start %s: %s", attempt, error)
        else:
            logger.info("wandb %s, run %s", attempt, run.id)
            return run
    return None


def _wandb_id(folder: Path, resumed: bool) -> str:
    """The id this run has had before, if it resumes, else a new one, kept in wandb_id.txt."""
    path = folder / "wandb_id.txt"
    if resumed and path.is_file():
        kept = path.read_text().strip()
        if kept:
            return kept
    fresh = uuid.uuid4().hex[:12]
    path.write_text(fresh + "\n")
    return fresh
