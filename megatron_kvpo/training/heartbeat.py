"""A sign of life from every rank, and what is done when one falls silent or makes no progress.

    runs/<name>/heartbeat/rank_00000.json    where the rank stands, rewritten every few seconds
    runs/<name>/hang/                        what ended the run, and every rank's stacks

A thread does all this through files; ranks never meet in it. Files' times are compared with each
other, never with a clock. Each rank watches itself and the next; whoever finds a fault raises the
alarm, which all hear.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from megatron_kvpo.config import HeartbeatConfig
from megatron_kvpo.log import get_logger
from megatron_kvpo.parallel.groups import Ranks, is_first
from megatron_kvpo.stopwatch import listening

logger = get_logger(__name__)

EXIT_CODE = 75
"""Of every rank when the run hangs: try again (sysexits.h: EX_TEMPFAIL)."""

_GRACE_S = 15.0
"""For other ranks' stacks, before this one ends and the launcher ends them."""

_BEFORE_TIMEOUT = 0.95
"""Share of parallel.timeout_s after which a hang is told, before collectives give up."""

_WAITS = {"parallel/collect.py": "all_gather", "parallel/exchange.py": "all_to_all"}
"""What `wait` in these files waits for."""


@dataclass(frozen=True, slots=True)
class Beat:
    """Where a rank stands."""

    rank: int
    host: str
    pid: int
    update: int
    stage: str
    where: str
    """The prompt, sequences and latent frame that it has come to, if the stage says."""

    idle_s: float
    """Since a stage began, ended or told where it is."""

    collectives: dict[str, int]
    """How many it has begun, by axis."""

    inside: str
    """The collective that it waits in, and who called it; empty if in none."""

    def __str__(self) -> str:
        at = f"update {self.update}, stage {self.stage}" + (self.where and f" ({self.where})")
        waits = f"inside {self.inside}" if self.inside else "in no collective"
        return (f"rank {self.rank} (process {self.pid} on {self.host}): {at}, no progress for "
                f"{self.idle_s:.0f} s, {waits}, collectives begun {self.collectives}")  # fmt: skip


class Heartbeat:
    """Beats while `running`."""

    def __init__(
        self, config: HeartbeatConfig, folder: Path, ranks: Ranks, timeout_s: float
    ) -> None:
        """`folder`: of the run; `timeout_s`: after which collectives give up."""
        self._ranks, self._every_s = ranks, config.every_s
        self._limit_s = config.limit_s
        if ranks.world > 1:
            self._limit_s = min(config.limit_s, _BEFORE_TIMEOUT * timeout_s)
        self._beats, self._hang = folder / "heartbeat", folder / "hang"
        self.update = 0
        """The one in the making; whoever runs the loop sets it."""

        self._stages: list[str] = []
        self._where, self._since = "", time.monotonic()
        self._main: int | None = threading.get_ident()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Beat from here on. Collective; nothing happens if the limit is 0."""
        if not self._limit_s:
            yield
            return
        if is_first(self._ranks):
            shutil.rmtree(self._hang, ignore_errors=True)
        self._beats.mkdir(parents=True, exist_ok=True)
        self._write(self._beat())
        dist.barrier()  # no file of an earlier run is taken for a rank's
        ended = threading.Event()
        thread = threading.Thread(target=self._watch, args=(ended,), name="heartbeat", daemon=True)
        thread.start()
        try:
            with listening(self._hear):
                yield
        finally:
            ended.set()
            thread.join()

    def _hear(self, kind: str, what: str) -> None:
        """From stages: begins, ends, or `at` some place inside."""
        self._since = time.monotonic()
        if kind == "at":
            self._where = what
            return
        self._where = ""
        if kind == "begins":
            self._stages.append(what)
        elif what in self._stages:
            while self._stages.pop() != what:
                pass

    def _beat(self) -> Beat:
        axes = {name: getattr(self._ranks, name).group
                for name in ("tensor", "context", "branch", "data", "replicas")}  # fmt: skip
        stages = self._stages
        frame = sys._current_frames().get(self._main or 0)
        return Beat(
            rank=self._ranks.rank, host=socket.gethostname(), pid=os.getpid(), update=self.update,
            stage=stages[-1] if stages else "between stages", where=self._where,
            idle_s=time.monotonic() - self._since,
            collectives=_counts({"world": dist.group.WORLD, **axes}),
            inside=_collective(frame),
        )  # fmt: skip

    def _path(self, rank: int) -> Path:
        return self._beats / f"rank_{rank:05d}.json"

    def _write(self, beat: Beat) -> None:
        path = self._path(beat.rank)
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(asdict(beat)) + "\n")
        draft.replace(path)

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(self._every_s):
            try:
                beat = self._beat()
                self._write(beat)
                if (self._hang / "alarm.json").is_file():
                    self._end(beat)
                elif self._hangs(beat):
                    self._raise_alarm()
                    self._end(beat)
            except OSError as error:  # a file system that is away is no hang yet
                logger.warning("no heartbeat: %s", error)

    def _hangs(self, own: Beat) -> bool:
        """Whether this rank stands still, or the next is silent."""
        if own.idle_s > self._limit_s:
            return True
        return self._age_s((own.rank + 1) % self._ranks.world) > self._limit_s

    def _age_s(self, rank: int) -> float:
        """How much older a rank's last beat is than this rank's."""
        newest = self._path(self._ranks.rank).stat().st_mtime
        try:
            return newest - self._path(rank).stat().st_mtime
        except FileNotFoundError:
            return float("inf")

    def _raise_alarm(self) -> None:
        """Say who is late, for all ranks to hear. The first to say so is heard."""
        beats, ages = {}, {}
        for rank in range(self._ranks.world):
            ages[rank] = self._age_s(rank)
            with contextlib.suppress(OSError, ValueError, TypeError):
                beats[rank] = Beat(**json.loads(self._path(rank).read_text()))
        silent = max(3 * self._every_s, self._limit_s / 4)
        late, why = find_late(beats, ages, silent)
        lines = [str(beat) for beat in beats.values()]
        state = process_state(beats[late]) if late in beats else ""
        said = {"late": late, "why": why + state, "ranks": lines,
                "silent": [rank for rank, age in ages.items() if age > silent]}  # fmt: skip
        self._hang.mkdir(exist_ok=True)
        draft = self._hang / f"alarm_{self._ranks.rank}.tmp"
        draft.write_text(json.dumps(said, indent=1) + "\n")
        with contextlib.suppress(FileExistsError):
            os.link(draft, self._hang / "alarm.json")
        draft.unlink()

    def _end(self, beat: Beat) -> None:
        """Leave this rank's stacks, wait for others to do so, and end the process."""
        said = json.loads((self._hang / "alarm.json").read_text())
        report = self._hang / f"rank_{beat.rank:05d}.txt"
        draft = report.with_suffix(".tmp")
        with draft.open("w") as file:
            file.write(f"{beat}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        draft.replace(report)
        logger.error(
            "the run hangs: rank %d is late, %s. Stacks of this rank follow; those of all are in "
            "%s\n%s", said["late"], said["why"], self._hang, "\n".join(said["ranks"]),
        )  # fmt: skip
        with contextlib.suppress(OSError, ValueError):  # a stderr without a file
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        others = [r for r in range(self._ranks.world) if r not in said["silent"]]
        until = time.monotonic() + _GRACE_S
        while time.monotonic() < until and not all(
            (self._hang / f"rank_{rank:05d}.txt").is_file() for rank in others
        ):
            time.sleep(0.1)
        os._exit(EXIT_CODE)


def find_late(
    beats: Mapping[int, Beat], ages: Mapping[int, float], silent_s: float
) -> tuple[int, str]:
    """Which rank the others wait for, and how one can tell.

    In that order: one whose beats have ended; the one that has begun fewest collectives; the one
    that waits in none; the one that has stood still for longest.

    Args:
        beats: the last of each rank that has one.
        ages: seconds since that beat.
        silent_s: a rank whose beat is older is silent.
    """
    quiet = {rank: age for rank, age in ages.items() if age > silent_s or rank not in beats}
    if quiet:
        late = max(quiet, key=lambda rank: quiet[rank])
        last = f"; at its last beat: {beats[late]}" if late in beats else ""
        return late, f"silent for {quiet[late]:.0f} s{last}"
    begun = {rank: sum(beat.collectives.values()) for rank, beat in beats.items()}
    late = min(begun, key=lambda rank: begun[rank])
    if begun[late] < max(begun.values()):
        return late, f"it has begun fewer collectives than others: {beats[late]}"
    free = [rank for rank, beat in beats.items() if not beat.inside] or list(beats)
    late = max(free, key=lambda rank: beats[rank].idle_s)
    return late, f"all have begun as many collectives: {beats[late]}"


def process_state(beat: Beat) -> str:
    """What the system says of a rank's process on this machine, as `; its process is stopped`."""
    if beat.host != socket.gethostname():
        return ""
    try:
        fields = Path(f"/proc/{beat.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "; its process is gone"
    names = {"T": "stopped", "t": "held by a debugger", "Z": "dead", "D": "waiting for a device"}
    return f"; its process is {names[fields[0]]}" if fields[0] in names else ""


def _counts(groups: Mapping[str, dist.ProcessGroup | None]) -> dict[str, int]:
    """Collectives begun in each group, and in all others together: Megatron makes some."""
    counts = {name: _count(group) for name, group in groups.items()}
    others = set(dist.distributed_c10d._world.pg_map) - set(groups.values())
    return {**counts, "others": sum(_count(group) for group in others)}


def _count(group: dist.ProcessGroup | None) -> int:
    """Collectives begun in a group; -1 if its backend does not count."""
    if group is None:
        return -1
    try:
        return int(group._get_sequence_number_for_group())  # type: ignore[attr-defined]
    except RuntimeError:
        return -1


def _place(path: str) -> str:
    """A file's path inside the package; empty if it is not of it."""
    return path.rpartition("/megatron_kvpo/")[2] if "/megatron_kvpo/" in path else ""


def _collective(frame: FrameType | None) -> str:
    """The collective that a stack waits in and the package's line that called it, or nothing."""
    name = ""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.endswith("distributed_c10d.py"):
            name = code.co_name
        elif code.co_name == "wait" and (place := _place(code.co_filename)) in _WAITS:
            name = name or _WAITS[place]
        elif place := _place(code.co_filename):
            return f"{name} from {place}:{frame.f_lineno}" if name else ""
        frame = frame.f_back
    return name
