"""kill -9 of a rank at any moment costs the updates since the last checkpoint, and no bit."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from tests.parallel.forked_runs import Job, Outcome, run_jobs
from tests.parallel.tiny_run import write_recipe, write_strong_weights

SHORT = ["num_updates=3", "checkpoint.every=1", "alarms.enabled=false"]
BACKGROUND = [*SHORT, "checkpoint.background=true"]
STAGES = ("prefix", "branches", "reward", "decode", "await scores", "replay", "backward", "step",
          "save: _write", "save: finish", "save: _close", "save: _publish")  # fmt: skip


def choose(moments: list[list[str]], overrides: list[str], seed: int, count: int) -> list[Job]:
    """Kills of seeded ranks at seeded moments, each of STAGES before any a second time."""
    draw = random.Random(seed)
    stages = list(STAGES)
    draw.shuffle(stages)
    jobs = []
    for number in range(count):
        stage = stages[number % len(stages)]
        choices = [
            (rank, name, nth)
            for rank, names in enumerate(moments)
            for name in {n for n in names if n.startswith(f"{stage} ")}
            for nth in range(names.count(name))
        ]
        rank, name, nth = draw.choice(sorted(choices))
        jobs.append(Job(f"kill_{seed}_{number}", overrides, rank=rank, at=name, moment=nth))
    return jobs


def assert_nothing_is_lost(recipe: Path, job: Job, killed: Outcome, again: Outcome, whole: Outcome,
                           names: list[str]) -> None:  # fmt: skip
    """The killed run was killed, and the resumed one ends as the undisturbed one."""
    where = f"rank {job.rank} killed at {job.at!r} number {job.moment}: {again.errors[-2000:]}"
    assert killed.codes[job.rank] == -signal.SIGKILL, where
    assert again.codes == [0, 0], where
    assert again.bits == whole.bits, where
    for file in ("metrics.jsonl", "rewards.jsonl"):
        ours, theirs = ((recipe.parent / n / file).read_text() for n in (job.name, "whole"))
        assert ours == theirs, where
    place = [i for i, name in enumerate(names) if name == job.at][job.moment]
    began = names[: place + 1].count("step begins")
    if "_write" in job.at:  # from a thread, beside whatever stage
        began = job.moment + 1
    behind = 2 if "checkpoint.background=true" in job.overrides else 1
    assert began - behind <= (again.first_update or 0) <= began, where


def kill_and_resume(folder: Path, count: int, limit_s: float) -> None:
    """Half of the runs save in the background."""
    recipe = write_recipe(folder, **write_strong_weights(folder))
    whole, behind = run_jobs(recipe, [Job("whole", SHORT), Job("behind", BACKGROUND)], 120)
    assert whole.bits == behind.bits
    assert None not in whole.bits
    jobs = [
        *choose(whole.moments, SHORT, seed=1, count=count - count // 2),
        *choose(behind.moments, BACKGROUND, seed=2, count=count // 2),
    ]
    both = [part for job in jobs for part in (job, Job(job.name, job.overrides))]
    outcomes = run_jobs(recipe, both, limit_s)
    for job, killed, again in zip(jobs, outcomes[::2], outcomes[1::2], strict=True):
        moments = (behind if "checkpoint.background=true" in job.overrides else whole).moments
        assert_nothing_is_lost(recipe, job, killed, again, whole, moments[job.rank])


def test_kills_reach_every_stage_and_both_ranks():
    moments = [[f"{stage} {end}" for stage in STAGES for end in ("begins", "ends")] * 3] * 2
    jobs = choose(moments, SHORT, seed=1, count=len(STAGES))
    assert {job.at.rsplit(" ", 1)[0] for job in jobs} == set(STAGES)
    assert {job.rank for job in jobs} == {0, 1}


@pytest.mark.gloo
def test_a_few_kills_cost_no_bit(tmp_path):
    kill_and_resume(tmp_path, 4, limit_s=600)


@pytest.mark.gloo
@pytest.mark.slow
def test_twenty_kills_cost_no_bit(tmp_path):
    kill_and_resume(tmp_path, 20, limit_s=1800)
