"""Keys and values in pages: one pool for a model, one page a latent frame, all layers together.

A stream is a table from latent frame to page. Branches share the pages of their prefix: a fork
copies the table, not the pages, and whoever rewrites a frame takes a new page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class PagePool:
    """Preallocated keys and values of every layer, with a free list and reference counts."""

    def __init__(
        self, *, num_pages: int, num_layers: int, tokens_per_frame: int, num_heads: int,
        head_dim: int, device: torch.device, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        """num_heads is this rank's share. Memory: 2 * layers * pages * tokens * heads * size."""
        shape = (num_layers, num_pages, tokens_per_frame, num_heads, head_dim)
        self.key = torch.zeros(shape, device=device, dtype=dtype)
        self.value = torch.zeros(shape, device=device, dtype=dtype)
        self._free = list(range(num_pages - 1, -1, -1))
        self._uses = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """A free page, held once. ValueError when there is none."""
        if not self._free:
            raise ValueError(
                f"all {len(self._uses)} pages are in use: lower policy.max_rows or "
                "stream.resident_frames"
            )
        page = self._free.pop()
        self._uses[page] = 1
        return page

    def reserve_run(self, leave: int) -> range:
        """Take the longest run of neighbouring free pages, so that `leave` others stay free."""
        free, best, start = sorted(self._free), range(0), 0
        for i in range(1, len(free) + 1):
            if i == len(free) or free[i] != free[i - 1] + 1:
                if i - start > len(best):
                    best = range(free[start], free[i - 1] + 1)
                start = i
        best = best[: max(0, len(free) - leave)]
        self._free = [page for page in self._free if page not in best]
        for page in best:
            self._uses[page] = 1
        return best

    def hold(self, page: int) -> None:
        """Count one more holder of a page."""
        self._uses[page] += 1

    def drop(self, page: int) -> None:
        """Count one holder less; the last one frees the page."""
        self._uses[page] -= 1
        if self._uses[page] == 0:
            self._free.append(page)

    def read(self, layer: int, pages_BM: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of frames' pages: [B, M] page numbers -> two [B, M * tokens, A, E]."""
        return gather_pages(self.key[layer], pages_BM), gather_pages(self.value[layer], pages_BM)

    def write(self, layer: int, pages_BF: Tensor, key_BLAE: Tensor, value_BLAE: Tensor) -> None:
        """Fill pages from one pass's own keys and values; they leave the graph."""
        flat = pages_BF.reshape(-1)
        shape = (len(flat), *self.key.shape[2:])
        self.key[layer].index_copy_(0, flat, key_BLAE.detach().reshape(shape))
        self.value[layer].index_copy_(0, flat, value_BLAE.detach().reshape(shape))

    def copy(self, layer: int, source_BF: Tensor, target_BF: Tensor) -> None:
        """Copy one layer of pages onto others. No page is both source and target."""
        source, target = source_BF.reshape(-1), target_BF.reshape(-1)
        for held in (self.key, self.value):
            held[layer].index_copy_(0, target, held[layer].index_select(0, source))

    def mean_keys(self, layer: int, pages_BM: Tensor) -> Tensor:
        """Mean of each page's keys over its tokens, in float32: [B, M] -> [B, M, A, E]."""
        keys = self.key[layer].index_select(0, pages_BM.reshape(-1))
        return keys.mean(dim=1, dtype=torch.float32).view(*pages_BM.shape, *self.key.shape[3:])


def gather_pages(page_NTAE: Tensor, pages_BM: Tensor) -> Tensor:
    """The tokens of each row's pages, in order: [B, M * T, A, E]."""
    rows, frames = pages_BM.shape
    found = page_NTAE.index_select(0, pages_BM.reshape(-1))
    return found.view(rows, frames * page_NTAE.shape[1], *page_NTAE.shape[2:])


class PageTable:
    """One stream's frames. Frames not in it have left the cache."""

    def __init__(self, pool: PagePool, pages: dict[int, int] | None = None) -> None:
        self._pool = pool
        self.pages: dict[int, int] = dict(pages or {})

    def fork(self) -> PageTable:
        """A table that shares every page and diverges from here on."""
        for page in self.pages.values():
            self._pool.hold(page)
        return PageTable(self._pool, self.pages)

    def renew(self, frame: int) -> int:
        """A page of this table's own for `frame`, to be written; a shared one is left to others."""
        if frame in self.pages:
            self._pool.drop(self.pages[frame])
        self.pages[frame] = self._pool.take()
        return self.pages[frame]

    def evict(self, frame: int) -> None:
        """Let a frame go."""
        self._pool.drop(self.pages.pop(frame))

    def release(self) -> None:
        """Let every frame go."""
        for frame in list(self.pages):
            self.evict(frame)

    def lookup(self, frames: Sequence[int]) -> list[int]:
        """Pages of these frames. ValueError names those that have left the cache."""
        missing = [frame for frame in frames if frame not in self.pages]
        if missing:
            raise ValueError(
                f"latent frames {missing} have left the cache, which holds {sorted(self.pages)}"
            )
        return [self.pages[frame] for frame in frames]


@dataclass(frozen=True, slots=True)
class PassPages:
    """What one forward pass reads from the pool and where it leaves its own keys and values."""

    pool: PagePool
    read_BM: Tensor
    """Page of every cached frame that each row attends to, in order. May have no columns."""

    write_BF: Tensor | None = None
    """Page for each of the pass's own frames; None leaves nothing behind."""

    own_from: int = 0
    """Own frames before this one are queries only (a re-cache sees just the window's)."""

    num_memory: int = 0
    """Leading columns of read_BM that are memory: sink and bank."""

    num_chosen: int = 0
    """Memory frames that each head attends to, its best ones (SMA). 0: all."""

    fills_only: bool = False
    """Only what it leaves behind is wanted: the last block ends with its keys and values."""
