"""Rewards behind a service: the same run, also when the scorer dies in the middle of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_kvpo.training.metrics import read_jsonl
from tests.end_to_end.test_run import HELD_OUT, ROOT, TRAINED, _torchrun
from tests.parallel.tiny_run import write_recipe

pytest.importorskip("nvidia.dali")

LIMIT_S = 200
TOKEN = "a token of this test"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    return write_recipe(
        folder,
        reward={"weights": dict.fromkeys(TRAINED, 1.0), "held_out": [HELD_OUT]},
        evaluation={"prompts": str(folder / "prompts.jsonl"), "noises_per_prompt": 1,
                    "filmstrips": 1},
        checkpoint={"every": 0}, log={"wandb": "disabled", "report": False},
    )  # fmt: skip


def begin(command: list[str], said: Path, **variables: str) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", **variables}
    with said.open("ab") as out:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)


def train(recipe: Path, name: str, *overrides: str, **variables: str) -> subprocess.Popen[bytes]:
    command = [*_torchrun(), "-m", "megatron_kvpo.train", str(recipe), f"name={name}",
               "num_updates=3", *overrides]  # fmt: skip
    return begin(command, recipe.parent / f"{name}.log", **variables)


def until(what: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for it. A process that ends first, or a time limit, fails the test with its log."""
    deadline = time.monotonic() + LIMIT_S
    while not what():
        ended = process.poll() is not None and not what()
        assert not ended, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.05)


def finish(process: subprocess.Popen[bytes], log: Path) -> str:
    process.wait(LIMIT_S)
    assert process.returncode == 0, log.read_text()[-4000:]
    return log.read_text()


def numbers(recipe: Path, name: str) -> tuple[list[dict], list[dict], np.ndarray]:
    """All that an update logs, every score, and the scores of what the last weights generate."""
    folder = recipe.parent / name
    lines = [
        {key: value for key, value in line.items() if not key.startswith("time/")}
        for line in read_jsonl(folder / "metrics.jsonl")
    ]
    with np.load(folder / "evaluation_after.npz") as file:
        scores = file["score_KRM"]
    return lines, read_jsonl(folder / "rewards.jsonl"), scores


@pytest.fixture(scope="module")
def plain(recipe):
    """The run that scores in its own process."""
    finish(train(recipe, "plain"), recipe.parent / "plain.log")
    found = numbers(recipe, "plain")
    assert [line["update"] for line in found[0] if "loss/total" in line] == [0, 1, 2]
    assert len({line["policy/grad_norm"] for line in found[0] if "loss/total" in line}) == 3
    return found


def check_same(found, plain) -> None:
    for ours, theirs in zip(found[:2], plain[:2], strict=True):
        assert ours == theirs
    np.testing.assert_array_equal(found[2], plain[2])


class Server:
    """tools.serve_rewards on one port, again and again."""

    def __init__(self, recipe: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._recipe, self.log = recipe, recipe.parent / "server.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        ready = self._recipe.parent / "port"
        ready.unlink(missing_ok=True)
        self.process = begin(
            [sys.executable, "-m", "tools.serve_rewards", str(self._recipe), "--port",
             str(self.port), "--port-file", str(ready)],
            self.log, MEGATRON_KVPO_REWARD_TOKEN=TOKEN,
        )  # fmt: skip
        until(ready.is_file, self.process, self.log)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(recipe) -> Iterator[Server]:
    held = Server(recipe)
    held.start()
    yield held
    held.kill()


@pytest.mark.gloo
def test_a_scorer_that_is_killed_in_mid_run_costs_no_bit(recipe, plain, server):
    """Two ranks are two clients at once. They wait, say so, and go on when the scorer is back."""
    log = recipe.parent / "served.log"
    urls = f"reward.service.urls=[http://127.0.0.1:{server.port}]"
    run = train(recipe, "served", urls, MEGATRON_KVPO_REWARD_TOKEN=TOKEN)
    metrics = recipe.parent / "served" / "metrics.jsonl"
    until(lambda: metrics.is_file() and '"loss/total"' in metrics.read_text(), run, log)
    server.kill()
    until(lambda: "does not answer" in log.read_text(), run, log)
    assert run.poll() is None
    server.start()
    said = finish(run, log)
    assert "answers again, after" in said
    check_same(numbers(recipe, "served"), plain)


@pytest.mark.gloo
def test_one_setting_puts_the_rewards_into_a_process_of_their_own(recipe, plain):
    finish(train(recipe, "spawned", "reward.service.spawn=true"), recipe.parent / "spawned.log")
    check_same(numbers(recipe, "spawned"), plain)


def test_a_wrong_token_ends_the_run_at_its_start(recipe, server):
    log = recipe.parent / "locked.log"
    urls = f"reward.service.urls=[http://127.0.0.1:{server.port}]"
    run = train(recipe, "locked", urls, MEGATRON_KVPO_REWARD_TOKEN="another")
    run.wait(LIMIT_S)
    assert run.returncode != 0
    assert "HTTP 401" in log.read_text()
    assert not (recipe.parent / "locked" / "metrics.jsonl").exists()
