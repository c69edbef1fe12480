"""launch/pretrain_kvpo.sh as people start it: torchrun, bash, srun with a task a rank or a node."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.end_to_end.test_run import HELD_OUT, TRAINED
from tests.parallel.tiny_run import write_recipe

pytest.importorskip("nvidia.dali")
pytestmark = pytest.mark.gloo

ROOT = Path(__file__).parents[2]
SCRIPT = "launch/pretrain_kvpo.sh"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr",
            "127.0.0.1", "--nproc_per_node", "2", SCRIPT]  # fmt: skip
LIMIT_S = 240


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launched")
    return write_recipe(
        folder, num_updates=1,
        reward={"weights": dict.fromkeys(TRAINED, 1.0), "held_out": [HELD_OUT]},
        evaluation={"prompts": str(folder / "prompts.jsonl"), "noises_per_prompt": 1,
                    "filmstrips": 1},
    )  # fmt: skip


def begin(command: Sequence[str], **variables: str) -> subprocess.Popen[str]:
    taken = ("WANDB", "SLURM", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER", "TOPOLOGY")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(taken)}
    environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment | variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(*processes: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each; all are ended if one takes too long."""
    try:
        said = [process.communicate(timeout=LIMIT_S) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    return [(p.returncode, *text) for p, text in zip(processes, said, strict=True)]


def result_of(ended: Sequence[tuple[int, str, str]]) -> dict:
    """The summary, which the first rank writes and nobody else."""
    for code, _, stderr in ended:
        assert code == 0, stderr[-3000:]
    lines = [line for _, stdout, _ in ended for line in stdout.splitlines()]
    assert len(lines) == 1, lines
    return json.loads(lines[0])


def step(number: int, *, nodes: int) -> dict[str, str]:
    """What srun sets for task `number` of two, on so many nodes, which are all this one."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = str(held.getsockname()[1])
    return {
        "SLURM_JOB_ID": "11", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": str(nodes), "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2" if nodes == 1 else "1(x2)", "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number if nodes == 1 else 0),
        "SLURM_NODEID": str(0 if nodes == 1 else number), "MASTER_PORT": port,
    }  # fmt: skip


def test_torchrun_starts_the_demo(tmp_path):
    small = ["num_updates=1", "policy.groups_per_update=2", "evaluation.noises_per_prompt=1",
             f"folder={tmp_path}", "log.wandb=disabled", "evaluation.filmstrips=1"]  # fmt: skip
    ended = finish(begin([*TORCHRUN, "examples/shapes/demo.yaml", *small]))
    result = result_of(ended)
    assert (result["ranks"], result["updates"], result["name"]) == (2, 1, "demo")
    assert result["videos"] == result["prompts"] > 0
    assert (tmp_path / "demo" / "report.html").is_file()


def test_bash_starts_torchrun_with_the_topologys_ranks_and_layout(recipe, tmp_path):
    topology = tmp_path / "two.yaml"
    topology.write_text("gpus_per_node: 2\nparallel: {branch: 2}\n")
    start = ["bash", SCRIPT, str(recipe), "name=bash", "--topology", str(topology)]
    result = result_of(finish(begin(start)))
    assert (result["ranks"], result["updates"]) == (2, 1)
    written = (recipe.parent / "bash" / "config.yaml").read_text()
    assert "  branch: 2\n" in written


def test_srun_with_a_task_a_rank(recipe):
    variables = step(0, nodes=1)
    second = {**variables, **{k: v for k, v in step(1, nodes=1).items() if k != "MASTER_PORT"}}
    start = [SCRIPT, str(recipe), "name=tasks"]
    ended = finish(begin(start, **variables), begin(start, **second))
    assert result_of(ended)["ranks"] == 2


def test_srun_with_a_task_a_node(recipe):
    variables = step(0, nodes=2)
    second = {**variables, **{k: v for k, v in step(1, nodes=2).items() if k != "MASTER_PORT"}}
    start = [SCRIPT, str(recipe), "name=nodes", "parallel.branch=2"]
    more = {"GPUS_PER_NODE": "1"}
    ended = finish(begin(start, **variables, **more), begin(start, **second, **more))
    assert result_of(ended)["ranks"] == 2
    assert "--nnodes 2 --node_rank 1 --master_addr localhost" in ended[1][2]


def test_a_run_that_cannot_work_ends_with_a_code_and_the_reason(recipe):
    ((code, stdout, stderr),) = finish(begin([*TORCHRUN, str(recipe), "parallel.tensor=3"]))
    assert (code, stdout) == (1, "")
    assert "parallel.tensor" in stderr
    ((code, _, stderr),) = finish(begin(["bash", SCRIPT, str(recipe), "--topology", "none"]))
    assert code == 2
    assert "no topology none: give the path" in stderr
