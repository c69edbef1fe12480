"""What launch/pretrain_kvpo.sh does: become a rank, or start torchrun, which starts the ranks.

Decided by the environment alone: torchrun's, Slurm's or MPI's variables, or none of them.
Imports no torch: the variables of launch/env.sh must be set before torch is.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_kvpo import log
from tools import topology as topologies
from tools.topology import Topology

logger = log.get_logger("megatron_kvpo.tools.launching")

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_MODULE = "megatron_kvpo.train"
_RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_FIRST_PORT, _PORTS = 20_000, 10_000
_DEFAULT_PORT = "29500"


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What stands behind launch/pretrain_kvpo.sh."""

    arguments: tuple[str, ...]
    """Of the module: the recipe, overrides, whatever else it takes."""

    topology: str | None = None
    module: str = DEFAULT_MODULE


@dataclass(frozen=True, kw_only=True, slots=True)
class Nodes:
    """How torchrun is to be started on this node."""

    nodes: int
    node_rank: int
    ranks: str
    """Of this node: a number, or `gpu` for as many as torch sees."""

    address: str | None
    """Where the ranks meet; None on one node."""

    port: str


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> Request:
    """Take --topology and --module out of the arguments. ValueError: one is missing."""
    rest: list[str] = []
    taken = {"--topology": environment.get("TOPOLOGY") or None, "--module": None}
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if name not in taken:
            rest.append(argument)
            continue
        given = value if equals else next(waiting, "")
        if not given:
            raise ValueError(f"{name} is the last argument: give a name after it")
        taken[name] = given
    if not rest:
        raise ValueError("no recipe is given: launch/pretrain_kvpo.sh RECIPE "
                         "[--topology NAME_OR_FILE] [section.key=value ...]")  # fmt: skip
    if not Path(rest[0]).is_file():
        raise ValueError(f"no recipe at {rest[0]}: the first argument is the path of a YAML file, "
                         "see examples/")  # fmt: skip
    return Request(arguments=tuple(rest), topology=taken["--topology"],
                   module=taken["--module"] or DEFAULT_MODULE)  # fmt: skip


def with_layout(request: Request, topology: Topology | None) -> list[str]:
    """The module's arguments: the topology's layout goes in front of overrides, which win."""
    first, *rest = request.arguments
    return [first, *(topology.overrides() if topology else []), *rest]


def first_host(nodes: str) -> str:
    """The first of a Slurm node list: `gpu[007-012,20],login` is gpu007. ValueError: empty."""
    found = re.match(r"\s*([^\[,\s]+)?(?:\[(\d+)[^\]]*\]([^,\s]*))?", nodes)
    if found is None or not found[0].strip():
        raise ValueError(f"the node list {nodes!r} names no node: set MASTER_ADDR to the first one")
    return "".join(part or "" for part in found.groups())


def port_of(environment: Mapping[str, str]) -> str:
    """MASTER_PORT, or one that all tasks of a Slurm step take and other steps hardly do."""
    if port := environment.get("MASTER_PORT"):
        return port
    if job := environment.get("SLURM_JOB_ID"):
        step = environment.get("SLURM_STEP_ID", "0")
        return str(_FIRST_PORT + (int(job) * 7 + int(step)) % _PORTS)
    return _DEFAULT_PORT


def _slurm_address(environment: Mapping[str, str]) -> str:
    if address := environment.get("MASTER_ADDR"):
        return address
    names = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    return first_host(names)


def rank_variables(environment: Mapping[str, str]) -> dict[str, str] | None:
    """Variables of torchrun if this process is to be one rank; None if it is to start torchrun.

    One rank a process: torchrun's own, tasks of an srun with more tasks than nodes, or of mpirun.
    """
    if all(name in environment for name in _RANK_NAMES):
        return {}
    if "OMPI_COMM_WORLD_RANK" in environment:
        found = {"RANK": environment["OMPI_COMM_WORLD_RANK"],
                 "WORLD_SIZE": environment["OMPI_COMM_WORLD_SIZE"],
                 "LOCAL_RANK": environment["OMPI_COMM_WORLD_LOCAL_RANK"],
                 "LOCAL_WORLD_SIZE": environment["OMPI_COMM_WORLD_LOCAL_SIZE"]}  # fmt: skip
        if "MASTER_ADDR" not in environment and found["WORLD_SIZE"] != found["LOCAL_WORLD_SIZE"]:
            raise ValueError(
                f"mpirun starts {found['WORLD_SIZE']} ranks on several nodes and MASTER_ADDR is "
                "not set: mpirun -x MASTER_ADDR=FIRST_NODE"
            )
        address = environment.get("MASTER_ADDR", "127.0.0.1")
    elif int(environment.get("SLURM_STEP_NUM_TASKS", "0")) > _step_nodes(environment):
        found = {"RANK": environment["SLURM_PROCID"],
                 "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
                 "LOCAL_RANK": environment["SLURM_LOCALID"],
                 "LOCAL_WORLD_SIZE": _tasks_here(environment)}  # fmt: skip
        address = _slurm_address(environment)
    else:
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if visible != [""] and len(visible) == 1:
        found["LOCAL_RANK"] = "0"  # --gpus-per-task=1: each task sees one GPU, its number 0
    return {**found, "MASTER_ADDR": address, "MASTER_PORT": port_of(environment)}


def _step_nodes(environment: Mapping[str, str]) -> int:
    return int(environment.get("SLURM_STEP_NUM_NODES", "1"))


def _tasks_here(environment: Mapping[str, str]) -> str:
    """Tasks of this step on this node. Slurm writes them as `8(x3),4`."""
    counts: list[str] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            raise ValueError(
                f"SLURM_STEP_TASKS_PER_NODE is {part!r}, which is not of the form 8(x4): start "
                "through srun, or set RANK, WORLD_SIZE and LOCAL_RANK"
            )
        counts += [found[1]] * int(found[2] or 1)
    return counts[int(environment.get("SLURM_NODEID", "0")) % len(counts)]


def find_nodes(environment: Mapping[str, str], topology: Topology | None) -> Nodes:
    """Where torchrun runs and with how many ranks. ValueError: nodes that cannot find each other.

    One srun task a node brings Slurm's numbers; elsewhere NNODES, NODE_RANK, MASTER_ADDR and
    MASTER_PORT, each of which a single node does without.
    """
    slurm = "SLURM_STEP_NUM_TASKS" in environment
    if slurm:
        nodes, number = _step_nodes(environment), int(environment.get("SLURM_NODEID", "0"))
    else:
        default = topology.nodes if topology else 1
        nodes = int(environment.get("NNODES", default))
        number = int(environment.get("NODE_RANK", "0"))
        allocated = int(environment.get("SLURM_JOB_NUM_NODES", "1"))
        if allocated > 1 and "NODE_RANK" not in environment:
            raise ValueError(
                f"Slurm gave {allocated} nodes and this process is no task of srun: start it with "
                "srun --ntasks-per-node=1, or sbatch launch/slurm.sbatch RECIPE"
            )
        missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if name not in environment]
        if nodes > 1 and missing:
            raise ValueError(
                f"{nodes} nodes are to be started and {missing} are not set: on every node set "
                "NODE_RANK to its number, from 0, and MASTER_ADDR to the name of node 0"
            )
    if topology is not None and nodes != topology.nodes:
        raise ValueError(f"the topology has {topology.nodes} nodes, this start has {nodes}: name "
                         "another topology, or start as many nodes")  # fmt: skip
    address = None
    if nodes > 1:
        address = _slurm_address(environment) if slurm else environment["MASTER_ADDR"]
    return Nodes(nodes=nodes, node_rank=number, ranks=_ranks_here(environment, topology),
                 address=address, port=port_of(environment))  # fmt: skip


def _ranks_here(environment: Mapping[str, str], topology: Topology | None) -> str:
    """GPUs of this node that a run may have; one rank where there is none."""
    if topology is not None:
        return str(topology.gpus_per_node)
    for name in ("GPUS_PER_NODE", "NPROC_PER_NODE", "SLURM_GPUS_ON_NODE"):
        if environment.get(name):
            return environment[name]
    return "gpu" if Path("/dev/nvidiactl").exists() else "1"


def torchrun(found: Nodes, script: str, arguments: Sequence[str]) -> list[str]:
    """The command that starts this node's ranks; node numbers decide rank numbers."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", found.ranks]
    if found.address is None:
        command += ["--standalone", "--local-addr", "127.0.0.1"]
    else:
        command += ["--nnodes", str(found.nodes), "--node_rank", str(found.node_rank),
                    "--master_addr", found.address, "--master_port", found.port]  # fmt: skip
    return [*command, script, *arguments]


def sourced(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment after launch/env.sh, which leaves alone what is set."""
    said = subprocess.run(
        ["bash", "-c", '. "$1" && env -0', "bash", str(ROOT / "launch" / "env.sh")],
        env=dict(environment), capture_output=True, check=True,
    ).stdout  # fmt: skip
    pairs = (item.decode(errors="surrogateescape").partition("=") for item in said.split(b"\0"))
    return {name: value for name, equals, value in pairs if equals and name not in ("_", "SHLVL")}


def prepare(
    request: Request, environment: Mapping[str, str]
) -> tuple[Topology | None, dict[str, str]]:
    """The topology that is named, and the variables that a run gets."""
    topology = topologies.load(request.topology) if request.topology else None
    variables = {**(topology.environment if topology else {}), **environment}
    if request.topology:
        variables["TOPOLOGY"] = request.topology  # for tools that compare with it
    path = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    if environment.get("PYTHONPATH", "").split(os.pathsep)[0] != path[0]:
        variables["PYTHONPATH"] = os.pathsep.join(path)
    return topology, sourced(variables)


def main(script: str) -> None:
    """Run the module as a rank, or become torchrun. Bad input: one line of the log, code 2."""
    try:
        request = parse(sys.argv[1:], os.environ)
        topology, variables = prepare(request, os.environ)
        rank = rank_variables(os.environ)
        if rank is None:
            found = find_nodes(os.environ, topology)
        elif topology is not None:
            both = {**variables, **rank}
            local = both.get("LOCAL_WORLD_SIZE", both["WORLD_SIZE"])
            topologies.check_ranks(topology, int(both["WORLD_SIZE"]), int(local),
                                   str(request.topology))  # fmt: skip
    except ValueError as error:
        log.setup(os.environ.get("RANK", "0") == "0")
        logger.error("%s", error)
        sys.exit(2)
    if rank is None:
        command = torchrun(found, script, sys.argv[1:])
        log.setup(True)
        logger.info("starting %s", shlex.join(command))
        os.execve(command[0], command, variables)
    os.environ.update({**variables, **rank})
    sys.argv[1:] = with_layout(request, topology)
    runpy.run_module(request.module, run_name="__main__", alter_sys=True)
