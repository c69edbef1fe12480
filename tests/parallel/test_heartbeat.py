"""A rank that stops or hangs is named, with all ranks' stacks, and the run ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_kvpo.config import HeartbeatConfig
from megatron_kvpo.stopwatch import listening, passing, stage
from megatron_kvpo.training.heartbeat import EXIT_CODE, Beat, find_late, process_state
from tests.parallel.forked_runs import PATIENCE_S, Job, run_jobs
from tests.parallel.tiny_run import write_recipe, write_strong_weights

BEAT = Beat(
    rank=0, host=socket.gethostname(), pid=os.getpid(), update=4, stage="replay", where="",
    idle_s=50.0, collectives={"world": 9, "data": 5}, inside="all_reduce from a.py:1",
)  # fmt: skip


def test_stages_and_places_are_heard_and_only_inside():
    heard: list[tuple[str, str]] = []
    with listening(lambda *event: heard.append(event)):
        with stage("replay"):
            passing("row 3")
        with pytest.raises(ValueError, match="x"), stage("step"):
            raise ValueError("x")
    with stage("later"):
        passing("row 4")
    assert heard == [("begins", "replay"), ("at", "row 3"), ("ends", "replay"), ("begins", "step")]


def test_who_is_late_is_told_by_silence_then_collectives_then_idleness():
    beats = {rank: replace(BEAT, rank=rank) for rank in range(4)}
    fresh = dict.fromkeys(range(4), 0.5)
    assert find_late(beats, {**fresh, 2: 31.0, 1: 12.0}, silent_s=10)[0] == 2
    assert find_late({r: beats[r] for r in (0, 1, 2)}, fresh, silent_s=10)[0] == 3
    fewer = {**beats, 1: replace(beats[1], collectives={"world": 8, "data": 5})}
    late, why = find_late(fewer, fresh, silent_s=10)
    assert late == 1
    assert "fewer collectives" in why
    assert "rank 1" in why
    free = {**beats, 3: replace(beats[3], inside="", idle_s=20.0)}
    assert find_late(free, fresh, silent_s=10)[0] == 3
    longest = {**beats, 2: replace(beats[2], idle_s=60.0)}
    assert find_late(longest, fresh, silent_s=10)[0] == 2


def test_the_state_of_a_process_is_told_on_this_machine_only():
    pid = os.fork()
    if not pid:
        signal.raise_signal(signal.SIGSTOP)
        os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    try:
        assert process_state(replace(BEAT, pid=pid)) == "; its process is stopped"
        assert process_state(replace(BEAT, pid=pid, host="elsewhere")) == ""
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert process_state(replace(BEAT, pid=pid)) == "; its process is gone"


def test_a_limit_below_two_beats_is_refused():
    with pytest.raises(ValueError, match=r"heartbeat.limit_s 3 is below two beats .* 2: raise"):
        HeartbeatConfig(every_s=2, limit_s=3)
    HeartbeatConfig(limit_s=0)


@pytest.mark.gloo
def test_a_stopped_and_a_sleeping_rank_are_named_within_a_minute(tmp_path):
    recipe = write_recipe(tmp_path, **write_strong_weights(tmp_path))
    quick = ["alarms.enabled=false", "heartbeat.every_s=0.05", "heartbeat.limit_s=10"]
    jobs = [
        Job("stops", quick, rank=1, at="branches begins", moment=1, signal=signal.SIGSTOP),
        Job("sleeps", quick, rank=0, at="backward ends", moment=0, signal=0),
        Job("stale", ["heartbeat.every_s=0.01", "heartbeat.limit_s=30", *quick[:1]]),
    ]
    folder = tmp_path / "stale"
    (folder / "heartbeat").mkdir(parents=True)
    for rank in (0, 1):
        (folder / f"heartbeat/rank_{rank:05d}.json").write_text("{}")
        os.utime(folder / f"heartbeat/rank_{rank:05d}.json", (0, 0))
    stops, sleeps, stale = run_jobs(recipe, jobs, 3 * PATIENCE_S)
    assert stale.codes == [0, 0], stale.errors
    assert stops.codes == [EXIT_CODE, -signal.SIGKILL], stops.errors
    assert "the run hangs: rank 1 is late, silent for" in stops.errors
    said = _alarm(folder.parent / "stops")
    assert (said["late"], said["silent"]) == (1, [1])
    assert "at its last beat: rank 1" in said["why"]
    assert re.search("update [01], stage", said["why"])  # its last beat may be of the step before
    assert said["why"].endswith("its process is stopped")
    report = (tmp_path / "stops/hang/rank_00000.txt").read_text()
    assert "inside all_" in report
    assert "most recent call first" in report

    assert EXIT_CODE in sleeps.codes, sleeps.errors
    assert "the run hangs: rank 0 is late" in sleeps.errors
    said = _alarm(folder.parent / "sleeps")
    assert (said["late"], said["silent"]) == (0, [])
    assert "it has begun fewer collectives" in said["why"]
    assert "update 0, stage backward" in said["why"]
    stacks = [(tmp_path / f"sleeps/hang/rank_{rank:05d}.txt").read_text() for rank in (0, 1)]
    assert "in come" in stacks[0], "where it sleeps"
    assert " from parallel/collect.py" in stacks[1].splitlines()[0], "where it waits"


def _alarm(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "hang/alarm.json").read_text())
    return found
