"""MemFlow's memory: a bank of old frames that the text keeps in view, and sparse attention to it.

A row's bank has one page a slot. Page numbers are the same in all layers; what a page holds is
each layer's own choice. So the choices never leave the device, and pages are counted without them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_kvpo.model.pages import PagePool
from megatron_kvpo.parallel.collect import mean_over
from megatron_kvpo.parallel.groups import Ranks
from megatron_kvpo.parallel.transfer import indices


class MemoryBank:
    """One row's bank and the frame that waits to enter it.

    A staged frame's page is held, not copied: who rewrites the frame takes a new page, so a
    re-cache leaves the staged keys and values, and the bank, as they were.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self.slots: list[int] = []
        """Page of each filled slot."""

        self.staged: int | None = None
        """Page of the frame staged last; None before the first."""

        self.num_staged = 0
        """Frames staged so far."""

        self.due = False
        """Whether the next block's first pass commits the staged frame."""

        self.new_text = False
        """Whether that commit ranks with a text query of 0 (a reference quirk)."""

    def fork(self) -> MemoryBank:
        """A bank that shares every page and goes its own way from here on."""
        bank = MemoryBank(self._pool)
        bank.slots, bank.staged, bank.num_staged = list(self.slots), self.staged, self.num_staged
        bank.due, bank.new_text = self.due, self.new_text
        for page in bank._held():
            self._pool.hold(page)
        return bank

    def release(self) -> None:
        """Give all pages back."""
        for page in self._held():
            self._pool.drop(page)
        self.slots, self.staged = [], None

    def stage(self, page: int) -> None:
        """Let the frame of this page wait for the next block, in place of the one before."""
        self._pool.hold(page)
        if self.staged is not None:
            self._pool.drop(self.staged)
        self.staged, self.num_staged = page, self.num_staged + 1

    def must_choose(self, size: int) -> bool:
        """Whether a commit to `size` slots needs scores: not while it fills, not when all tie."""
        return self.num_staged > size > 1 and not self.new_text

    def admit(self, size: int, best: Sequence[int] | None = None) -> None:
        """Put the staged frame behind `best`, pages taken for this, or behind the first slots.

        The k-th staged frame takes slot k while k <= size, and the last slot from then on.
        """
        if self.staged is None:
            raise ValueError("0 frames are staged: a bank admits one after MemoryBank.stage")
        if best is None:
            best = self.slots[: min(self.num_staged, size) - 1]
            for page in best:
                self._pool.hold(page)
        self._pool.hold(self.staged)
        before, self.slots = self.slots, [*best, self.staged]
        for page in before:
            self._pool.drop(page)

    def _held(self) -> list[int]:
        return self.slots if self.staged is None else [*self.slots, self.staged]


@torch.no_grad()
def commit(
    banks: Sequence[MemoryBank], size: int, text: Sequence[tuple[Tensor, Tensor]],
    pool: PagePool, ranks: Ranks,
) -> None:  # fmt: skip
    """Let every row's staged frame into its bank of `size` frames, in all layers.

    A full bank keeps its size - 1 best frames, best first, and appends the staged one. The kept
    ones are copied to pages of the row's own, layer by layer; forks keep what they had.

    Args:
        banks: one a row; each has a staged frame.
        size: slots of a bank.
        text: cross-attention keys and values of each layer, one text a row.
        pool: of the banks' pages.
        ranks: tensor and context ranks share the heads and choose alike.
    """
    rows = [row for row, bank in enumerate(banks) if bank.must_choose(size)]
    taken = {row: [pool.take() for _ in range(size - 1)] for row in rows}
    if rows:
        device = pool.key.device
        slots_BS = indices([banks[row].slots for row in rows], device)
        target_BK = indices(list(taken.values()), device)
        chosen = indices(rows, device)
        texts = [key_BXAE if len(rows) == len(banks) else key_BXAE[chosen] for key_BXAE, _ in text]
        order = rank_slots(_scores(slots_BS, texts, pool, ranks))[..., : size - 1]
        for layer, order_BK in enumerate(order):
            pool.copy(layer, slots_BS.gather(1, order_BK), target_BK)
    for row, bank in enumerate(banks):
        bank.admit(size, taken.get(row))


def _scores(slots_BS: Tensor, text: Sequence[Tensor], pool: PagePool, ranks: Ranks) -> Tensor:
    """Mean over text tokens, heads and the frame's tokens of K_text . K_bank / sqrt(E).

    Means come before the product, which is linear in both. [layers, B, S], alike on all ranks.
    """
    axis, layers = ranks.context, []
    for layer, key_BXAE in enumerate(text):
        text_BAE = key_BXAE.mean(dim=1, dtype=torch.float32).chunk(axis.size, dim=1)[axis.rank]
        frame_BSAE = pool.mean_keys(layer, slots_BS)
        layers.append((text_BAE[:, None] * frame_BSAE).sum(dim=-1).mean(dim=-1))
    mean = mean_over(mean_over(torch.stack(layers), ranks.tensor), ranks.context)
    return mean / math.sqrt(pool.key.shape[-1])


def rank_slots(score: Tensor, dim: int = -1) -> Tensor:
    """Slots by falling score along `dim`; the lower slot first among equals, on any device."""
    return score.sort(dim=dim, descending=True, stable=True).indices


def choose_frames(
    query_LBAE: Tensor, cached: tuple[Tensor, Tensor], count: int, keep: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """MemFlow's sparse memory attention (SMA): each head keeps its best of the first frames.

    score = (mean of q over the pass's tokens) . (mean of k over the frame's tokens), after RoPE.
    Carries no gradient to the choice. Kept frames stay in their order.

    Args:
        query_LBAE: queries of the pass.
        cached: keys and values of cached frames, two [B, M, A, E].
        count: leading frames to choose among; those behind them always stay.
        keep: how many of these each head attends to.
        tokens: of one frame.
    """
    memory = count * tokens
    rows, _, heads, dim = cached[0].shape
    frames_BFLAE = cached[0][:, :memory].reshape(rows, count, tokens, heads, dim)
    query_BAE = query_LBAE.detach().mean(dim=0, dtype=torch.float32)
    mean_BFAE = frames_BFLAE.detach().mean(dim=2, dtype=torch.float32)
    score_BFA = (query_BAE[:, None] * mean_BFAE).sum(dim=-1)
    best_BFA = rank_slots(score_BFA, dim=1)[:, :keep].sort(dim=1).values
    index = best_BFA[:, :, None, :, None].expand(-1, -1, tokens, -1, dim)

    def chosen(x_BMAE: Tensor) -> Tensor:
        frames = x_BMAE[:, :memory].reshape(rows, count, tokens, heads, dim)
        return torch.cat([frames.gather(1, index).flatten(1, 2), x_BMAE[:, memory:]], dim=1)

    key, value = cached
    return chosen(key), chosen(value)
