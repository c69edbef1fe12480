"""Rows of video that stream together: what a block sees, the clean pass, re-cache, fork.

All rows of a `Stream` stand at the same latent frame, so they run as one batch. A row is a page
table and, for MemFlow, a memory bank; rows of one group share their prefix's pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kvpo.config import MemoryConfig, RoutingConfig, StreamConfig
from megatron_kvpo.flow import timestep
from megatron_kvpo.model.arena import Arena
from megatron_kvpo.model.causal_wan import CausalWan, TextKeys
from megatron_kvpo.model.memory_bank import MemoryBank, commit
from megatron_kvpo.model.pages import PagePool, PageTable, PassPages
from megatron_kvpo.parallel.transfer import indices
from megatron_kvpo.routing import plain_context, routed_context
from megatron_kvpo.stopwatch import stage

NO_BANK = MemoryConfig()
"""LongLive: sink and recent frames are all that a block sees."""


@dataclass(frozen=True, slots=True)
class World:
    """What every stream of a run needs: the model, its pages and how videos are made."""

    model: CausalWan
    pool: PagePool
    stream: StreamConfig
    routing: RoutingConfig
    memory: MemoryConfig


def new_world(
    model: CausalWan, stream: StreamConfig, routing: RoutingConfig, rows: int,
    memory: MemoryConfig = NO_BANK,
) -> World:  # fmt: skip
    """A world whose pool holds `rows` private streams, each with a block in flight.

    With a bank each also has its slots, a staged frame and, while it commits, the slots to come.
    """
    frames = min(stream.resident_frames, stream.num_frames) + stream.block_frames
    pages = rows * (frames + 2 * memory.bank_frames)
    return World(model, model.new_pool(pages), stream, routing, memory)


@contextmanager
def lent_pages(world: World, leave: int) -> Iterator[None]:
    """Let backward passes inside keep activations in pages that are free; `leave` of them stay."""
    arena = Arena(world.pool, leave) if world.model.model_config.recompute == "auto" else None
    world.model.recompute.arena = arena
    try:
        yield
    finally:
        world.model.recompute.arena = None
        if arena is not None:
            arena.release()


class Stream:
    """Some rows at one latent frame."""

    def __init__(
        self, world: World, tables: list[PageTable], text: TextKeys, frame: int = 0,
        banks: list[MemoryBank] | None = None, resident: int | None = None,
    ) -> None:  # fmt: skip
        """`text` holds one text a row; `banks` one bank a row, None for empty ones.

        `resident`: frames that stay in the cache; None is stream.resident_frames.
        """
        self.world, self.tables, self.text, self.frame = world, tables, text, frame
        self._resident = world.stream.resident_frames if resident is None else resident
        self.banks = [MemoryBank(world.pool) for _ in tables] if banks is None else banks

    @staticmethod
    def begin(world: World, num_rows: int, text: TextKeys, resident: int | None = None) -> Stream:
        """Rows with nothing in their cache."""
        tables = [PageTable(world.pool) for _ in range(num_rows)]
        return Stream(world, tables, text, resident=resident)

    def fork(self, copies: int, text: TextKeys) -> Stream:
        """`copies` rows that continue this stream's only row and share its pages."""
        if len(self.tables) != 1:
            raise ValueError(f"only a stream of 1 row forks, this one has {len(self.tables)}")
        tables = [self.tables[0].fork() for _ in range(copies)]
        banks = [self.banks[0].fork() for _ in range(copies)]
        return Stream(self.world, tables, text, self.frame, banks, self._resident)

    def keep_window(self) -> None:
        """From now on nothing is routed: let all go that the plain window does not need."""
        self._resident = self.world.stream.window_frames
        self._evict()

    def hold(self) -> Stream:
        """The same rows once more: no page that they have is rewritten until this is released."""
        tables, banks = [t.fork() for t in self.tables], [bank.fork() for bank in self.banks]
        return Stream(self.world, tables, self.text, self.frame, banks, self._resident)

    def part(self, rows: Sequence[int], text: TextKeys) -> Stream:
        """Some of the rows themselves, under texts of their own. Not to be released."""
        tables, banks = [self.tables[i] for i in rows], [self.banks[i] for i in rows]
        return Stream(self.world, tables, text, self.frame, banks, self._resident)

    def release(self) -> None:
        """Give all pages back."""
        for table in self.tables:
            table.release()
        for bank in self.banks:
            bank.release()

    def velocity(
        self, state_BFCHW: Tensor, sigma: float, routed_B: Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        """The model's velocity of the next block at noise level sigma; writes no keys or values.

        A block's first pass lets the staged frame into the bank, if it is due.
        """
        self._remember()
        return self._pass(state_BFCHW, sigma, self._context(routed_B), None)

    @torch.no_grad()
    def commit(
        self, clean_BFCHW: Tensor, routed_B: Sequence[Sequence[int]] | None = None,
        sigma: float = 0.0,
    ) -> None:  # fmt: skip
        """Fill the cache with the finished block (at `sigma` 0: the clean pass) and move on."""
        self._remember()
        context = self._context(routed_B)
        block = range(self.frame, self.frame + clean_BFCHW.shape[1])
        own = [[table.renew(frame) for frame in block] for table in self.tables]
        self._pass(clean_BFCHW, sigma, context, own)
        self._stage(block)
        self.frame = block.stop
        self._evict()

    @torch.no_grad()
    def recache(self, text: TextKeys, latent_BFCHW: Tensor) -> None:
        """Switch to a new text and rewrite the last window of frames under it.

        All of them see the sink as cached, the bank, and the fresh keys of the newest window - sink
        frames, without causal mask; older ones are queries only. Sink and bank are not rewritten.

        Args:
            text: one text a row.
            latent_BFCHW: finished latents of all frames so far, from frame 0.
        """
        self.text = text
        if self.world.memory.reference_quirks and self.banks[0].staged is not None:
            for bank in self.banks:
                bank.new_text = True
            self._commit_staged()
        stream = self.world.stream
        first = max(stream.sink_frames, self.frame - stream.window_frames)
        seen_from = max(first, self.frame - stream.window_frames + stream.sink_frames)
        if self.frame <= stream.sink_frames:
            return
        frames, rows = range(first, self.frame), len(self.tables)
        most = -(-rows * stream.block_frames // len(frames))  # the tokens of a block of all rows
        with stage("recache"):
            for start in range(0, rows, most):
                numbers = range(start, min(start + most, rows))
                own = text
                if len(numbers) < rows:
                    own = text.select(indices(numbers, latent_BFCHW.device))
                part = self.part(numbers, own)
                part._refill(latent_BFCHW[start : start + most, first:], frames, seen_from - first)
        self._evict()  # the oldest were queries, and may have left the cache before

    def _refill(self, latent_BFCHW: Tensor, frames: range, own_from: int) -> None:
        """One pass of a re-cache."""
        sink = [table.lookup(range(self.world.stream.sink_frames)) for table in self.tables]
        own = [[table.renew(frame) for frame in frames] for table in self.tables]
        self._run(latent_BFCHW, 0.0, frames, self._with_bank(sink), own, own_from)

    def _context(self, routed_B: Sequence[Sequence[int]] | None) -> list[list[int]]:
        """Pages that each row's next block sees."""
        stream, plain = self.world.stream, plain_context(self.frame, self.world.stream)
        if routed_B is None:
            return self._with_bank([table.lookup(plain) for table in self.tables])
        seen = (
            routed_context(self.frame, routed, stream, self.world.routing) if routed else plain
            for routed in routed_B
        )
        return self._with_bank([t.lookup(f) for t, f in zip(self.tables, seen, strict=True)])

    @property
    def _num_sink(self) -> int:
        """Sink frames that exist; the first of whatever a pass reads."""
        return min(self.world.stream.sink_frames, self.frame)

    def _with_bank(self, context: list[list[int]]) -> list[list[int]]:
        """Each row's pages with those of its bank behind the sink's, twice seen or not."""
        sink = self._num_sink
        return [
            [*row[:sink], *bank.slots, *row[sink:]]
            for row, bank in zip(context, self.banks, strict=True)
        ]

    def _remember(self) -> None:
        """Before a block's first pass, whichever it is: let in the staged frames that are due."""
        if any(bank.due for bank in self.banks):  # rows at one frame stage alike: then all are
            self._commit_staged()
            for bank in self.banks:
                bank.due = bank.new_text = False

    def _commit_staged(self) -> None:
        world = self.world
        size, ranks = world.memory.bank_frames, world.model.spec.ranks
        commit(self.banks, size, self.text.layers, world.pool, ranks)

    def _stage(self, block: range) -> None:
        """After a clean pass: every `stage_blocks` blocks the first frame waits for the bank.

        The reference then commits it at each block until the next one waits.
        """
        memory = self.world.memory
        if not memory.bank_frames:
            return
        staged = block.start % (memory.stage_blocks * self.world.stream.block_frames) == 0
        for table, bank in zip(self.tables, self.banks, strict=True):
            if staged:
                bank.stage(table.pages[block.start])
            bank.due = staged or memory.reference_quirks

    def _pass(
        self, latent_BFCHW: Tensor, sigma: float, context: list[list[int]],
        own: list[list[int]] | None,
    ) -> Tensor:  # fmt: skip
        frames = range(self.frame, self.frame + latent_BFCHW.shape[1])
        return self._run(latent_BFCHW, sigma, frames, context, own)

    def _run(
        self, latent_BFCHW: Tensor, sigma: float, frames: range, context: list[list[int]],
        own: list[list[int]] | None, own_from: int = 0,
    ) -> Tensor:  # fmt: skip
        device = latent_BFCHW.device
        pages = PassPages(
            self.world.pool,
            indices(context, device).view(len(self.tables), -1),
            None if own is None else indices(own, device),
            own_from,
            fills_only=own is not None,
            num_memory=self._num_sink + len(self.banks[0].slots),
            num_chosen=self.world.memory.sparse_frames if self.world.memory.sparse else 0,
        )
        time_B1 = torch.full((len(self.tables), 1), timestep(sigma), device=device)
        return self.world.model(latent_BFCHW, time_B1, frames, self.text, pages)  # type: ignore[no-any-return]

    def _evict(self) -> None:
        """Let go of frames that are neither sink nor resident."""
        stream = self.world.stream
        oldest = self.frame - (self._resident - stream.sink_frames)
        for table in self.tables:
            for frame in [f for f in table.pages if stream.sink_frames <= f < oldest]:
                table.evict(frame)
