"""Which machines a run is for, and which axis of ranks lies inside them: launch/topologies/*.yaml.

    python -m tools.topology                    # the names of those that are there
    python -m tools.topology 32xh200_14b        # every group of every axis

Imports no torch: launch/ reads a topology before torch may be imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import yaml

from megatron_kvpo import log, settings

logger = log.get_logger("megatron_kvpo.tools.topology")

FOLDER = Path(__file__).resolve().parents[1] / "launch" / "topologies"

ORDER = ("tensor", "context", "branch", "data")
"""Axes from the fastest numbered on, as parallel/groups.py numbers ranks."""

_VARIABLES = ("NCCL_", "UCX_", "CUDA_", "PYTORCH_", "TORCH_NCCL_")


@dataclass(frozen=True, kw_only=True, slots=True)
class TopologyParallel:
    """The run's section `parallel`, as far as it follows from the machines; data is the rest."""

    tensor: int = 1
    context: int = 1
    branch: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        for name, size in (
            ("tensor", self.tensor), ("context", self.context), ("branch", self.branch),
        ):  # fmt: skip
            if size < 1:
                raise ValueError(f"parallel.{name} is {size}: it must be above 0")
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("parallel.sequence_parallel shares tokens over the tensor ranks: set "
                             "parallel.tensor above 1")  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """One kind of cluster and the layout for it."""

    model: str = ""
    """Preset that the layout is for: wan2.1_1.3b or wan2.1_14b; "" is any."""

    nodes: int = 1
    gpus_per_node: int = 1
    gpu: str = ""
    """Part of the name that the driver gives it, as H200; "" is any, also a CPU rank."""

    gpu_memory_gib: float = 0.0
    """Of one GPU; 0 is not known."""

    nvlink_gb_s: float = 0.0
    """10^9 bytes a second that a GPU sends to others of its node; 0: it does not say."""

    ib_gb_s: float = 0.0
    """And that it sends to other nodes: its share of the node's adapters."""

    parallel: TopologyParallel = field(default_factory=TopologyParallel)
    order: tuple[str, ...] = ORDER
    """Of the axes, the fastest first. The package has one order; a file says it for its reader."""

    environment: dict[str, str] = field(default_factory=dict)
    """Variables of NCCL and CUDA for these machines. What is set already wins."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def world(self) -> int:
        """Ranks in all, one a GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Ranks along tensor, context, branch and data."""
        inner = self.parallel.tensor * self.parallel.context * self.parallel.branch
        return (self.parallel.tensor, self.parallel.context, self.parallel.branch,
                self.world // inner)  # fmt: skip

    def overrides(self) -> list[str]:
        """The layout as settings of a recipe."""
        values = settings.to_mapping(self.parallel)
        return [f"parallel.{name}={json.dumps(value)}" for name, value in values.items()]

    def groups(self) -> dict[str, list[list[int]]]:
        """Rank lists of every group of each axis: rank = t + T (c + C (b + B d))."""
        found: dict[str, list[list[int]]] = {}
        strides = [1, self.sizes[0], self.sizes[0] * self.sizes[1]]
        strides.append(strides[2] * self.sizes[2])
        for dim, name in enumerate(ORDER):
            others = [range(n) if i != dim else range(1) for i, n in enumerate(self.sizes)]
            starts = sorted(
                sum(c * s for c, s in zip(corner, strides, strict=True))
                for corner in product(*others)
            )
            found[name] = [[a + i * strides[dim] for i in range(self.sizes[dim])] for a in starts]
        return found

    def nodes_of(self, group: Sequence[int]) -> list[int]:
        """Nodes that the ranks of a group lie on."""
        return sorted({rank // self.gpus_per_node for rank in group})


def _check(topology: Topology) -> None:
    t = topology
    for name, count in (("nodes", t.nodes), ("gpus_per_node", t.gpus_per_node)):
        if count < 1:
            raise ValueError(f"topology: {name} is {count}: it must be above 0")
    for name, speed in (
        ("gpu_memory_gib", t.gpu_memory_gib), ("nvlink_gb_s", t.nvlink_gb_s),
        ("ib_gb_s", t.ib_gb_s),
    ):  # fmt: skip
        if speed < 0:
            raise ValueError(f"topology: {name} is {speed:g}: give 0 (not known) or more")
    if tuple(t.order) != ORDER:
        raise ValueError(f"topology: order is {list(t.order)}: ranks are numbered {list(ORDER)}, "
                         "the fastest first, and no other way")  # fmt: skip
    foreign = [name for name in t.environment if not name.startswith(_VARIABLES)]
    if foreign:
        raise ValueError(f"topology: environment sets {foreign}: only names that begin with "
                         f"{list(_VARIABLES)} belong there")  # fmt: skip
    inner = t.parallel.tensor * t.parallel.context
    used = inner * t.parallel.branch
    if t.world % used:
        raise ValueError(
            f"topology: {t.nodes} nodes x {t.gpus_per_node} GPUs = {t.world} ranks do not divide "
            f"by tensor x context x branch = {used}: lower one of the three"
        )
    if t.gpus_per_node % inner:
        raise ValueError(
            f"topology: tensor x context = {inner} does not divide the {t.gpus_per_node} GPUs of a "
            "node: such a group would cross nodes, and it talks in every layer; lower one of them"
        )
    if used <= t.gpus_per_node and t.gpus_per_node % used:
        raise ValueError(
            f"topology: tensor x context x branch = {used} fits a node's {t.gpus_per_node} GPUs "
            "and does not divide them, so some branch groups would cross nodes: change branch"
        )


def names() -> list[str]:
    """Topologies that can be named."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Topology:
    """A topology by its name in launch/topologies, or by the path of a file.

    ValueError: there is none, or it says what cannot be; the text begins with the file.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"no topology {name}: give the path of a .yaml file or one of {names()}")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} must hold keys and values, not a {type(values).__name__}")
    try:
        return settings.from_mapping(Topology, dict(values))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_ranks(topology: Topology, world: int, local_world: int, name: str) -> None:
    """ValueError unless so many ranks, so many of them on this node, are the topology's."""
    if (world, local_world) != (topology.world, topology.gpus_per_node):
        raise ValueError(
            f"topology {name} has {topology.nodes} nodes x {topology.gpus_per_node} GPUs = "
            f"{topology.world} ranks, this start has {world} with {local_world} on this node: "
            "start as many, or name another topology"
        )


def main() -> int:
    """List the topologies, or the groups of one."""
    if len(sys.argv) == 1:
        log.emit_result(" ".join(names()))
        return 0
    topology = load(sys.argv[1])
    for axis, groups in topology.groups().items():
        for group in groups:
            log.emit_result(f"{axis}\tranks {group}\tnodes {topology.nodes_of(group)}")
    return 0


if __name__ == "__main__":
    log.run_command(main, logger)
