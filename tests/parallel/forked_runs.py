"""Tiny runs on forked ranks that signals hit at chosen moments.

One process imports everything and forks the ranks of each run: a run costs what it computes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

PATIENCE_S = 150
"""For the ranks that are left when one has died; all are killed then."""


@dataclass
class Job:
    """A run of the tiny recipe."""

    name: str
    overrides: list[str] = field(default_factory=list)
    world: int = 2
    rank: int = -1
    """Which rank is hit; -1: none."""

    moment: int = 0
    """At which of its moments, counted from 0."""

    at: str = ""
    """Or at that one of this name."""

    signal: int = signal.SIGKILL
    """0: it sleeps until it is killed."""


@dataclass
class Outcome:
    """What became of it."""

    codes: list[int] = field(default_factory=list)
    """Of each rank; a signal's number below 0."""

    bits: list[str | None] = field(default_factory=list)
    """Of all weights and moments at the end, for each rank that came there."""

    first_update: int | None = None
    moments: list[list[str]] = field(default_factory=list)
    """Names of all moments of each rank, if none was hit."""

    errors: str = ""


def run_jobs(recipe: Path, jobs: list[Job], limit_s: float) -> list[Outcome]:
    """Run them, one after the other, from a process of their own."""
    work = recipe.parent / f"jobs_{jobs[0].name}"
    work.mkdir()
    (work / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    command = [sys.executable, "-m", "tests.parallel.forked_runs", str(recipe), str(work)]
    ended = subprocess.run(command, timeout=limit_s, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return [Outcome(**entry) for entry in json.loads((work / "out.json").read_text())]


class Moments:
    """Counts a rank's moments: stages that begin or end, and steps of saving."""

    def __init__(self, job: Job, rank: int) -> None:
        self._job, self._hit = job, rank == job.rank
        self.names: list[str] = []

    def stage(self, kind: str, name: str) -> None:
        if kind != "at":
            self.come(f"{name} {kind}")

    def come(self, name: str) -> None:
        if self._job.at:
            there = name == self._job.at and self.names.count(name) == self._job.moment
        else:
            there = len(self.names) == self._job.moment
        self.names.append(name)
        if self._hit and there:
            self._hit = False
            if not self._job.signal:
                time.sleep(2 * PATIENCE_S)
            os.kill(os.getpid(), self._job.signal)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Stages tell of themselves; functions that save are wrapped."""
        from megatron_kvpo.checkpoint import state, writing
        from megatron_kvpo.stopwatch import listening

        places = (
            (writing.Writing, "_write"),
            (writing.Writing, "finish"),
            (writing.Writing, "_close"),
            (state, "_publish"),
            (state, "_drop_old"),
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(listening(self.stage))
            for owner, name in places:
                stack.enter_context(mock.patch.object(owner, name, self._around(owner, name)))
            yield

    def _around(self, owner: Any, name: str) -> Any:
        function = getattr(owner, name)

        def around(*args: Any, **kwargs: Any) -> Any:
            self.come(f"save: {name} begins")
            found = function(*args, **kwargs)
            self.come(f"save: {name} ends")
            return found

        return around


def _bits(trace: Any) -> str:
    digest = hashlib.sha256()
    for part in (trace.weights, trace.moments):
        for name in sorted(part):
            digest.update(name.encode() + part[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _rank(recipe: Path, job: Job, rank: int, work: Path) -> None:
    import torch.distributed as dist

    from megatron_kvpo.config import load_config
    from tests.parallel.tiny_run import train_traced

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job.world))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{work}/store",
        rank=rank,
        world_size=job.world,
        timeout=timedelta(seconds=PATIENCE_S),
    )
    moments = Moments(job, rank)
    with moments.watched():
        trace = train_traced(load_config(recipe, [f"name={job.name}", *job.overrides]))
    found = {"bits": _bits(trace) if trace.weights else None, "moments": moments.names,
             "first_update": trace.first_update}  # fmt: skip
    (work / f"{rank}.json").write_text(json.dumps(found))


def _fork(recipe: Path, job: Job, rank: int, work: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    errors = os.open(work / f"{rank}.err", os.O_CREAT | os.O_WRONLY)
    os.dup2(errors, 2)
    try:
        _rank(recipe, job, rank, work)
        code = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stderr.flush()
        os._exit(code)


def _outcome(recipe: Path, job: Job, work: Path) -> Outcome:
    work.mkdir(parents=True)
    pids = [_fork(recipe, job, rank, work) for rank in range(job.world)]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE_S
    while len(codes) < job.world:
        for pid in set(pids) - set(codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) or time.monotonic() > deadline:  # the others wait for it in vain
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    outcome = Outcome(codes=[codes[pid] for pid in pids])
    for rank in range(job.world):
        path = work / f"{rank}.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        outcome.bits.append(found.get("bits"))
        outcome.moments.append(found.get("moments", []))
        outcome.first_update = found.get("first_update", outcome.first_update)
        outcome.errors += (work / f"{rank}.err").read_text()
    return outcome


def main(recipe: Path, work: Path) -> None:
    """All jobs of jobs.json; out.json tells what became of them."""
    for name in ("megatron.core.distributed", "megatron.core.optimizer", "tests.parallel.tiny_run"):
        importlib.import_module(name)

    jobs = [Job(**entry) for entry in json.loads((work / "jobs.json").read_text())]
    outcomes = [asdict(_outcome(recipe, job, work / str(n))) for n, job in enumerate(jobs)]
    (work / "out.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
