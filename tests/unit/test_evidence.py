"""The verdict on made-up arms, and a runner that resumes, refuses and stops."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_kvpo.config import load_config
from tests import quiet
from tests.unit import _synthetic_run
from tests.unit._synthetic_run import write_run
from tools import evidence, evidence_report

GAINS = {"real": 0.6, "shuffled": 0.1, "negated": -0.4, "lr0": 0.0}


_quiet_afterwards = quiet.quiet_afterwards


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "evidence.yaml"
    path.write_text("num_updates: 40\nreward: {weights: {vq: 1.0}, held_out: [consistency]}\n")
    return path


def options(recipe, *more):
    folder = recipe.parent
    base = [
        "--recipe",
        str(recipe),
        "--folder",
        str(folder / "runs"),
        "--output",
        str(folder / "out"),
    ]
    return evidence._parse([*base, *more])


def arguments(recipe, *more):
    folder = recipe.parent
    return ["--recipe", str(recipe), "--folder", str(folder / "runs"),
            "--output", str(folder / "out"), *more]  # fmt: skip


def write_all(recipe, gains=GAINS, **more):
    """Every run as it would be, with the base's scores equal in the arms of a seed."""
    for job in evidence.plan_jobs(options(recipe)):
        write_run(job.folder, job.config, gains[job.arm], base_seed=job.seed, **more)


def verdicts(recipe):
    jobs = evidence.plan_jobs(options(recipe))
    runs = [evidence_report.Run.read(job.arm, job.seed, job.folder) for job in jobs]
    return {check.name: check.passed for check in evidence_report.judge(runs)}


def test_every_arm_and_seed_is_planned_with_its_overrides(recipe):
    jobs = evidence.plan_jobs(options(recipe, "--seeds", "1,2", "--set", "num_updates=5"))
    assert [(job.arm, job.seed) for job in jobs] == [
        (arm, seed) for seed in (1, 2) for arm in ("real", "shuffled", "negated", "lr0")
    ]
    found = {job.arm: job for job in jobs if job.seed == 2}
    assert found["shuffled"].config.advantage.control == "shuffled"
    assert found["negated"].config.advantage.control == "negated"
    assert found["lr0"].config.optimizer.lr == 0
    assert found["real"].config.advantage.control == "none"
    assert {job.config.num_updates for job in jobs} == {5}
    assert found["real"].command[1:4] == ("-m", "megatron_kvpo.train", str(recipe))
    assert (
        load_config(found["lr0"].command[3], list(found["lr0"].command[4:])) == found["lr0"].config
    )


def test_every_arm_is_evaluated_on_the_prompts_that_were_asked_for(recipe):
    asked = ("--prompts", "other.jsonl", "--noises", "3")
    for job in evidence.plan_jobs(options(recipe, *asked)):
        assert job.config.evaluation.prompts == Path("other.jsonl")
        assert job.config.evaluation.noises_per_prompt == 3
    own = evidence.plan_jobs(options(recipe))[0].config.evaluation
    assert own.prompts != Path("other.jsonl")


def test_several_ranks_go_through_torchrun(recipe):
    job = evidence.plan_jobs(options(recipe, "--ranks", "2"))[0]
    assert job.command[1:7] == (
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"
    )  # fmt: skip


def test_an_unknown_arm_is_refused(recipe):
    with pytest.raises(ValueError, match="unknown arms"):
        evidence.plan_jobs(options(recipe, "--arms", "real,random"))


def test_good_arms_pass_every_check_and_all_files_are_written(recipe):
    write_all(recipe)
    assert evidence.main(arguments(recipe, "--collect-only")) == 0
    out = recipe.parent / "out"
    result = json.loads((out / "evidence_shapes.json").read_text())
    assert all(check["passed"] for check in result["checks"])
    assert len(result["checks"]) == 7
    assert len(result["runs"]) == 12
    assert {"commit", "versions", "command", "recipe", "config"} <= set(result)
    pair = result["contrasts"]["real - shuffled"]["composite"]
    assert pair["num_seeds"] == 3
    assert pair["num_prompts"] == 32
    table = (out / "evidence_shapes.md").read_text()
    assert table.count("| pass |") == 7
    assert table.count("\n| real | ") == 3
    assert "consistency (held out)" in table
    for name in ("evidence_shapes.png", "evidence_filmstrips.png"):
        assert min(Image.open(out / name).size) > 150


@pytest.mark.parametrize(
    ("gains", "failing"),
    [
        ({"real": 0.1}, ["mean gain at least 0.2 SD", "real - shuffled at least 0.25 SD"]),
        ({"shuffled": 0.55}, ["real - shuffled at least 0.25 SD"]),
        ({"negated": 0.3}, ["negated below shuffled"]),
        ({"lr0": 1e-5}, ["lr 0 changes nothing at all"]),
    ],
)
def test_each_check_fails_for_its_own_fault(recipe, gains, failing):
    write_all(recipe, GAINS | gains)
    found = verdicts(recipe)
    failed = [name for name, passed in found.items() if not passed]
    assert len(failed) == len(failing)
    assert all(a.startswith(b) for a, b in zip(failed, failing, strict=True))


def test_one_bad_seed_fails_although_the_mean_is_good(recipe):
    write_all(recipe)
    [job] = [j for j in evidence.plan_jobs(options(recipe)) if (j.arm, j.seed) == ("real", 2)]
    write_run(job.folder, job.config, gain=-0.05, base_seed=2)
    found = verdicts(recipe)
    assert found["mean gain at least 0.2 SD"]
    assert not found["every seed's gain above 0"]


def test_a_falling_held_out_reward_fails(recipe):
    write_all(recipe, held_out_gain=-0.05)
    found = verdicts(recipe)
    assert [name for name, passed in found.items() if not passed] == [
        "held-out consistency falls by no more than one standard error"
    ]


def test_arms_that_start_apart_fail(recipe):
    write_all(recipe)
    [job] = [j for j in evidence.plan_jobs(options(recipe)) if (j.arm, j.seed) == ("negated", 3)]
    write_run(job.folder, job.config, gain=-0.4, base_seed=99)
    assert not verdicts(recipe)["arms of a seed start at the same scores"]


def test_a_failed_check_still_writes_everything_and_returns_one(recipe):
    write_all(recipe, GAINS | {"real": 0.1})
    assert evidence.main(arguments(recipe, "--collect-only")) == 1
    assert "**fail**" in (recipe.parent / "out" / "evidence_shapes.md").read_text()


def test_checks_whose_arms_are_absent_are_not_run(recipe):
    write_all(recipe)
    assert evidence.main(arguments(recipe, "--collect-only", "--arms", "real")) == 0
    checks = json.loads((recipe.parent / "out" / "evidence_shapes.json").read_text())["checks"]
    assert [check["passed"] for check in checks].count(None) == 3


def test_collecting_unfinished_runs_names_them(recipe):
    write_all(recipe)
    (recipe.parent / "runs" / "real_2" / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"\['real_2'\] are not finished"):
        evidence.main(arguments(recipe, "--collect-only"))


def test_runs_made_under_other_settings_are_refused_with_the_difference(recipe):
    write_all(recipe)
    with pytest.raises(ValueError, match=r"other settings \(num_updates: 40 -> 41\)"):
        evidence.main(arguments(recipe, "--set", "num_updates=41"))


WRITER = """
import sys
from megatron_kvpo.config import load_config
from tests.unit._synthetic_run import write_run
config = load_config(sys.argv[1], sys.argv[2:])
print("starting", config.name, flush=True)
assert config.name != "shuffled_1", "the loss is nan"
write_run(config.run_folder, config, gain=0.5, updates=2)
"""


def stand_in(monkeypatch, recipe, jobs):
    """The same jobs with a script in the place of the training module."""
    script = recipe.parent / "writer.py"
    script.write_text(WRITER)
    root = str(
        next(p for p in evidence.Path(_synthetic_run.__file__).parents if p.name == "tests").parent
    )
    monkeypatch.setenv("PYTHONPATH", root)
    return [
        evidence.Job(
            arm=job.arm, seed=job.seed, config=job.config,
            command=(sys.executable, str(script), *job.command[3:]),
        )
        for job in jobs
    ]  # fmt: skip


def test_only_missing_runs_are_started_and_leave_their_provenance(recipe, monkeypatch):
    jobs = evidence.plan_jobs(options(recipe, "--seeds", "1", "--arms", "real,lr0"))
    write_run(jobs[0].folder, jobs[0].config)
    jobs = stand_in(monkeypatch, recipe, jobs)
    evidence.run_all(jobs, parallel=2)
    assert not (jobs[0].folder / "output.log").exists()
    assert "starting lr0_1" in (jobs[1].folder / "output.log").read_text()
    assert json.loads((jobs[1].folder / "provenance.json").read_text())["seconds"] > 0
    stamp = (jobs[1].folder / "summary.json").stat().st_mtime_ns
    evidence.run_all(jobs, parallel=2)
    assert (jobs[1].folder / "summary.json").stat().st_mtime_ns == stamp


def test_a_failing_run_stops_the_tool_with_the_end_of_its_log(recipe, monkeypatch):
    jobs = evidence.plan_jobs(options(recipe, "--seeds", "1", "--arms", "shuffled,real"))
    jobs = stand_in(monkeypatch, recipe, jobs)
    with pytest.raises(RuntimeError, match="run shuffled_1 ended with code 1") as error:
        evidence.run_all(jobs, parallel=1)
    assert "the loss is nan" in str(error.value)
    assert not evidence.is_complete(jobs[1])


def test_infinite_z_is_written_as_text(tmp_path):
    found = evidence_report._jsonable({"z": float("inf"), "runs": [{"gain": np.float64(0.5)}]})
    assert json.loads(json.dumps(found, allow_nan=False)) == {"z": "inf", "runs": [{"gain": 0.5}]}
