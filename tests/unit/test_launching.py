"""What launch/pretrain_kvpo.sh makes of an environment: a rank, or torchrun with its arguments."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import launching
from tools.launching import Request, find_nodes, first_host, parse, port_of, rank_variables
from tools.topology import Topology, load

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "pretrain_kvpo.sh"
STEP = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "gpu[007-010,20]",
        "SLURM_STEP_NUM_NODES": "4", "SLURM_NODEID": "1"}  # fmt: skip
A_TASK_A_GPU = STEP | {"SLURM_STEP_NUM_TASKS": "32", "SLURM_STEP_TASKS_PER_NODE": "8(x4)",
                       "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}  # fmt: skip
A_TASK_A_NODE = STEP | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
                        "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
                         "SLURM_GPUS_ON_NODE": "8"}  # fmt: skip


def test_one_task_a_gpu_is_a_rank_and_finds_the_first_node():
    assert rank_variables(A_TASK_A_GPU) == {
        "RANK": "9", "WORLD_SIZE": "32", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu007", "MASTER_PORT": str(20_000 + (4711 * 7 + 2) % 10_000),
    }  # fmt: skip
    uneven = rank_variables(
        A_TASK_A_GPU | {"SLURM_STEP_TASKS_PER_NODE": "8(x3),5", "SLURM_NODEID": "3"}
    )
    assert uneven is not None
    assert uneven["LOCAL_WORLD_SIZE"] == "5"


def test_a_task_that_sees_one_gpu_calls_it_by_its_number_there():
    own = rank_variables(A_TASK_A_GPU | {"CUDA_VISIBLE_DEVICES": "5"})
    assert own is not None
    assert (own["LOCAL_RANK"], own["RANK"]) == ("0", "9")
    all_eight = rank_variables(A_TASK_A_GPU | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"})
    assert all_eight is not None
    assert all_eight["LOCAL_RANK"] == "1"


def test_one_task_a_node_starts_torchrun_with_its_number():
    assert rank_variables(A_TASK_A_NODE) is None
    found = find_nodes(A_TASK_A_NODE, load("32xh200_14b"))
    command = launching.torchrun(found, "launch/pretrain_kvpo.sh", ["r.yaml", "seed=2"])
    assert command == [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "8", "--nnodes", "4",
        "--node_rank", "1", "--master_addr", "gpu007", "--master_port", port_of(STEP),
        "launch/pretrain_kvpo.sh", "r.yaml", "seed=2",
    ]  # fmt: skip
    assert find_nodes(A_TASK_A_NODE, None).ranks == "8"
    assert find_nodes(A_TASK_A_NODE | {"MASTER_ADDR": "ib0"}, None).address == "ib0"


def test_torchruns_own_ranks_are_left_as_they_are():
    assert rank_variables({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"} | A_TASK_A_NODE) == {}


def test_mpirun_starts_ranks_too():
    ranks = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4",
             "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}  # fmt: skip
    found = rank_variables(ranks)
    assert found is not None
    assert (found["RANK"], found["MASTER_ADDR"], found["LOCAL_RANK"]) == ("3", "127.0.0.1", "1")
    with pytest.raises(ValueError, match="mpirun -x MASTER_ADDR=FIRST_NODE"):
        rank_variables(ranks | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})


def test_one_machine_needs_no_variables_and_several_need_three():
    alone = find_nodes({"GPUS_PER_NODE": "4"}, None)
    assert (alone.nodes, alone.ranks, alone.address) == (1, "4", None)
    assert "--standalone" in launching.torchrun(alone, "x", [])
    by_hand = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "GPUS_PER_NODE": "8"}
    second = find_nodes(by_hand, None)
    assert (second.nodes, second.node_rank, second.address, second.port) == (2, 1, "a", "29500")
    assert find_nodes(by_hand | {"MASTER_PORT": "1"}, None).port == "1"
    for name in ("NODE_RANK", "MASTER_ADDR"):
        less = {key: value for key, value in by_hand.items() if key != name}
        with pytest.raises(ValueError, match=rf"2 nodes are to be started and \['{name}'\]"):
            find_nodes(less, None)


def test_nodes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="topology has 2 nodes, this start has 4"):
        find_nodes(A_TASK_A_NODE, load("16xh200_14b"))
    with pytest.raises(ValueError, match="Slurm gave 4 nodes and this process is no task of srun"):
        find_nodes({"SLURM_JOB_NUM_NODES": "4", "SLURM_PROCID": "0"}, None)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[007-010,20]", "gpu007"), ("a1", "a1"), ("a1,b[2-3]", "a1"), ("n[3,5]", "n3"),
     ("rack2-n[01-02]-ib", "rack2-n01-ib")],
)  # fmt: skip
def test_the_first_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def test_an_empty_node_list_is_refused():
    with pytest.raises(ValueError, match="names no node: set MASTER_ADDR"):
        first_host("")


def test_the_layout_goes_in_front_of_overrides_and_options_are_taken_out(tmp_path):
    recipe = str(tmp_path / "r.yaml")
    Path(recipe).touch()
    wanted = Request(arguments=(recipe, "seed=1", "--flag"), topology="8xh200_14b")
    assert parse([recipe, "--topology", "8xh200_14b", "seed=1", "--flag"], {}) == wanted
    assert parse(["--topology=8xh200_14b", recipe, "seed=1", "--flag"], {}) == wanted
    assert parse([recipe, "seed=1", "--flag"], {"TOPOLOGY": "8xh200_14b"}) == wanted
    assert launching.with_layout(wanted, load("8xh200_14b")) == [
        recipe, "parallel.tensor=2", "parallel.context=1", "parallel.branch=4",
        "parallel.sequence_parallel=true", "seed=1", "--flag",
    ]  # fmt: skip
    assert parse([recipe, "--module", "tools.preflight"], {}).module == "tools.preflight"
    wrong: list[tuple[list[str], str]] = [
        ([], "no recipe is given"), (["no.yaml"], "no recipe at no.yaml"),
        ([recipe, "--topology"], "--topology is the last argument"),
    ]  # fmt: skip
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            parse(arguments, {})


def test_what_is_set_wins_over_the_topology_which_wins_over_env_sh(monkeypatch):
    file = Request(arguments=("r",), topology="16xh200_14b")
    plain = {"PATH": os.environ["PATH"]}
    found, variables = launching.prepare(file, plain)
    assert isinstance(found, Topology)
    assert variables["NCCL_IB_HCA"] == "mlx5"
    assert variables["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"
    assert variables["PYTHONPATH"] == str(ROOT)
    assert "NCCL_NVLS_ENABLE" not in variables
    _, mine = launching.prepare(file, plain | {"NCCL_IB_HCA": "x", "NCCL_DEBUG": "INFO",
                                               "NCCL_NVLS_ENABLE": "0"})  # fmt: skip
    assert [mine[name] for name in ("NCCL_IB_HCA", "NCCL_DEBUG", "NCCL_NVLS_ENABLE")] == [
        "x", "INFO", "0",
    ]  # fmt: skip


def test_the_launcher_does_not_wait_for_torch():
    look = "import sys, tools.launching; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == "False\n", ended.stderr


def test_every_variable_of_env_sh_gives_way_and_has_its_reason():
    text = (ROOT / "launch" / "env.sh").read_text()
    names = re.findall(r"^export (\w+)=", text, re.MULTILINE)
    assert {"OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF"} <= set(
        names
    )
    kept = {name: f"mine of {name}" for name in names}
    found = launching.sourced({"PATH": os.environ["PATH"], **kept})
    assert {name: found[name] for name in names} == kept
    lines = text.splitlines()
    for number, line in enumerate(lines):
        assert not line.startswith("export") or lines[number - 1].startswith("# "), line


def test_the_file_is_python_and_bash_and_holds_no_secret():
    compile(SCRIPT.read_text(), str(SCRIPT), "exec")
    for file in (SCRIPT, ROOT / "launch" / "slurm.sbatch", ROOT / "launch" / "env.sh"):
        done = subprocess.run(
            ["bash", "-n", str(file)], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert not re.search(r"\bssh\b|password", file.read_text())
        assert os.access(file, os.X_OK) or file.name == "env.sh"


def _call(arguments, tmp_path, **variables):
    """The module `say` writes its environment and ends with 7."""
    (tmp_path / "say.py").write_text(
        "import json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\nsys.exit(7)\n"
    )
    (tmp_path / "r.yaml").touch()
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "NCCL", "OMP"))}
    clean |= {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    return subprocess.run(
        arguments, cwd=tmp_path, env=clean | variables,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_a_rank_gets_the_variables_the_layout_and_hands_back_its_exit_code(tmp_path):
    task = A_TASK_A_GPU | {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2",
                           "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}  # fmt: skip
    call = [str(SCRIPT), "r.yaml", "--module", "say", "seed=1", "--topology", "16xh200_1.3b"]
    done = _call(call, tmp_path, **task)
    assert done.returncode == 7, done.stderr
    for said in ('"RANK": "9"', '"NCCL_IB_HCA": "mlx5"', '"OMP_NUM_THREADS": "1"',
                 '[["r.yaml", "parallel.tensor=1", "parallel.context=2"'):  # fmt: skip
        assert said in done.stdout
    wrong = _call(call, tmp_path, **A_TASK_A_GPU)
    assert wrong.returncode == 2
    assert "= 16 ranks, this start has 32 with 8 on this node" in wrong.stderr


def test_sbatch_hands_everything_to_one_task_a_node(tmp_path):
    srun = tmp_path / "srun"
    srun.write_text(
        '#!/bin/bash\necho "$@" >&2\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
    )
    srun.chmod(0o755)
    call = [str(ROOT / "launch" / "slurm.sbatch"), "r.yaml", "--module", "say"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = _call(call, tmp_path, PATH=path, KVPO_ROOT=str(ROOT), SRUN_ARGS="--label --mpi=none",
                 **A_TASK_A_GPU)  # fmt: skip
    assert done.returncode == 7, done.stderr
    assert "--cpu-bind=none --ntasks-per-node=1 --label --mpi=none bash" in done.stderr
    lost = _call(call, tmp_path, PATH=path, SLURM_SUBMIT_DIR=str(tmp_path))
    assert (lost.returncode, "set KVPO_ROOT to it" in lost.stderr) == (2, True)
