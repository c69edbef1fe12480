"""A run's figures as they come: two .jsonl files always, trackers if wanted, the resolved config.

And what an update costs: seconds, tokens and operations of its stages, and memory.
"""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kvpo import settings, stopwatch
from megatron_kvpo.config import LogConfig, RunConfig
from megatron_kvpo.log import get_logger
from megatron_kvpo.model.flops import peak_of
from megatron_kvpo.parallel.groups import Ranks
from megatron_kvpo.records import Prompt
from megatron_kvpo.stopwatch import Stage, Stopwatch
from megatron_kvpo.training.reward_log import table_rows
from megatron_kvpo.training.trackers import PICTURES, Guest, invite

logger = get_logger(__name__)

GROUPS = (
    "reward", "loss", "policy", "time", "speed", "memory", "data", "eval", "sample",
)  # fmt: skip
"""What a metric's name may begin with, before the slash; trackers show one panel row for each.

The report draws `reward/*` against updates (`reward/composite` first) and takes `reward/x_se`, if
logged, as the standard error of `reward/x`; names under `policy/` and `loss/` that differ in
_min, _max, _mean or _std share a panel.
"""

ASIDE = frozenset(("evaluate", "save", "samples"))
"""Stages that are no part of an update, with what is inside them. The line after tells of them."""

Scalar: TypeAlias = float | int | Tensor | np.floating[Any] | np.integer[Any]


class Metrics:
    """Writes one JSON object per call of `log` into the run's folder, and tells the trackers.

    A context manager. On ranks other than the first every method does nothing. Trackers are guests:
    what goes wrong with them is a warning, never the end of a run.
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
        self._guests: list[Guest] = []

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
        self._guests = invite(self._config.log, self._config.name, self._folder,
                              settings.to_mapping(self._config), self._resume_at)  # fmt: skip
        self._tell_again()
        return self

    def _tell_again(self) -> None:
        """What is kept of the update that the run resumes with, and void in a tracker."""
        for line in read_jsonl(self._folder / "metrics.jsonl"):
            if line["update"] >= self._resume_at:
                values = {name: math.nan if value is None else value for name, value in line.items()
                          if "/" in name}  # fmt: skip
                self._tell(line["update"], values)

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
        for guest in self._guests:
            guest.close(failed=error is not None)
        self._guests = []

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
        self._tell(int(update), numbers)

    def _tell(self, update: int, numbers: dict[str, float]) -> None:
        for guest in self._guests:
            guest.tell(lambda tracker: tracker.scalars(update, numbers))

    def log_rewards(
        self, update: int, lines: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt] = ()
    ) -> None:  # fmt: skip
        """Append to rewards.jsonl what training.reward_log says of each group.

        With `prompts`, all of the run, trackers get a table of them too.
        """
        if self._rewards is None:
            return
        for line in lines:
            self._rewards.write(json.dumps({"update": update, **line}) + "\n")
        self._rewards.flush()
        if prompts and self._guests:
            rows = table_rows(lines, prompts, self._config.reward.weights)
            for guest in self._guests:
                guest.tell(lambda tracker: tracker.table(update, "sample/groups", rows))

    def log_picture(self, name: str, path: Path, update: int = 0, caption: str = "") -> None:
        """Show a .gif, .mp4 or .png file in trackers. ValueError if it is missing or another."""
        if not self._first:
            return
        if path.suffix not in PICTURES or not path.is_file():
            raise ValueError(f"no picture at {path}: give an existing {', '.join(PICTURES)}")
        _check_name(name)
        for guest in self._guests:
            guest.tell(lambda tracker: tracker.picture(update, name, path, caption))


class Meter:
    """What goes on while it is `running`, on every rank, from one `read` to the next."""

    def __init__(self, config: LogConfig, ranks: Ranks) -> None:
        """config.costs false: nothing is measured."""
        self._ranks, self._wanted = ranks, config.costs
        self._watch: Stopwatch | None = None
        self._peak = config.peak_tflops
        if self._peak is None and ranks.device.type == "cuda":
            self._peak = peak_of(torch.cuda.get_device_name(ranks.device))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure inside, unless somebody else does."""
        if not self._wanted or stopwatch.running():
            yield
            return
        with Stopwatch(waits=False, opaque=ASIDE) as self._watch:
            try:
                yield
            finally:
                self._watch = None

    def read(self, unit: str = "update", count: int = 1) -> dict[str, float]:
        """Figures of `count` updates, since the last reading. None unless it runs. Collective.

        time/<stage>_s: seconds an update of the rank that took longest. speed/<stage>_tokens_per_s:
        through the transformer, all ranks together. speed/<stage>_tflops: of a rank, as many as the
        model needs, nothing that is computed again. speed/<stage>_mfu: that over the GPU's peak,
        where it is known. The same of the whole `unit`. memory/peak_gib and memory/reserved_gib:
        most that a GPU held of PyTorch's since the last reading; memory/host_peak_gib: most that a
        process held since it began. Stages ASIDE count for no update.
        """
        if self._watch is None:
            return {}
        ranks = [(self._watch.lap(), self._memory())]
        if self._ranks.world > 1:
            found: list[Any] = [None] * self._ranks.world
            dist.all_gather_object(found, ranks[0])
            ranks = found
        values: dict[str, float] = {}
        laps = [stages for stages, _ in ranks]
        for name in dict.fromkeys(name for stages in laps for name in stages):
            values |= self._figures(name, [s.get(name, Stage()) for s in laps], count)
        values |= self._figures(unit, [_whole(stages) for stages in laps], count)
        for name in ranks[0][1]:
            values[f"memory/{name}_gib"] = max(held[name] for _, held in ranks) / 2**30
        return values

    def _figures(self, name: str, parts: Sequence[Stage], count: int) -> dict[str, float]:
        """Of one stage, over its ranks."""
        name, longest = name.replace(" ", "_"), max(part.seconds for part in parts)
        values = {f"time/{name}_s": longest / count}
        total = sum(part.seconds for part in parts)
        if total and any(part.tokens for part in parts):
            rate = sum(part.needed_flops for part in parts) / total / 1e12
            values[f"speed/{name}_tokens_per_s"] = sum(part.tokens for part in parts) / longest
            values[f"speed/{name}_tflops"] = rate
            if self._peak:
                values[f"speed/{name}_mfu"] = rate / self._peak
        return values

    def _memory(self) -> dict[str, float]:
        """Bytes. What the GPU's allocator remembers begins anew."""
        found = {"host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0}
        device = self._ranks.device
        if device.type == "cuda":
            found["peak"] = float(torch.cuda.max_memory_allocated(device))
            found["reserved"] = float(torch.cuda.max_memory_reserved(device))
            torch.cuda.reset_peak_memory_stats(device)
        return found


def _whole(stages: Mapping[str, Stage]) -> Stage:
    """An update's stages together."""
    own = [part for name, part in stages.items() if name not in ASIDE]
    return Stage(
        seconds=sum(part.seconds for part in own), tokens=sum(part.tokens for part in own),
        needed_flops=sum(part.needed_flops for part in own),
    )  # fmt: skip


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
