"""What one rank finds out about its machine and its links, for tools/preflight.py to judge."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_kvpo import __version__, settings
from megatron_kvpo.config import RunConfig
from tools import provenance

Group = dist.ProcessGroup

_SMI_FIELDS = ("driver_version", "ecc.errors.uncorrected.volatile.total", "temperature.gpu")
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # new, old drivers
_SMI_LIMIT_S = 30
_CLOCK_ROUNDS = 9
_GPU_BYTES, _CPU_BYTES = 2**28, 2**22
_GPU_TIMES, _CPU_TIMES = 20, 4


def gathered(value: Any, words: Group) -> list[Any]:
    """What every rank says, in rank order, on every rank. Collective."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value, group=words)
    return found


def versions() -> dict[str, str]:
    """Of all that must be the same on every rank; `none` for what is not installed."""
    try:
        engine = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        engine = "none"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
    return {
        **provenance.versions(), "transformer-engine": engine, "cuda": str(torch.version.cuda),
        "nccl": nccl, "megatron_kvpo": __version__, "commit": provenance.commit() or "none",
    }  # fmt: skip


def recipe_hash(config: RunConfig) -> str:
    """The same on two ranks if and only if all settings are."""
    text = json.dumps(settings.to_mapping(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def host() -> str:
    """This machine's name."""
    return socket.gethostname()


def space(folder: Path) -> dict[str, float | None]:
    """GiB that are free where the run writes and in /dev/shm; None where there is none."""
    place = folder.resolve()
    while not os.path.exists(place):  # unlike Path.exists, also where one may not look
        place = place.parent
    memory = Path("/dev/shm")
    return {
        "disk": shutil.disk_usage(place).free / 2**30,
        "shared memory": shutil.disk_usage(memory).free / 2**30 if memory.is_dir() else None,
    }


def gpu(device: torch.device) -> dict[str, Any] | None:
    """Name, GiB and health of this rank's GPU, and which others of the node it reaches."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    others = [i for i in range(torch.cuda.device_count()) if i != device.index]
    return {
        "name": properties.name, "memory_gib": total / 2**30, "used_gib": (total - free) / 2**30,
        "unreached": [i for i in others
                      if not torch.cuda.can_device_access_peer(device.index, i)],
        "smi": ask_smi(f"GPU-{properties.uuid}"),
    }  # fmt: skip


def ask_smi(uuid: str) -> dict[str, Any] | None:
    """Driver, errors, temperature and reasons to throttle; None if nvidia-smi does not answer."""
    for reasons in _REASONS:
        command = ["nvidia-smi", f"--id={uuid}", "--format=csv,noheader,nounits",
                   f"--query-gpu={','.join((*_SMI_FIELDS, reasons))}"]  # fmt: skip
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_LIMIT_S,
                                  check=False)  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return None
        if said.returncode == 0:
            return parse_smi(said.stdout)
    return None


def parse_smi(line: str) -> dict[str, Any] | None:
    """`580.159.04, 0, 31, 0x0000000000000001` as numbers; what is not supported is None."""
    parts = (
        [part.strip() for part in line.strip().splitlines()[0].split(",")] if line.strip() else []
    )
    if len(parts) != len(_SMI_FIELDS) + 1:
        return None
    driver, errors, temperature, reasons = parts
    return {
        "driver": driver, "errors": int(errors) if errors.isdigit() else None,
        "temperature": int(temperature) if temperature.isdigit() else None,
        "reasons": int(reasons, 16) if reasons.startswith("0x") else None,
    }  # fmt: skip


def shared_folder(folder: Path, words: Group) -> dict[str, Any]:
    """Whether this rank can write into the folder and sees there what the others wrote. Collective.

    `fault`: why it cannot; `unseen`: ranks whose file is not there though they wrote one.
    """
    rank, fault = dist.get_rank(), None
    own = folder / f".preflight-{rank}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own.write_text("a checkpoint would stand here\n")
    except OSError as error:
        fault = f"{type(error).__name__}: {error}"
    faults = gathered(fault, words)
    wrote = [r for r, why in enumerate(faults) if why is None]
    unseen = [] if fault else [r for r in wrote if not (folder / f".preflight-{r}").is_file()]
    gathered(None, words)  # nobody takes its file away before all have looked
    if fault is None:
        own.unlink(missing_ok=True)
    return {"fault": fault, "unseen": unseen}


def clock_ahead_s(words: Group) -> float:
    """Seconds that this rank's clock is ahead of rank 0's, the median of rounds. Collective."""
    found: list[float] = []
    for _ in range(_CLOCK_ROUNDS):
        dist.barrier(group=words)
        times = gathered(time.time(), words)
        found.append(times[dist.get_rank()] - times[0])
    return statistics.median(found)


def all_reduce_gb_s(
    device: torch.device, group: Group | None, ranks: Sequence[int]
) -> dict[str, Any]:
    """Bus bandwidth of an all-reduce over a group that this rank is in, and whether it is right.

    Bus bandwidth is 2 (n - 1) / n bytes over seconds, in 10^9 bytes a second: what a link carries.
    """
    gpu_rank = device.type == "cuda"
    dtype = torch.bfloat16 if gpu_rank else torch.float32
    count = (_GPU_BYTES if gpu_rank else _CPU_BYTES) // dtype.itemsize
    x = torch.ones(count, dtype=dtype, device=device)
    dist.all_reduce(x, group=group)
    right = bool((x == len(ranks)).all())
    seconds = _timed(device, lambda: dist.all_reduce(x.fill_(0), group=group))
    share = 2 * (len(ranks) - 1) / len(ranks)
    return {"gb_s": share * x.nbytes / seconds / 1e9, "right": right}


def pair_gb_s(device: torch.device, local_world: int) -> float | None:
    """What this rank and its neighbour on the node send each other at once, each way, in GB/s.

    None where the node has no neighbour left for it. Collective over the pair.
    """
    rank = dist.get_rank()
    local = rank % local_world
    if (local ^ 1) >= local_world:
        return None
    other = rank - local + (local ^ 1)
    out, into = (torch.zeros(_GPU_BYTES, dtype=torch.uint8, device=device) for _ in range(2))

    def exchange() -> None:
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, out, other), dist.P2POp(dist.irecv, into, other)]
        )
        for work in works:
            work.wait()

    return out.nbytes / _timed(device, exchange) / 1e9


def _timed(device: torch.device, what: Callable[[], Any]) -> float:
    """Mean seconds of some calls, after a few that do not count."""
    times = _GPU_TIMES if device.type == "cuda" else _CPU_TIMES
    for _ in range(2):
        what()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        what()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / times


def scorers(config: RunConfig, limit_s: float) -> str | None:
    """Why the recipe's scorers would not do for this rank; None if they do."""
    from megatron_kvpo.reward.service import connect

    wanted = (*config.reward.weights, *config.reward.held_out)
    try:
        for judge in connect(config.reward.service, wanted, start_limit_s=limit_s):
            judge.close()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


def local_world(default: int) -> int:
    """Ranks of this machine, as whoever started them says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", default))
