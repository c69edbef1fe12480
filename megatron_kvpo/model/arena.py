"""Pages that nobody holds lend their memory to a backward pass.

A rollout needs several times the pages of a replay. What is idle meanwhile takes in activations
that would otherwise be computed twice: copying them costs a tenth of that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megatron_kvpo.model.pages import PagePool

_SMALLEST = 1 << 20
"""Bytes below which a tensor stays where it is."""

_ALIGNED = 256
_RECENT = 4
"""Tensors that are remembered: several products save the same input, one after the other."""


class Arena:
    """Memory of reserved pages, given out piece by piece and taken back at once."""

    def __init__(self, pool: PagePool, leave: int) -> None:
        """Reserve the longest run of free pages, as long as `leave` others stay free."""
        self._pool, self.pages = pool, pool.reserve_run(leave)
        part = slice(self.pages.start, self.pages.stop)
        self._spans = [
            held[layer, part].reshape(-1).view(torch.uint8)
            for held in (pool.key, pool.value)
            for layer in range(held.shape[0])
        ]
        self._used = [0] * len(self._spans)
        self._recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=_RECENT)

    @property
    def num_bytes(self) -> int:
        """What it holds at most."""
        return sum(len(span) for span in self._spans)

    def reset(self) -> None:
        """Forget what was saved: its graph has gone backward."""
        self._used = [0] * len(self._spans)
        self._recent.clear()

    def release(self) -> None:
        """Give the pages back."""
        self.reset()
        self._spans = []
        for page in self.pages:
            self._pool.drop(page)
        self.pages = range(0)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """What the graph saves inside lies here, as far as there is room."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept):
            yield
        self._recent.clear()

    def _pack(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        if size < _SMALLEST or isinstance(tensor, nn.Parameter) or not _is_dense(tensor):
            return tensor
        for kept, place in self._recent:
            if _is_same(kept, tensor):
                return place
        found = self._take(size)
        if found is None:
            return tensor
        place = found.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
        place.copy_(tensor.detach())
        self._recent.append((tensor, place))
        return place

    def _take(self, size: int) -> Tensor | None:
        for number, span in enumerate(self._spans):
            start = self._used[number]
            if start + size <= len(span):
                self._used[number] = start + -(-size // _ALIGNED) * _ALIGNED
                return span[start : start + size]
        return None


def _is_same(kept: Tensor, tensor: Tensor) -> bool:
    """Whether both are the same values in the same place; `kept` is alive, so nothing moved in."""
    return (
        kept.data_ptr() == tensor.data_ptr()
        and kept.shape == tensor.shape
        and kept.stride() == tensor.stride()
        and kept.dtype == tensor.dtype
        and kept._version == tensor._version
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill the memory that they lie in."""
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return reach + 1 == tensor.numel()
