"""The program as a person starts it: one command, its last line, its files, a second start."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_kvpo.config import load_config
from megatron_kvpo.training.metrics import read_jsonl
from tests.parallel.tiny_run import write_recipe

pytest.importorskip("nvidia.dali")

ROOT = Path(__file__).parents[2]
KEYS = {
    "reward_before", "reward_after", "gain_sd", "standard_error", "components",
    "held_out_before", "held_out_after", "updates", "seconds_per_update", "ranks",
}  # fmt: skip
TRAINED = ["visual_quality", "motion_quality", "text_alignment"]
HELD_OUT = "temporal_consistency"


@dataclass(frozen=True)
class Started:
    """One start of the program."""

    folder: Path
    """Of the run."""

    result: dict[str, Any]
    """The last line of stdout."""

    stdout: str
    stderr: str

    @property
    def updates(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl that tell of an update."""
        return [line for line in self._lines if "loss/total" in line]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl that tell of an evaluation."""
        return [line for line in self._lines if "eval/composite" in line]

    @property
    def _lines(self) -> list[dict[str, Any]]:
        return read_jsonl(self.folder / "metrics.jsonl")


def _torchrun() -> list[str]:
    """How the Makefile starts two ranks."""
    (flags,) = re.findall(r"^RANKS := \$\(BIN\)/torchrun (.*)$", (ROOT / "Makefile").read_text(),
                          re.MULTILINE)  # fmt: skip
    assert "--nproc_per_node 2" in flags
    return [sys.executable, "-m", "torch.distributed.run", *flags.split()]


def _start(launcher: list[str], recipe: Path, name: str, *overrides: str) -> Started:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [*launcher, "-m", "megatron_kvpo.train", str(recipe), f"name={name}", *overrides],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    return Started(recipe.parent / name, result, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    return write_recipe(
        folder,
        reward={"weights": dict.fromkeys(TRAINED, 1.0), "held_out": [HELD_OUT]},
        evaluation={"prompts": str(folder / "prompts.jsonl"), "noises_per_prompt": 2,
                    "filmstrips": 2},
        checkpoint={"every": 1, "keep": 2},
        log={"wandb": "disabled", "report": True, "costs": True, "tensorboard": True,
             "samples_every": 2, "peak_tflops": 1.0},
    )  # fmt: skip


@pytest.fixture(scope="module")
def by_two_ranks(recipe) -> Started:
    return _start(_torchrun(), recipe, "demo", "num_updates=2", "log.wandb=offline")


@pytest.mark.gloo
def test_two_ranks_leave_one_line_and_every_file_that_was_promised(by_two_ranks):
    run, result = by_two_ranks, by_two_ranks.result
    assert result.keys() >= KEYS
    assert len(run.stdout.splitlines()) == 1, "stdout is for the result"
    assert json.loads((run.folder / "summary.json").read_text()) == result
    assert (result["updates"], result["ranks"]) == (2, 2)
    assert (result["prompts"], result["videos"]) == (4, 8)
    assert result["seconds_per_update"] > 0
    assert result["components"].keys() == {*TRAINED, HELD_OUT}
    parts = result["components"]
    assert all(part.keys() >= {"before", "after", "gain_sd", "standard_error"}
               for part in parts.values())  # fmt: skip
    mean = sum(parts[name]["before"] for name in TRAINED) / 3
    assert result["reward_before"] == pytest.approx(mean, rel=1e-5)
    assert result["held_out_before"] == parts[HELD_OUT]["before"]
    assert result["gain_sd"] != 0

    assert [line["update"] for line in run.updates] == [0, 1]
    assert [line["update"] for line in run.evaluations] == [0, 2]
    for line, key in zip(run.evaluations, ("reward_before", "reward_after"), strict=True):
        assert line["eval/composite"] == pytest.approx(result[key], rel=1e-5)
    files = {str(p.relative_to(run.folder)) for p in run.folder.rglob("*") if p.is_file()}
    assert files >= {
        "config.yaml", "summary.json", "metrics.jsonl", "run.log", "report.html",
        "evaluation_before.npz", "evaluation_after.npz",
        *(f"filmstrips/{name}.npz" for name in ("before", "after", "real", "branches")),
        "filmstrips/before.gif", "filmstrips/after.gif",
        "checkpoints/latest.json", "checkpoints/step_00000002/metadata.json",
    }  # fmt: skip
    assert any(name.endswith(".png") for name in files)
    assert list(run.folder.glob("wandb/offline-run-*"))
    _assert_costs(run)
    samples = {p.name for p in (run.folder / "samples" / "update_000000").iterdir()}
    assert samples == {"anchor.mp4", "best.mp4", "worst.mp4"}
    assert len(list((run.folder / "samples").iterdir())) == 1
    report = (run.folder / "report.html").read_text()
    assert "<html" in report
    assert f"{result['gain_sd']:+.2f}"[:4] in report
    for step in ("update 1/2", "update 2/2", "left"):
        assert step in run.stderr


def _assert_costs(run: Started) -> None:
    """Every update says what its stages took, and what it holds."""
    stages = ("prefix", "branches", "reward", "replay", "backward", "step", "update")
    for line in run.updates:
        assert all(line[f"time/{name}_s"] > 0 for name in stages)
        assert line["time/update_s"] > line["time/replay_s"] + line["time/backward_s"]
        for name in ("prefix", "branches", "replay", "backward", "update"):
            assert line[f"speed/{name}_mfu"] == line[f"speed/{name}_tflops"] > 0
            assert line[f"speed/{name}_tokens_per_s"] > 0
        assert "speed/step_mfu" not in line
        assert line["memory/host_peak_gib"] > 0.1
    assert "time/evaluate_s" in run.updates[0]
    assert "time/save_s" in run.updates[1]
    scores = read_jsonl(run.folder / "rewards.jsonl")
    assert all(len(line["energy"]) == 5 and line["energy"][0] > 0 for line in scores)
    assert all(abs(line["energy"][4]) < 1e-9 for line in scores if line["update"] == 0)


def _assert_tensorboard_has(run: Started) -> None:
    """The same values as metrics.jsonl, each once; the pictures, of starts that resumed too."""
    events = EventAccumulator(str(run.folder / "tensorboard"), {"scalars": 0, "images": 0})
    events.Reload()
    for name in ("loss/total", "policy/grad_norm", "time/update_s"):
        told = [(event.step, event.value) for event in events.Scalars(name)]
        written = [(line["update"], np.float32(line[name])) for line in run.updates]
        assert told == written
    told = [(event.step, event.value) for event in events.Scalars("eval/composite")]
    assert told == [(line["update"], np.float32(line["eval/composite"]))
                    for line in run.evaluations]  # fmt: skip
    assert [event.step for event in events.Images("sample/best")] == [0, 2]
    steps = [event.step for event in events.Images("eval/videos")]
    assert (steps[0], steps[-1]) == (0, 3)


@pytest.mark.gloo
def test_the_next_start_goes_on_where_the_last_one_ended_even_on_fewer_ranks(by_two_ranks, recipe):
    before = by_two_ranks.updates
    more = _start([sys.executable], recipe, "demo", "num_updates=3")
    assert "step_00000002: 2 updates are done" in more.stderr
    assert (more.result["updates"], more.result["ranks"]) == (3, 1)
    assert more.updates[:2] == before
    assert [line["update"] for line in more.updates] == [0, 1, 2]
    # The first run's last evaluation is of the weights that the second began with: it stays.
    assert [line["update"] for line in more.evaluations] == [0, 2, 3]
    assert more.result["reward_before"] == pytest.approx(
        by_two_ranks.result["reward_before"], abs=1e-5
    )
    _assert_tensorboard_has(more)
    checkpoints = sorted(p.name for p in (more.folder / "checkpoints").glob("step_*"))
    assert checkpoints == ["step_00000002", "step_00000003"]

    again = _start([sys.executable], recipe, "demo", "num_updates=3")
    assert "step_00000003: 3 updates are done" in again.stderr
    assert again.updates == more.updates
    assert [line["update"] for line in again.evaluations] == [0, 2, 3]
    assert again.result == more.result


def test_a_learning_rate_of_0_gains_exactly_nothing(recipe):
    overrides = ["num_updates=2", "seed=5", "optimizer.lr=0", "optimizer.weight_decay=0.1"]
    run = _start([sys.executable], recipe, "still", *overrides)
    result = run.result
    assert (result["gain_sd"], result["standard_error"]) == (0, 0)
    assert result["reward_after"] == result["reward_before"]
    assert all(part["gain_sd"] == 0 for part in result["components"].values())
    assert (result["seed"], result["name"], result["updates"]) == (5, "still", 2)
    assert all(line["policy/grad_norm"] > 0 for line in run.updates)
    before, after = (np.load(run.folder / f"evaluation_{name}.npz") for name in ("before", "after"))
    np.testing.assert_array_equal(before["score_KRM"], after["score_KRM"])
    wanted = load_config(recipe, ["name=still", *overrides])
    assert load_config(run.folder / "config.yaml") == wanted
    assert wanted.optimizer.lr == 0


def test_a_gamed_reward_ends_the_run_with_all_that_a_run_leaves(recipe, tmp_path):
    """Held-out rewards are said to fall: the guard stops the run, which stays stopped."""
    launcher = tmp_path / "gamed.py"
    launcher.write_text(
        "import runpy, sys, types\n"
        "from megatron_kvpo.training import guard\n"
        "guard.paired_gain = lambda base, now, name=None: types.SimpleNamespace(\n"
        "    gain_sd=1.0 if name is None else -1.0)\n"
        "sys.argv = sys.argv[2:]\n"
        "runpy.run_module('megatron_kvpo.train', run_name='__main__', alter_sys=True)\n"
    )
    overrides = ["num_updates=3", "evaluation.every=1", "reward.guard.patience=1"]
    stop = "reward.guard.stop=true"
    run = _start([sys.executable, str(launcher)], recipe, "gamed", *overrides, stop)
    assert run.result["updates"] == 1
    assert "the run ends here" in run.stderr
    assert [line["update"] for line in run.updates] == [0]
    assert run.evaluations[1][f"eval/{HELD_OUT}_sd"] == -1
    assert (run.folder / "checkpoints" / "step_00000001").is_dir()
    assert (run.folder / "report.html").is_file()
    scores = read_jsonl(run.folder / "rewards.jsonl")
    assert {line["update"] for line in scores} == {0}
    assert all(set(line["local"]) == set(TRAINED) for line in scores)
    again = _start([sys.executable], recipe, "gamed", *overrides, stop)
    assert "the guard of the rewards ended this run" in again.stderr
    assert again.result["updates"] == 1
    assert again.updates == run.updates
    on = _start([sys.executable], recipe, "gamed", *overrides, "reward.guard.stop=false")
    assert on.result["updates"] == 3
    assert [line["update"] for line in read_jsonl(run.folder / "rewards.jsonl")] == sorted(
        line["update"] for line in read_jsonl(run.folder / "rewards.jsonl")
    )
    assert len(on.updates) == 3
