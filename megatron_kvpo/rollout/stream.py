"""Rows of video that stream together: what a block sees, the clean pass, re-cache, fork.

All rows of a `Stream` stand at the same latent frame, so they run as one batch. A row is a page
table; rows of one group share their prefix's pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kvpo.config import RoutingConfig, StreamConfig
from megatron_kvpo.flow import timestep
from megatron_kvpo.model.causal_wan import CausalWan, TextKeys
from megatron_kvpo.model.pages import PagePool, PageTable, PassPages
from megatron_kvpo.routing import plain_context, routed_context


@dataclass(frozen=True, slots=True)
class World:
    """What every stream of a run needs: the model, its pages and how videos are made."""

    model: CausalWan
    pool: PagePool
    stream: StreamConfig
    routing: RoutingConfig


def new_world(model: CausalWan, stream: StreamConfig, routing: RoutingConfig, rows: int) -> World:
    """A world whose pool holds `rows` private streams, each with a block in flight."""
    frames = min(stream.resident_frames, stream.num_frames) + stream.block_frames
    return World(model, model.new_pool(rows * frames), stream, routing)


class Stream:
    """Some rows at one latent frame."""

    def __init__(
        self, world: World, tables: list[PageTable], text: TextKeys, frame: int = 0
    ) -> None:
        """`text` holds one text a row."""
        self.world, self.tables, self.text, self.frame = world, tables, text, frame

    @staticmethod
    def begin(world: World, num_rows: int, text: TextKeys) -> Stream:
        """Rows with nothing in their cache."""
        return Stream(world, [PageTable(world.pool) for _ in range(num_rows)], text)

    def fork(self, copies: int, text: TextKeys) -> Stream:
        """`copies` rows that continue this stream's only row and share its pages."""
        if len(self.tables) != 1:
            raise ValueError(f"only a stream of 1 row forks, this one has {len(self.tables)}")
        tables = [self.tables[0].fork() for _ in range(copies)]
        return Stream(self.world, tables, text, self.frame)

    def release(self) -> None:
        """Give all pages back."""
        for table in self.tables:
            table.release()

    def velocity(
        self, state_BFCHW: Tensor, sigma: float, routed_B: Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        """The model's velocity of the next block at noise level sigma; leaves nothing behind."""
        return self._pass(state_BFCHW, sigma, self._context(routed_B), None)

    @torch.no_grad()
    def commit(
        self, clean_BFCHW: Tensor, routed_B: Sequence[Sequence[int]] | None = None,
        sigma: float = 0.0,
    ) -> None:  # fmt: skip
        """Fill the cache with the finished block (at `sigma` 0: the clean pass) and move on."""
        context = self._context(routed_B)
        block = range(self.frame, self.frame + clean_BFCHW.shape[1])
        own = [[table.renew(frame) for frame in block] for table in self.tables]
        self._pass(clean_BFCHW, sigma, context, own)
        self.frame = block.stop
        self._evict()

    @torch.no_grad()
    def recache(self, text: TextKeys, latent_BFCHW: Tensor) -> None:
        """Switch to a new text and rewrite the last window of frames under it.

        All of them see the sink as cached and the fresh keys of the newest window - sink frames,
        without causal mask; older ones are queries only. The sink is not rewritten.

        Args:
            text: one text a row.
            latent_BFCHW: finished latents of all frames so far, from frame 0.
        """
        self.text = text
        stream = self.world.stream
        first = max(stream.sink_frames, self.frame - stream.window_frames)
        seen_from = max(first, self.frame - stream.window_frames + stream.sink_frames)
        if self.frame <= stream.sink_frames:
            return
        sink = [table.lookup(range(stream.sink_frames)) for table in self.tables]
        frames = range(first, self.frame)
        own = [[table.renew(frame) for frame in frames] for table in self.tables]
        self._run(latent_BFCHW[:, first:], 0.0, frames, sink, own, own_from=seen_from - first)

    def _context(self, routed_B: Sequence[Sequence[int]] | None) -> list[list[int]]:
        """Pages that each row's next block sees."""
        stream, plain = self.world.stream, plain_context(self.frame, self.world.stream)
        if routed_B is None:
            return [table.lookup(plain) for table in self.tables]
        seen = (
            routed_context(self.frame, routed, stream, self.world.routing) if routed else plain
            for routed in routed_B
        )
        return [table.lookup(f) for table, f in zip(self.tables, seen, strict=True)]

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
            torch.tensor(context, dtype=torch.long, device=device).view(len(self.tables), -1),
            None if own is None else torch.tensor(own, dtype=torch.long, device=device),
            own_from,
        )
        time_B1 = torch.full((len(self.tables), 1), timestep(sigma), device=device)
        return self.world.model(latent_BFCHW, time_B1, frames, self.text, pages)  # type: ignore[no-any-return]

    def _evict(self) -> None:
        """Let go of frames that are neither sink nor resident."""
        stream = self.world.stream
        oldest = self.frame - (stream.resident_frames - stream.sink_frames)
        for table in self.tables:
            for frame in [f for f in table.pages if stream.sink_frames <= f < oldest]:
                table.evict(frame)
