"""The one place where ranks become named groups.

Ranks are numbered tensor fastest, then context, then branch, then data:

    rank = tensor + T * (context + C * (branch + B * data))
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from typing import Literal

import torch
import torch.distributed as dist

from megatron_kvpo.config import ParallelConfig
from megatron_kvpo.parallel.cpu import install_cpu_megatron

_TRACKER_SEED = 1234
"""Megatron's generators need a seed. Nothing of ours draws from them: see parallel/seeds.py."""

_extra_groups: list[dist.ProcessGroup] = []
_owns_processes = False
_one_order = False
_before_stop: list[weakref.WeakMethod[Callable[[], None]]] = []


@dataclass(frozen=True)
class Axis:
    """One way the ranks are divided: how many share, which of them this is, and their group."""

    size: int
    rank: int
    group: dist.ProcessGroup


@dataclass(frozen=True)
class Ranks:
    """Where this process stands."""

    world: int
    rank: int
    device: torch.device
    tensor: Axis
    context: Axis
    branch: Axis
    data: Axis
    replicas: Axis
    """Branch x data: ranks with the same share of the weights. Megatron's data-parallel group."""


def is_first(ranks: Ranks) -> bool:
    """Whether this is the rank that writes and prints."""
    return ranks.rank == 0


def check_sizes(world: int, config: ParallelConfig) -> int:
    """Ranks on the data axis of `world` ranks. ValueError if the axes do not divide them."""
    used = config.tensor * config.context * config.branch
    if world < 1 or world % used:
        raise ValueError(
            f"{world} ranks cannot be split into parallel.tensor {config.tensor} x "
            f"parallel.context {config.context} x parallel.branch {config.branch}: "
            f"start a multiple of {used} ranks or lower one of the three"
        )
    return world // used


def _rows(sizes: tuple[int, ...], dim: int) -> Iterator[list[int]]:
    """Rank lists along one of (tensor, context, branch, data), every other coordinate fixed."""
    strides = [1, sizes[0], sizes[0] * sizes[1], sizes[0] * sizes[1] * sizes[2]]
    others = [range(size) if i != dim else range(1) for i, size in enumerate(sizes)]
    for corner in product(*others):
        base = sum(c * s for c, s in zip(corner, strides, strict=True))
        yield [base + i * strides[dim] for i in range(sizes[dim])]


def _own_axis(sizes: tuple[int, ...], dim: int, timeout: timedelta) -> Axis:
    """Make every group along `dim`, in the same order on all ranks, and keep this rank's."""
    own: Axis | None = None
    for members in _rows(sizes, dim):
        group = dist.new_group(members, timeout=timeout)
        if dist.get_rank() in members:
            own = _axis(group)
            _extra_groups.append(group)
    assert own is not None  # every rank lies on one line along each dim
    return own


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(size=dist.get_world_size(group), rank=dist.get_rank(group), group=group)


def choose_device(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """This process's device. ValueError if it is not there."""
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise ValueError("device is cuda and torch sees 0 CUDA devices: set device to cpu or auto")
    if device == "cpu" or not cuda:
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {index} has no device of its own: {torch.cuda.device_count()} CUDA "
            "devices are visible; start at most that many ranks per machine"
        )
    return torch.device("cuda", index)


def start_processes(device: torch.device, timeout: timedelta) -> bool:
    """Join torchrun's ranks, or be the only one. False, and nothing done, if joined already."""
    if dist.is_initialized():
        return False
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]  # torch omits it from __all__
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    return True


def _share_cores() -> None:
    """Give each CPU rank of this machine its part of the cores, unless the user chose."""
    if "OMP_NUM_THREADS" not in os.environ:
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))


def _grow_segments() -> None:
    """Have CUDA's allocator grow segments in place, unless the user chose; before it starts.

    Passes of many sizes leave gaps: of 137 GiB 4 were held and unused when memory ran out (81
    latent frames of 1.3B on an H200).
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def _limit_memory(device: torch.device, gib: float | None) -> None:
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    if gib is not None and gib > total:
        raise ValueError(
            f"parallel.memory_gib is {gib}, the GPU has {total:.1f} GiB: lower it, or leave it out"
        )
    torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else gib / total, device)


def _sum_in_one_order() -> None:
    """Have torch, cuBLAS and Transformer Engine refuse kernels that add as threads arrive.

    Before the process's first matrix product: cuBLAS takes its workspace then.
    """
    global _one_order
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    _one_order = True


def start_ranks(config: ParallelConfig, device: Literal["auto", "cpu", "cuda"] = "auto") -> Ranks:
    """Join the other ranks and divide them by `config`. Collective: every rank calls it.

    torch.distributed is initialised from torchrun's environment if it is not yet (gloo on CPU, nccl
    on CUDA); outside torchrun this process is the only rank. Every group waits config.timeout_s
    at most. CUDA's allocator gets expandable segments, unless PYTORCH_CUDA_ALLOC_CONF is set.

    Raises:
        ValueError: the axes do not divide the ranks (before any group is made), or the device
            asked for is not there.
        RuntimeError: the ranks are divided already.
    """
    global _owns_processes
    place = choose_device(device)
    timeout = timedelta(seconds=config.timeout_s)
    if not dist.is_initialized():
        check_sizes(int(os.environ.get("WORLD_SIZE", "1")), config)
    if place.type == "cuda":
        _grow_segments()
        torch.cuda.set_device(place)
        _limit_memory(place, config.memory_gib)
    else:
        _share_cores()
        install_cpu_megatron()
    if config.deterministic:
        _sum_in_one_order()
    if start_processes(place, timeout):
        _owns_processes = True
    world = dist.get_world_size()
    num_data = check_sizes(world, config)

    from megatron.core import parallel_state, tensor_parallel

    if parallel_state.model_parallel_is_initialized():
        raise RuntimeError("the ranks are divided already: call stop_ranks first")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        context_parallel_size=config.context,
        distributed_timeout_minutes=config.timeout_s / 60,
        create_gloo_process_groups=False,
    )
    with torch.random.fork_rng(devices=[]):  # on CPU the tracker reseeds the global generator
        tensor_parallel.model_parallel_cuda_manual_seed(_TRACKER_SEED, force_reset_rng=True)
    sizes = (config.tensor, config.context, config.branch, num_data)
    return Ranks(
        world=world,
        rank=dist.get_rank(),
        device=place,
        tensor=_axis(parallel_state.get_tensor_model_parallel_group()),
        context=_axis(parallel_state.get_context_parallel_group()),
        branch=_own_axis(sizes, 2, timeout),
        data=_own_axis(sizes, 3, timeout),
        replicas=_axis(parallel_state.get_data_parallel_group()),
    )


def before_stop(method: Callable[[], None]) -> None:
    """Have a bound method called when the ranks stop, if its object is still there then.

    For what holds communication: NCCL waits without end for captured graphs to go.
    """
    _before_stop[:] = [held for held in _before_stop if held() is not None]
    _before_stop.append(weakref.WeakMethod(method))


def stop_ranks() -> None:
    """Undo start_ranks: afterwards it may be called again, with other sizes.

    Leaves torch.distributed running if start_ranks found it running.
    """
    global _owns_processes, _one_order
    from megatron.core import parallel_state

    for held in _before_stop:
        if (method := held()) is not None:
            method()
    _before_stop.clear()
    parallel_state.destroy_model_parallel()
    if _one_order:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        _one_order = False
    if dist.is_initialized():
        for group in _extra_groups:
            dist.destroy_process_group(group)
        if _owns_processes:
            dist.destroy_process_group()
    _extra_groups.clear()
    _owns_processes = False
