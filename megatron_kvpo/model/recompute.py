"""Which blocks keep their activations for backward: as many as the memory holds.

The first ones in pages that nobody needs meanwhile, if there are any, the next in memory that is
free. Of those that are recomputed the results of attention may be held, where a pass has a sight:
as much memory as a block's input, and half of its arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_kvpo.model.arena import Arena
from megatron_kvpo.model.sight import Held

SPARE_BYTES = 3 * 2**29
"""Bytes left alone, for what backward and recomputation need for a moment."""


class Recompute:
    """Runs a model's blocks under a graph; those that cannot be kept are recomputed in backward.

    The first pass of a shape keeps one block and learns from it what a block takes.
    """

    def __init__(self) -> None:
        self.arena: Arena | None = None
        """Lent memory, while there is some."""

        self._bytes: dict[Any, int] = {}
        self._held_bytes: dict[Any, int] = {}

    def run(
        self, mode: bool | str, blocks: list[Callable[..., Tensor]], hidden: Tensor,
        arguments: list[tuple[Any, ...]],
    ) -> Tensor:  # fmt: skip
        """Send hidden through block after block, each with its own arguments.

        `mode` True: recompute all blocks; False: none; "auto": those that do not fit.
        """
        lent, kept, held = self._kept(mode, hidden, len(blocks))
        measure = mode == "auto" and hidden.is_cuda and hidden.shape not in self._bytes
        if self.arena is not None:
            self.arena.reset()
        for number, (block, own) in enumerate(zip(blocks, arguments, strict=True)):
            if number < lent and self.arena is not None:
                with self.arena.saving():
                    hidden = block(hidden, *own)
            elif number < lent + kept:
                before = torch.cuda.memory_allocated() if measure else 0
                hidden = block(hidden, *own)
                if measure:
                    self._bytes[hidden.shape] = torch.cuda.memory_allocated() - before
                    measure = False
            elif number < lent + kept + held:
                hidden = self._holding(block, hidden, own)
            else:
                hidden = checkpoint(block, hidden, *own, use_reentrant=False)
        return hidden

    def _holding(
        self, block: Callable[..., Tensor], hidden: Tensor, own: tuple[Any, ...]
    ) -> Tensor:  # fmt: skip
        held, shape = Held(), hidden.shape
        hidden = checkpoint(
            block, hidden, *own, use_reentrant=False,
            context_fn=lambda: (held.running(again=False), held.running(again=True)),
        )  # fmt: skip
        self._held_bytes[shape] = held.num_bytes
        return hidden

    def _kept(self, mode: bool | str, hidden: Tensor, blocks: int) -> tuple[int, int, int]:
        """Blocks that keep activations: in lent memory, in the GPU's; that hold attention."""
        if mode != "auto":
            return (0, 0, 0) if mode else (0, blocks, 0)
        if not hidden.is_cuda:
            return 0, blocks, 0
        size = self._bytes.get(hidden.shape)
        if size is None:
            return 0, 1, min(1, blocks - 1)
        lent = 0 if self.arena is None else min(blocks, self.arena.num_bytes // (size + size // 16))
        free, left = free_bytes(hidden.device) - SPARE_BYTES - 2 * size, blocks - lent
        held = self._held_bytes.get(hidden.shape, 0)
        if not held:
            return lent, max(0, min(left, free // max(1, size))), 0
        free -= left * hidden.numel() * hidden.element_size()  # a recomputed block has its input
        kept = max(0, min(left, (free - left * held) // max(1, size - held)))
        return lent, kept, max(0, min(left - kept, (free - kept * size) // held))


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take, what its allocator keeps idle included."""
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    used, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return min(torch.cuda.mem_get_info(device)[0] + reserved, allowed) - used
