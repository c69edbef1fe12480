"""Damaged checkpoints, saves that fail or go on in the background, signals, other layouts."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kvpo import settings
from megatron_kvpo.checkpoint.checksums import NAME
from megatron_kvpo.checkpoint.state import Saving, load, newest_sound, retire, save
from megatron_kvpo.config import CheckpointConfig, ParallelConfig
from megatron_kvpo.parallel.groups import start_ranks, stop_ranks
from megatron_kvpo.training.metrics import read_jsonl
from megatron_kvpo.training.recovery import Saver, StopSignal
from tests.parallel.forked_runs import Job, run_jobs
from tests.parallel.tiny import Tiny
from tests.parallel.tiny_run import write_recipe, write_strong_weights

LOGGER = "megatron_kvpo.checkpoint.state"


@pytest.fixture
def alone():
    yield start_ranks(ParallelConfig(timeout_s=120), "cpu")
    stop_ranks()


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [_flip, _cut, Path.unlink])
@pytest.mark.parametrize("name", ["__0_0.distcp", "common.pt", ".metadata", "metadata.json", NAME])
def test_damage_to_any_file_is_named_and_the_one_before_is_used(
    alone, tmp_path, harm, name, caplog
):
    if (harm, name) == (Path.unlink, NAME):
        pytest.skip("a checkpoint without sums is older than they are")
    tree = Tiny(alone, seed=0).sharded()
    first, second = (save(tmp_path, step, dict(tree), alone, keep=3) for step in (1, 2))
    assert newest_sound(tmp_path, alone) == second
    if not (second / name).exists():
        pytest.skip("from megatron-core 0.19 on it is among the tensors")
    harm(second / name)
    with pytest.raises(ValueError, match=r"step_00000002 (cannot be read|lacks)"):
        load(second, dict(tree), alone)
    with caplog.at_level(logging.WARNING, LOGGER):
        logging.getLogger("megatron_kvpo").propagate = True
        assert newest_sound(tmp_path, alone) == first
    assert "step_00000002 is damaged" in caplog.text
    assert name in caplog.text or (harm, name) == (_flip, NAME)  # the sum of another file, say
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "latest.json", "step_00000001", "step_00000002.damaged",
    ]  # fmt: skip


def test_a_checkpoint_of_a_later_megatron_is_told_from_a_damaged_one(alone, tmp_path):
    tree = Tiny(alone, seed=0).sharded()
    path = save(tmp_path, 1, dict(tree), alone, keep=1)
    if not (path / "common.pt").exists():
        pytest.skip("this megatron-core is the later one")
    (path / "common.pt").unlink()
    (path / NAME).unlink()  # as if it had been written so
    with pytest.raises(ValueError, match=r"has no common.pt: .* reads none of these"):
        load(path, dict(tree), alone)


def test_when_all_are_damaged_nothing_is_renamed_and_the_run_does_not_start_anew(alone, tmp_path):
    assert newest_sound(tmp_path, alone) is None
    path = save(tmp_path, 1, Tiny(alone, seed=0).sharded(), alone, keep=1)
    _flip(path / "__0_0.distcp")
    with pytest.raises(ValueError, match=r"none of the 1 checkpoints .*\.resume=never"):
        newest_sound(tmp_path, alone)
    assert path.is_dir()
    retire(tmp_path, alone)
    assert newest_sound(tmp_path, alone) is None
    assert (tmp_path / "step_00000001.old").is_dir()


def test_later_checkpoints_of_another_run_do_not_push_out_new_ones(alone, tmp_path):
    tree = Tiny(alone, seed=0).sharded()
    for step in (8, 9, 1, 2, 3):
        save(tmp_path, step, dict(tree), alone, keep=2)
    assert sorted(p.name[-1] for p in tmp_path.glob("step_*")) == ["2", "3", "8", "9"]


def test_a_save_in_the_background_holds_what_was_there_when_it_began(alone, tmp_path, monkeypatch):
    gate = threading.Event()
    model = Tiny(alone, seed=0)
    ready = save(tmp_path / "now", 1, model.sharded(), alone, keep=1)
    from megatron_kvpo.checkpoint import writing

    write = writing.Writing._write
    monkeypatch.setattr(writing.Writing, "_write", lambda *a: (gate.wait(20), write(*a)))
    saving = Saving(tmp_path / "later", 1, model.sharded(), alone, 1, background=True)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert not saving.done
    assert not (tmp_path / "later" / "step_00000001").exists()
    gate.set()
    assert files_of(saving.finish()) == files_of(ready)


class Failing:
    """Stands for Saving; fails as often as it is told."""

    left = 0

    def __init__(self, folder: Path, step: int, *_: Any, **__: Any) -> None:
        self.step, self.done = step, True

    def finish(self) -> None:
        if Failing.left:
            Failing.left -= 1
            raise OSError("No space left on device")


@pytest.mark.parametrize("background", [False, True])
def test_a_failed_save_is_a_warning_unless_it_repeats_or_is_the_last(
    alone, tmp_path, monkeypatch, background
):
    monkeypatch.setattr("megatron_kvpo.training.recovery.Saving", Failing)
    config = CheckpointConfig(background=background, tolerated_failures=1)
    saver = Saver(config, tmp_path, alone, saved=0)
    for step in (1, 2, 3):  # the middle one fails
        Failing.left = int(step == 2)
        saver.save(step, dict)
        saver.settle()
        assert saver.saved == (1 if step == 2 else step)
    Failing.left = 2
    saver.save(4, dict)
    with pytest.raises(OSError, match=r"No space left on device \(failure 2 in a row\)"):
        saver.save(5, dict) or saver.settle()
    fresh = Saver(config, tmp_path, alone, saved=0)
    Failing.left = 1
    with pytest.raises(OSError, match="No space left"):
        fresh.save(1, dict, last=True)


def test_resume_takes_words_and_truth_values_and_pre_training_can_ask_if():
    read = {word: settings.from_mapping(CheckpointConfig, {"resume": word}).resume
            for word in ("auto", "never", "must", True, False)}  # fmt: skip
    assert read["auto"] is True
    assert read["never"] is False
    assert read["must"] == "must"
    with pytest.raises(ValueError, match=r"resume is 'may'"):
        settings.from_mapping(CheckpointConfig, {"resume": "may"})
    for name, value in (("every", -1), ("keep", 0), ("tolerated_failures", -1)):
        with pytest.raises(ValueError, match=rf"checkpoint.{name} is {value}"):
            CheckpointConfig(**{name: value})


def test_signals_are_heard_while_watched_and_as_before_afterwards():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append("before"))
    try:
        stop = StopSignal()
        with stop.watched():
            signal.raise_signal(signal.SIGUSR1)
            assert stop.number == signal.SIGUSR1
        assert not heard
        signal.raise_signal(signal.SIGUSR1)
        assert heard == ["before"]
    finally:
        signal.signal(signal.SIGUSR1, before)


SHORT = ["num_updates=3", "checkpoint.every=2", "alarms.enabled=false"]


def lines_of(recipe: Path, name: str) -> tuple[str, str]:
    folder = recipe.parent / name
    return (folder / "metrics.jsonl").read_text(), (folder / "rewards.jsonl").read_text()


@pytest.mark.gloo
def test_signals_and_background_saves_leave_the_run_as_it_was(tmp_path):
    recipe = write_recipe(tmp_path, **write_strong_weights(tmp_path))
    background = [*SHORT, "checkpoint.background=true"]
    jobs = [
        Job("whole", SHORT), Job("background", background),
        Job("term", SHORT, rank=1, moment=5, signal=signal.SIGTERM), Job("term", SHORT),
        Job("user", background, rank=0, at="save: _write begins",
            signal=signal.SIGUSR1), Job("user", background),
        Job("must", [*SHORT, "checkpoint.resume=must"]),
    ]  # fmt: skip
    whole, behind, term, after_term, user, after_user, must = run_jobs(recipe, jobs, 300)
    assert all(o.codes == [0, 0] for o in (whole, behind, term, after_term, user, after_user))
    assert "asked to end by SIGTERM: 1 updates are done and saved" in term.errors
    assert "asked to end by SIGUSR1: 2 updates are done and saved" in user.errors
    assert (after_term.first_update, after_user.first_update) == (1, 2)
    for name, outcome in (("background", behind), ("term", after_term), ("user", after_user)):
        assert outcome.bits == whole.bits
        assert None not in outcome.bits
        assert lines_of(recipe, name) == lines_of(recipe, "whole")
    for step in (2, 3):
        ours, theirs = (files_of(tmp_path / n / f"checkpoints/step_{step:08d}")
                        for n in ("whole", "background"))  # fmt: skip
        assert ours == theirs
        assert {"__0_0.distcp", "__1_0.distcp"} <= set(ours), "one rank wrote all"
    assert 0 not in must.codes
    assert "resume is must" in must.errors


@pytest.mark.gloo
def test_one_and_four_ranks_go_on_from_two_and_from_the_one_before_a_damaged_one(tmp_path):
    recipe = write_recipe(tmp_path, **write_strong_weights(tmp_path))
    every = [*SHORT, "checkpoint.every=1", "checkpoint.keep=3"]
    (whole,) = run_jobs(recipe, [Job("whole", every)], 120)
    assert whole.codes == [0, 0]
    _flip(tmp_path / "whole/checkpoints/step_00000003/__0_0.distcp")
    _cut(tmp_path / "whole/checkpoints/step_00000002/__0_0.distcp")
    for name in ("one", "four"):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
    jobs = [Job("one", every, world=1), Job("four", [*every, "parallel.branch=2"], world=4)]
    for job, outcome in zip(jobs, run_jobs(recipe, jobs, 180), strict=True):
        assert outcome.codes == [0] * job.world, outcome.errors
        assert outcome.first_update == 1
        assert "step_00000003 is damaged: __0_0.distcp holds other bytes" in outcome.errors
        assert "step_00000002 is damaged: __0_0.distcp has" in outcome.errors
        groups = [
            [(line["update"], line["prompt"], line["fork"]) for line in read_jsonl(folder)]
            for folder in (tmp_path / n / "rewards.jsonl" for n in ("whole", job.name))
        ]
        assert groups[0] == groups[1]
        assert len(groups[0]) == 6
        metrics = [read_jsonl(tmp_path / n / "metrics.jsonl") for n in ("whole", job.name)]
        for ours, theirs in zip(*metrics, strict=True):
            assert ours["reward/composite"] == pytest.approx(theirs["reward/composite"], abs=1e-4)
    latest = json.loads((tmp_path / "one/checkpoints/latest.json").read_text())
    assert latest["step"] == 3
