"""Scorers in processes of their own: they die, come back, are started again and end."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megatron_kvpo.config import load_config
from megatron_kvpo.records import Clip, Span
from megatron_kvpo.reward.base import build_rewards
from megatron_kvpo.reward.service import connect
from megatron_kvpo.reward.spawn import TOKEN_VARIABLE
from megatron_kvpo.reward_config import ServiceConfig
from tests.unit.fake_scorer import free_port, until

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "shapes" / "demo.yaml"
SHAPES = ["visual_quality", "temporal_consistency"]
DRAW = torch.Generator().manual_seed(0)
SPANS = (Span(start=0, stop=9, text="a red square moves right"),)
SCENES = [Clip(frames_FCHW=torch.rand(9, 3, 32, 32, generator=DRAW), spans=SPANS) for _ in range(4)]


def local() -> torch.Tensor:
    return torch.cat([r.score(SCENES) for r in build_rewards(SHAPES, load_config(RECIPE).reward)])


@contextmanager
def process(port: int, *more: str) -> Iterator[subprocess.Popen]:
    """A real server of the demo's recipe, killed at the end if it still runs."""
    command = [sys.executable, "-m", "tools.serve_rewards", str(RECIPE), "--port", str(port), *more]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as child:
        try:
            yield child
        finally:
            child.kill()


def test_a_server_may_die_between_requests_and_during_one_and_come_back(caplog, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "by the environment")
    with free_port() as port:
        url = f"http://127.0.0.1:{port}"
    caplog.set_level(logging.INFO)
    wanted = local()
    with process(port, "--batch-wait-ms", "1500") as server:
        (remote,) = connect(ServiceConfig(urls=(url,), patience_s=60.0), SHAPES)
        assert torch.equal(remote.submit(SCENES)(), wanted)
        during = remote.submit(SCENES)
        time.sleep(0.5)  # it has arrived, and waits for others to join
        server.kill()
    until(lambda: "does not answer" in caplog.text)
    between = remote.submit(SCENES)
    with process(port, "--batch-wait-ms", "1500") as server:
        assert torch.equal(during(), wanted)
        assert torch.equal(between(), wanted)
        assert "answers again" in caplog.text
        last = remote.submit(SCENES)
        time.sleep(0.5)
        server.send_signal(signal.SIGTERM)  # what waits is answered, then it ends
        assert torch.equal(last(), wanted)
        assert server.wait(20) == 0
    remote.close()


def alive(pid: int) -> bool:
    """Whether a process runs. One that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_spawned_server_has_a_token_is_started_again_and_ends_with_its_owner(
    tmp_path, caplog, monkeypatch
):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    reward = load_config(RECIPE).reward
    (remote,) = connect(ServiceConfig(spawn=True, timeout_s=30.0), SHAPES, recipe=reward,
                        device="cpu", folder=tmp_path)  # fmt: skip
    child = remote._line.child
    wanted = local()
    assert torch.equal(remote.submit(SCENES)(), wanted)
    command = Path(f"/proc/{child.pid}/cmdline").read_bytes()
    assert b"serve_rewards" in command
    assert child.token.encode() not in command
    with pytest.raises(ValueError, match="wants a token"):
        connect(ServiceConfig(urls=(child.url,)), SHAPES)
    first = child.pid
    os.kill(first, signal.SIGKILL)
    assert torch.equal(remote.submit(SCENES)(), wanted)
    assert child.pid != first
    assert "started again: it ended with -9" in caplog.text
    remote.close()
    assert not alive(child.pid)
    (log_file,) = tmp_path.iterdir()
    assert log_file.read_text().count("serves") == 2


OWNER = """
from pathlib import Path
from megatron_kvpo.reward.spawn import SpawnedServer
import sys, time, os
child = SpawnedServer(Path(sys.argv[1]), ["visual_quality"], timeout_s=5.0, device="cpu")
while child.url is None:
    time.sleep(0.05)
os.write(1, f"{child.pid}\\n".encode())
if sys.argv[2] == "killed":
    time.sleep(60)
"""


@pytest.mark.parametrize("end", ["killed", "ends"])
def test_a_spawned_server_ends_when_its_owner_does_without_closing_it(end):
    with subprocess.Popen([sys.executable, "-c", OWNER, str(RECIPE), end], cwd=ROOT,
                          stdout=subprocess.PIPE) as owner:  # fmt: skip
        pid = int(owner.stdout.readline())
        if end == "killed":
            owner.kill()
        owner.wait(20)
        until(lambda: not alive(pid))


def test_a_spawned_server_that_cannot_start_says_why():
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"ended with 2; .*unknown reward 'beauty'"):
        connect(ServiceConfig(spawn=True), ["beauty"], recipe=RECIPE, device="cpu")
    assert time.monotonic() - started < 30
