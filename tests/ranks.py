"""Run a function on several ranks, CPU or one GPU each, and bring back what each returned."""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _main(
    rank: int, world: int, folder: str, limit_s: float, device: str, fn: Callable[..., Any],
    args: tuple,
) -> None:  # fmt: skip
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(0.9 * limit_s, file=sys.__stderr__)
    if device == "cuda":
        torch.cuda.set_device(rank)
        torch.backends.cudnn.allow_tf32 = False  # convolutions would round to 10 bits
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=limit_s),
    )
    ended = False
    try:
        torch.save(fn(rank, *args), f"{folder}/{rank}.pt")
        ended = True
    finally:  # NCCL would wait here for ranks that stand in a collective, and hide the error
        if dist.is_initialized() and (ended or device == "cpu"):
            dist.destroy_process_group()


def on_ranks(
    world: int, fn: Callable[..., Any], *args: Any, folder: Path, limit_s: float = 300,
    device: str = "cpu",
) -> list[Any]:  # fmt: skip
    """Call `fn(rank, *args)` on `world` ranks; return the results in rank order, on the CPU.

    `device` "cpu": gloo ranks; "cuda": NCCL ranks, GPU number `rank` for each. fn is not told.
    torch.distributed is up and torchrun's variables are set when fn begins. A file store, not a
    port, so tests can run side by side. What a rank raises is raised here; ranks that hang fail
    after limit_s, with their stacks on stderr: a collective that one rank skips must show as a
    failure, not as a stuck job. The limit is no measure of speed: it leaves room for a machine on
    which everything else runs too.
    A launch costs about 6 s with megatron-core in it: put many assertions into one.
    """
    own = tempfile.mkdtemp(dir=folder)
    arguments = (world, own, limit_s, device, fn, args)
    context = mp.spawn(_main, args=arguments, nprocs=world, join=False)
    deadline = time.monotonic() + limit_s
    while not context.join(timeout=1):  # True once all have ended; raises what a rank raised
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"ranks did not finish in {limit_s} s: a collective is out of step")
    return [
        torch.load(f"{own}/{rank}.pt", map_location="cpu", weights_only=False)
        for rank in range(world)
    ]
