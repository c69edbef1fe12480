"""Machines, and the ways to divide their GPUs that a recipe allows."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_kvpo.config import ParallelConfig, RunConfig
from megatron_kvpo.data.prompts import share
from megatron_kvpo.model import eight_bits
from megatron_kvpo.model.specs import check_layout
from megatron_kvpo.parallel.groups import check_sizes
from megatron_kvpo.records import Prompt
from megatron_kvpo.training.parts import check_branches
from tools import topology as topology_files
from tools.plan_memory import Memory, Place, memory, weights_of

CONTEXT_GIB = 4.0
"""Of a GPU that tensors cannot have: CUDA's own, NCCL's buffers, what lies between tensors. Records
reserve 1 to 5 GiB more than they allocate at most."""

_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Machines:
    """Machines of one kind."""

    nodes: int
    gpus_per_node: int
    gpu: str
    """H100 or H200."""

    gpu_memory_gib: float
    nvlink_gb_s: float = 0.0
    """From a GPU to the others of its machine, one way."""

    ib_gb_s: float = 0.0
    """From a GPU to other machines, one way."""

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "gpu_memory_gib"):
            if getattr(self, name) <= 0:
                raise ValueError(f"topology {name} is {getattr(self, name)}: give it above 0")
        if self.gpus_per_node > 1 and self.nvlink_gb_s <= 0:
            raise ValueError(
                f"topology nvlink_gb_s is {self.nvlink_gb_s} with {self.gpus_per_node} GPUs a "
                "node: give the GB/s of a GPU's way to its neighbours"
            )
        if self.nodes > 1 and self.ib_gb_s <= 0:
            raise ValueError(
                f"topology ib_gb_s is {self.ib_gb_s} with {self.nodes} nodes: give the GB/s of a "
                "GPU's way to other machines"
            )

    @property
    def gpus(self) -> int:
        """Of all machines."""
        return self.nodes * self.gpus_per_node


H200 = Machines(nodes=1, gpus_per_node=8, gpu="H200", gpu_memory_gib=139.8, nvlink_gb_s=450.0,
                ib_gb_s=50.0)  # fmt: skip
"""A machine of 8, with 400 Gbit/s of InfiniBand a GPU."""

H100 = dataclasses.replace(H200, gpu="H100", gpu_memory_gib=79.1)


def read_topology(name: str) -> Machines:
    """The machines of a topology: see tools.topology.load. ValueError for what it does not say."""
    found = topology_files.load(name)
    own = {field.name: getattr(found, field.name) for field in dataclasses.fields(Machines)}
    gpu = found.gpu.upper()
    own["gpu"] = next((kind for kind in ("H100", "H200") if kind in gpu), gpu)
    return Machines(**own)


def machines(kind: Machines, gpus: int) -> Machines:
    """So many GPUs of a kind. ValueError for a part of a machine beside whole ones."""
    nodes = max(1, gpus // kind.gpus_per_node)
    if gpus < 1 or gpus != nodes * min(gpus, kind.gpus_per_node):
        raise ValueError(
            f"{gpus} GPUs are no whole machines of {kind.gpus_per_node}: give a multiple of it, or "
            "fewer than one has"
        )
    return dataclasses.replace(kind, nodes=nodes, gpus_per_node=gpus // nodes)


@dataclass(frozen=True, slots=True)
class Layout:
    """How ranks are divided."""

    parallel: ParallelConfig
    data: int

    def __str__(self) -> str:
        parallel = self.parallel
        tensor = f"tensor {parallel.tensor}{' +tokens' if parallel.sequence_parallel else ''}"
        axes = (
            (tensor, parallel.tensor),
            (f"context {parallel.context}", parallel.context),
            (f"branch {parallel.branch}", parallel.branch),
            (f"data {self.data}", self.data),
        )
        return " x ".join(name for name, size in axes if size > 1) or "one rank"

    @property
    def model_ranks(self) -> int:
        """Ranks that share one pass."""
        return self.parallel.tensor * self.parallel.context


def candidates(config: RunConfig, gpus: int) -> Iterator[Layout]:
    """Every division into 1, 2, 4 or 8 ranks an axis, tokens shared between tensor ranks."""
    for tensor, context, branch in itertools.product(_SIZES, repeat=3):
        if gpus % (tensor * context * branch):
            continue
        parallel = dataclasses.replace(
            config.parallel, tensor=tensor, sequence_parallel=tensor > 1, context=context,
            branch=branch,
        )  # fmt: skip
        yield Layout(parallel, check_sizes(gpus, parallel))


def illegal(config: RunConfig, topology: Machines, layout: Layout) -> str | None:
    """Why a recipe cannot run so, memory aside; None if it can."""
    parallel = layout.parallel
    try:
        check_layout(config.model, parallel, config.stream.block_frames)
        check_branches(config.routing, parallel)
        share(range(config.policy.groups_per_update), 0, layout.data)
        for weight in weights_of(config) if config.model.fp8 else ():
            if weight.layer and weight.family in config.model.fp8:
                eight_bits.check_sizes(*_own_sizes(weight.layer, parallel.tensor))
    except ValueError as error:
        return str(error)
    if layout.model_ranks > topology.gpus_per_node:
        return (
            f"tensor x context {layout.model_ranks} crosses machines of {topology.gpus_per_node}: "
            "exchanges in every layer need NVLink"
        )
    return None


def _own_sizes(layer: tuple[int, int], tensor: int) -> tuple[int, int]:
    outputs, inputs = layer
    return (outputs // tensor, inputs) if outputs >= inputs else (outputs, inputs // tensor)


def place_of(
    config: RunConfig, topology: Machines, layout: Layout, *, lent: int, reward_gib: float = 0.0
) -> Place:  # fmt: skip
    """Where a layout's rank runs."""
    limit = topology.gpu_memory_gib - CONTEXT_GIB
    if layout.parallel.memory_gib is not None:
        limit = min(limit, layout.parallel.memory_gib)
    return Place(
        parallel=layout.parallel, data=layout.data, limit_gib=limit, lent=lent,
        groups=config.policy.groups_per_update // layout.data, reward_gib=reward_gib,
    )  # fmt: skip


def too_large(
    config: RunConfig, prompts: tuple[Prompt, ...], place: Place
) -> tuple[Memory, str | None]:
    """What a rank takes, and why that is too much, or None."""
    found = memory(config, prompts, place)
    if found.least <= place.limit_gib:
        return found, None
    largest = sorted(found.terms, key=lambda name: -found.terms[name])[:3]
    parts = ", ".join(f"{name} {found.terms[name]:.1f}" for name in largest)
    return found, f"{found.least:.1f} GiB at least, {place.limit_gib:.1f} are there ({parts})"
