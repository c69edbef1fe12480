"""Which blocks keep their activations for backward: as many as the memory holds.

The first ones in pages that nobody needs meanwhile, if there are any, the last in memory that is
free: backward comes to these first, and each that is recomputed has the place of one that is gone.
So the very last is kept at no cost. Of those that are recomputed some results may be held, see
held.py: they come before whole blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_kvpo.model.arena import Arena
from megatron_kvpo.model.held import KINDS, Held
from megatron_kvpo.parallel.collect import smallest
from megatron_kvpo.parallel.groups import Axis

SPARE_BYTES = 3 * 2**29
"""Bytes left alone, for what backward and recomputation need for a moment."""


class Recompute:
    """Runs a model's blocks under a graph; those that cannot be kept are recomputed in backward.

    The first pass of a shape keeps its last block and learns from it what a block takes.
    """

    def __init__(self, axes: Sequence[Axis] = ()) -> None:
        """`axes`: of ranks that talk within a block, and so run the same blocks again."""
        self.arena: Arena | None = None
        """Lent memory, while there is some."""

        self._axes = axes
        self._bytes: dict[Any, int] = {}
        self._held_bytes: dict[Any, dict[str, int]] = {}

    def run(
        self, mode: bool | str, blocks: list[Callable[..., Tensor]], hidden: Tensor,
        arguments: list[tuple[Any, ...]],
    ) -> Tensor:  # fmt: skip
        """Send hidden through block after block, each with its own arguments.

        `mode` True: recompute all blocks; False: none; "auto": those that do not fit.
        """
        lent, kept, *holding = self._kept(mode, hidden, len(blocks))
        measure = mode == "auto" and hidden.is_cuda and hidden.shape not in self._bytes
        if self.arena is not None:
            self.arena.reset()
        for number, (block, own) in enumerate(zip(blocks, arguments, strict=True)):
            if number < lent and self.arena is not None:
                with self.arena.saving():
                    hidden = block(hidden, *own)
            elif number >= len(blocks) - kept:
                before = torch.cuda.memory_allocated() if measure else 0
                hidden = block(hidden, *own)
                if measure:
                    self._bytes[hidden.shape] = torch.cuda.memory_allocated() - before
                    measure = False
            else:
                kinds = [k for k, c in zip(KINDS, holding, strict=True) if number - lent < c]
                hidden = self._recomputed(block, hidden, own, kinds)
        return hidden

    def _recomputed(
        self, block: Callable[..., Tensor], hidden: Tensor, own: tuple[Any, ...], kinds: list[str]
    ) -> Tensor:  # fmt: skip
        if not kinds:
            return checkpoint(block, hidden, *own, use_reentrant=False)  # type: ignore[no-any-return]
        held, shape = Held(kinds), hidden.shape
        hidden = checkpoint(
            block, hidden, *own, use_reentrant=False,
            context_fn=lambda: (held.running(again=False), held.running(again=True)),
        )  # fmt: skip
        self._held_bytes.setdefault(shape, {}).update({k: held.num_bytes(k) for k in kinds})
        return hidden

    def _kept(self, mode: bool | str, hidden: Tensor, blocks: int) -> tuple[int, ...]:
        """Blocks that keep activations: the first in lent memory, the last in the GPU's.

        Then how many hold each kind, from the first that is recomputed.
        """
        nothing = (0,) * len(KINDS)
        if mode != "auto" or not hidden.is_cuda:
            return 0, 0 if mode is True else blocks, *nothing
        size = self._bytes.get(hidden.shape)
        if size is None:
            return 0, 1, *(min(1, blocks - 1) for _ in KINDS)
        held = [self._held_bytes.get(hidden.shape, {}).get(kind, 0) for kind in KINDS]
        lent = 0 if self.arena is None else min(blocks, self.arena.num_bytes // (size + size // 16))
        free = free_bytes(hidden.device) - reserve_bytes(size)
        sizes = [-n for n in (size, *held)]
        free, lent, *sizes = smallest([free, lent, *sizes], self._axes, hidden.device)
        size, *held = (-n for n in sizes)
        own = hidden.numel() * hidden.element_size()
        return lent, *planned(blocks - lent, free, size, own, held)


def reserve_bytes(size: int) -> int:
    """Left free where a block takes `size`: by the last one, and in its place by one recomputed."""
    return SPARE_BYTES + size + size // 4


def planned(
    blocks: int, free: int, size: int, own: int, held: Sequence[int]
) -> tuple[int, ...]:  # fmt: skip
    """How many blocks are kept whole, and how many of the others hold each kind of results.

    The last is kept in what is reserved. Of the others results come first, kind after kind: they
    spare more a byte. What all of them leave is for whole blocks.

    Args:
        blocks: that are not in lent memory.
        free: bytes, less the reserve.
        size: bytes of a whole block, its input included.
        own: bytes of this input, which a recomputed block has anyway.
        held: bytes of a block's results, of each kind.
    """
    last, each = min(1, blocks), own + sum(held)
    others = blocks - last
    kept = _fit(others, free - others * each, size - each)
    left, counts = others - kept, []
    free -= kept * size + left * own
    for one in held:
        counts.append(_fit(left, free, one) if one else 0)
        free -= counts[-1] * one
    return last + kept, *counts


def _fit(count: int, free: int, each: int) -> int:
    return max(0, min(count, free // max(1, each)))


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take, what its allocator keeps idle included."""
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    used, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return min(torch.cuda.mem_get_info(device)[0] + reserved, allowed) - used
