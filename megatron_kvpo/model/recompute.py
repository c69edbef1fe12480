"""Which blocks keep their activations for backward: as many as the memory holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_SPARE = 3 * 2**29
"""Bytes left alone, for what backward and recomputation need for a moment."""


class Recompute:
    """Runs a model's blocks under a graph; those that cannot be kept are recomputed in backward.

    The first pass of a shape keeps one block and learns from it what a block takes.
    """

    def __init__(self) -> None:
        self._bytes: dict[Any, int] = {}

    def run(
        self, mode: bool | str, blocks: list[Callable[..., Tensor]], hidden: Tensor,
        arguments: list[tuple[Any, ...]],
    ) -> Tensor:  # fmt: skip
        """Send hidden through block after block, each with its own arguments.

        `mode` True: recompute all blocks; False: none; "auto": those that do not fit.
        """
        kept = self._kept(mode, hidden, len(blocks))
        measure = mode == "auto" and hidden.is_cuda and hidden.shape not in self._bytes
        for number, (block, own) in enumerate(zip(blocks, arguments, strict=True)):
            if number >= kept:
                hidden = checkpoint(block, hidden, *own, use_reentrant=False)
                continue
            before = torch.cuda.memory_allocated() if measure else 0
            hidden = block(hidden, *own)
            if measure:
                self._bytes[hidden.shape] = torch.cuda.memory_allocated() - before
                measure = False
        return hidden

    def _kept(self, mode: bool | str, hidden: Tensor, blocks: int) -> int:
        if mode != "auto":
            return 0 if mode else blocks
        if not hidden.is_cuda:
            return blocks
        size = self._bytes.get(hidden.shape)
        if size is None:
            return 1
        return max(0, min(blocks, (free_bytes(hidden.device) - _SPARE - 2 * size) // max(1, size)))


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take, what its allocator keeps idle included."""
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    used, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return min(torch.cuda.mem_get_info(device)[0] + reserved, allowed) - used
