"""Is the gain the method's? Real, shuffled, negated and lr 0 arms over three seeds.

    make evidence                               or
    python -m tools.evidence --jobs 2 --set num_updates=40

A gain over zero proves nothing: random updates move a reward too. What counts is the paired
difference from the shuffled arm at the same prompts, noises and number of updates. Runs that are
finished under the same settings are kept, so an interrupted call goes on where it stopped.
Writes evidence_shapes.{json,md,png} and evidence_filmstrips.png. Exit code 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_kvpo import log, settings
from megatron_kvpo.config import RunConfig, load_config
from tools import evidence_report, provenance

logger = log.get_logger("megatron_kvpo.tools.evidence")

ARMS: dict[str, tuple[str, ...]] = {
    "real": (),
    "shuffled": ("advantage.control=shuffled",),
    "negated": ("advantage.control=negated",),
    "lr0": ("optimizer.lr=0",),
}
_TAIL_LINES = 25


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run of one arm."""

    arm: str
    seed: int
    config: RunConfig
    command: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return self.config.run_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, collect, judge, write. 0 if no check failed."""
    options = _parse(arguments)
    jobs = plan_jobs(options)
    log.setup(True, options.folder)
    if not options.collect_only:
        run_all(jobs, options.jobs, options.fresh)
    else:
        unfinished = [job.config.name for job in jobs if not is_complete(job)]
        if unfinished:
            raise ValueError(f"runs {unfinished} are not finished: run without --collect-only")
    runs = [evidence_report.Run.read(job.arm, job.seed, job.folder) for job in jobs]
    made_by = {
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "command": " ".join(["python", "-m", "tools.evidence", *(arguments or sys.argv[1:])]),
        "run_command": " ".join(jobs[0].command),
        "recipe": str(options.recipe),
        "overrides": list(options.set),
        "config": settings.to_mapping(jobs[0].config),
    }
    return evidence_report.write(runs, made_by, options.output)


def plan_jobs(options: argparse.Namespace) -> list[Job]:
    """Every run of the experiment, arms interleaved by seed. ValueError for an unknown arm."""
    unknown = [arm for arm in options.arms if arm not in ARMS]
    if unknown:
        raise ValueError(f"unknown arms {unknown}: choose among {list(ARMS)}")
    evaluation = []
    if options.prompts is not None:
        evaluation.append(f"evaluation.prompts={options.prompts}")
    if options.noises is not None:
        evaluation.append(f"evaluation.noises_per_prompt={options.noises}")
    jobs = []
    for seed in options.seeds:
        for arm in options.arms:
            overrides = [*evaluation, *options.set, *ARMS[arm], f"name={arm}_{seed}",
                         f"folder={options.folder}", f"seed={seed}"]  # fmt: skip
            module = ["megatron_kvpo.train", str(options.recipe), *overrides]
            torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node"]
            launch = [*torchrun, str(options.ranks), "-m"] if options.ranks > 1 else []
            command = (sys.executable, "-m", *launch, *module)
            config = load_config(options.recipe, overrides)
            jobs.append(Job(arm=arm, seed=seed, config=config, command=command))
    return jobs


def is_complete(job: Job) -> bool:
    """Whether the run is finished under these settings. ValueError if it was begun under others."""
    path = job.folder / "config.yaml"
    if not path.is_file():
        return False
    wanted = json.loads(json.dumps(settings.to_mapping(job.config)))
    found = yaml.safe_load(path.read_text())
    if found != wanted:
        changed = ", ".join(differences(found, wanted))
        raise ValueError(
            f"{job.folder} holds a run with other settings ({changed}): pass --fresh to replace it "
            "or --folder to write elsewhere"
        )
    names = ("summary.json", "evaluation_before.npz", "evaluation_after.npz")
    return all((job.folder / name).is_file() for name in names)


def differences(found: Any, wanted: Any, where: str = "") -> list[str]:
    """`section.key: old -> new` for each setting that differs."""
    if not isinstance(found, dict) or not isinstance(wanted, dict):
        return [] if found == wanted else [f"{where}: {found} -> {wanted}"]
    changed = []
    for key in sorted({*found, *wanted}):
        path = f"{where}.{key}" if where else str(key)
        changed += differences(found.get(key), wanted.get(key), path)
    return changed


def run_all(jobs: Sequence[Job], parallel: int, fresh: bool = False) -> None:
    """Run what is not complete, `parallel` at a time. RuntimeError with the log's end if one fails.

    The first failure stops the runs beside it.
    """
    if fresh:
        for job in jobs:
            shutil.rmtree(job.folder, ignore_errors=True)
    waiting = [job for job in jobs if not is_complete(job)]
    logger.info("%d runs, %d already complete", len(jobs), len(jobs) - len(waiting))
    runner = _Runner(len(waiting))
    with ThreadPoolExecutor(max_workers=parallel) as pool:
        futures = [pool.submit(runner.run, job) for job in waiting]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        except KeyboardInterrupt:
            runner.stop()
            raise
        failed = [error for future in done if (error := future.exception()) is not None]
        if failed:
            runner.stop()
            raise failed[0]


class _Runner:
    """Starts runs and can end those it started."""

    def __init__(self, total: int) -> None:
        self._total, self._finished = total, 0
        self._stopped = threading.Event()
        self._running: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()

    def run(self, job: Job) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        path = job.folder / "output.log"
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        start_s = time.monotonic()
        with path.open("wb") as output:
            with self._lock:
                if self._stopped.is_set():
                    return
                process = subprocess.Popen(job.command, stdout=output, stderr=subprocess.STDOUT,
                                           env=environment)  # fmt: skip
                self._running.append(process)
            logger.info("started %s: log in %s", job.config.name, path)
            code = process.wait()
        with self._lock:
            self._running.remove(process)
            if self._stopped.is_set():
                return
            self._finished += 1
        if code or not is_complete(job):
            tail = "\n".join(path.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
            what = f"ended with code {code}" if code else "ended without its evaluation files"
            raise RuntimeError(f"run {job.config.name} {what}; the end of {path}:\n{tail}")
        seconds = time.monotonic() - start_s
        took = {
            "commit": provenance.commit(),
            "command": list(job.command),
            "seconds": round(seconds, 1),
        }
        (job.folder / "provenance.json").write_text(json.dumps(took) + "\n")
        logger.info("finished %s in %s (%d of %d)", job.config.name, log.format_duration(seconds),
                    self._finished, self._total)  # fmt: skip

    def stop(self) -> None:
        with self._lock:
            self._stopped.set()
            for process in self._running:
                process.terminate()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=Path("examples/shapes/demo.yaml"))
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--prompts", type=Path, help="to evaluate on; default: the recipe's")
    parser.add_argument("--noises", type=int, help="per prompt; default: the recipe's")
    parser.add_argument("--seeds", type=_numbers, default=[1, 2, 3], help="comma-separated")
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--ranks", type=int, default=1, help="ranks of each run")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="for every run")
    parser.add_argument("--fresh", action="store_true", help="delete earlier runs first")
    parser.add_argument("--collect-only", action="store_true", help="judge what is there")
    return parser.parse_args(arguments)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    log.run_command(main, logger)
