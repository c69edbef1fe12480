"""Which tokens of a pass see which, and attention over exactly these: no mask, no masked-out work.

A sight cuts a pass's tokens into stretches of queries and names the stretches of keys that each of
them sees. Stretches of one shape are one call of a kernel; the keys of each are laid side by side
for it and forgotten, in backward laid side by side again.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_kvpo.method_config import StreamConfig
from megatron_kvpo.model.sdpa import kernel_for
from megatron_kvpo.routing import plain_context

Stretch = tuple[int, int]
"""[start, stop) in tokens of the pass."""

Results = tuple[Tensor | None, ...]
"""What attention gave, and what backward wants of each batch of pieces; a kernel may leave gaps."""

_KEYS_AT_ONCE = 160_000
"""Keys that are laid side by side for one call, at most, if a single piece has no more: eight
windows of Wan's fill a GPU to 96 %."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some consecutive tokens and what they see."""

    query: Stretch
    keys: tuple[Stretch, ...]
    """Disjoint and not empty."""

    @property
    def shape(self) -> tuple[int, int]:
        """Queries and keys of the piece."""
        return self.query[1] - self.query[0], sum(b - a for a, b in self.keys)


@dataclass(frozen=True, slots=True)
class Sight:
    """What each token of a pass attends to. ValueError unless the pieces cover it in order."""

    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        edges = [0, *(piece.query[1] for piece in self.pieces)]
        if not self.pieces or [p.query[0] for p in self.pieces] != edges[:-1]:
            raise ValueError(
                f"pieces {[p.query for p in self.pieces]} must cover a pass's tokens in order"
            )
        for piece in self.pieces:
            ends = [0, *itertools.chain.from_iterable(sorted(piece.keys)), edges[-1]]
            if ends != sorted(ends) or min(piece.shape) < 1:
                raise ValueError(
                    f"tokens {piece.query} see {piece.keys}: keys must lie apart, in [0, "
                    f"{edges[-1]}), and there must be some"
                )

    @property
    def num_tokens(self) -> int:
        """Of the pass."""
        return self.pieces[-1].query[1]

    @property
    def num_pairs(self) -> int:
        """(query, key) pairs that attention computes."""
        return sum(queries * keys for queries, keys in (piece.shape for piece in self.pieces))


def diffusion_sight(stream: StreamConfig, tokens_per_frame: int) -> Sight:
    """One sequence: a block sees itself and the frames that its streaming window holds."""
    return _sight(
        [
            (start, [*plain_context(start, stream), *_block(start, stream)])
            for start in range(0, stream.num_frames, stream.block_frames)
        ],
        stream.block_frames, tokens_per_frame,
    )  # fmt: skip


def teacher_sight(stream: StreamConfig, tokens_per_frame: int) -> Sight:
    """[clean frames, noisy frames]: a block sees itself and the clean frames its window holds.

    The last clean block, which no other sees, is left out: see `teacher_frames`.
    """
    clean = stream.num_frames - stream.block_frames
    starts = range(0, stream.num_frames, stream.block_frames)
    blocks = [
        (start, [*plain_context(start, stream), *_block(start, stream)]) for start in starts[:-1]
    ]
    for start in starts:
        own = [clean + frame for frame in _block(start, stream)]
        blocks.append((clean + start, [*plain_context(start, stream), *own]))
    return _sight(blocks, stream.block_frames, tokens_per_frame)


def teacher_frames(stream: StreamConfig) -> list[int]:
    """Latent frame numbers of [clean frames but for the last block, noisy frames]."""
    return [*range(stream.num_frames - stream.block_frames), *range(stream.num_frames)]


def _block(start: int, stream: StreamConfig) -> range:
    return range(start, start + stream.block_frames)


def _sight(blocks: Sequence[tuple[int, list[int]]], size: int, tokens: int) -> Sight:
    """From each block's first place in the pass and the places, ascending, that it sees."""
    pieces = []
    for start, seen in blocks:
        cuts = [0, *(i for i in range(1, len(seen)) if seen[i] != seen[i - 1] + 1), len(seen)]
        keys = [(seen[a] * tokens, (seen[b - 1] + 1) * tokens) for a, b in itertools.pairwise(cuts)]
        pieces.append(Piece((start * tokens, (start + size) * tokens), tuple(keys)))
    return Sight(tuple(pieces))


@functools.cache
def batches(sight: Sight) -> tuple[tuple[Piece, ...], ...]:
    """The pieces, those of one shape together as far as a call takes them."""
    alike: dict[tuple[int, int], list[Piece]] = {}
    for piece in sight.pieces:
        alike.setdefault(piece.shape, []).append(piece)
    found: list[tuple[Piece, ...]] = []
    for (_, keys), pieces in alike.items():
        calls = -(-len(pieces) * keys // max(keys, _KEYS_AT_ONCE))
        size = -(-len(pieces) // calls)
        found += [tuple(pieces[i : i + size]) for i in range(0, len(pieces), size)]
    return tuple(found)


def attend_seen(
    query_LBAE: Tensor, key_LBAE: Tensor, value_LBAE: Tensor, sight: Sight
) -> Tensor:  # fmt: skip
    """softmax(Q K^T / sqrt(E)) V over what each token sees, per row and head. [L, B, A, E].

    ValueError for a pass of another length than the sight's.
    """
    if len(query_LBAE) != sight.num_tokens:
        raise ValueError(
            f"the sight is of {sight.num_tokens} tokens, the pass has {len(query_LBAE)}: make it "
            "from the settings that the pass has"
        )
    inputs: tuple[Tensor, ...] = (query_LBAE, key_LBAE, value_LBAE)
    device = query_LBAE.device.type
    if torch.is_autocast_enabled(device):
        inputs = tuple(x.to(torch.get_autocast_dtype(device)) for x in inputs)
    return _Seen.apply(*inputs, sight)  # type: ignore[no-untyped-call, no-any-return]


@dataclass(slots=True)
class Held:
    """Attention's results of a block that is recomputed: taken at the first run, used at the next.

    They cost as much memory as the block's input, and half of its arithmetic to make again.
    """

    results: list[Results] = field(default_factory=list)
    _again: bool = False

    @property
    def num_bytes(self) -> int:
        """What they take."""
        held = itertools.chain.from_iterable(self.results)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    @contextmanager
    def running(self, *, again: bool) -> Iterator[None]:
        """Inside, `attend_seen` leaves its results here, or takes them if it runs `again`."""
        global _held
        before, _held, self._again = _held, self, again
        try:
            yield
        finally:
            _held = before

    def results_of(self, make: Callable[[], Results]) -> Results:
        """What `make` makes, kept, or what it made in the first run, once."""
        if self._again:
            return self.results.pop(0)
        made = make()
        self.results.append(tuple(None if t is None else t.detach() for t in made))
        return made


_held: Held | None = None
"""Of the block that runs under recomputation, if its attention is to be held."""


class _Seen(torch.autograd.Function):
    """`attend_seen`. Keys are saved once, not as often as they are seen."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
        make = functools.partial(_forward, query, key, value, sight)
        out, *rest = make() if _held is None else _held.results_of(make)
        ctx.save_for_backward(query, key, value, out, *rest)
        ctx.sight = sight
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, *rest = ctx.saved_tensors
        # Sums of many pieces: those of the sink's keys are as long as the video.
        to_key, to_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
        to_query, left = torch.empty_like(query), list(rest)
        for pieces in batches(ctx.sight):
            queries, keys = [[p.query] for p in pieces], [p.keys for p in pieces]
            own = [_side_by_side(x, queries) for x in (query, out, grad)]
            seen = _side_by_side(key, keys), _side_by_side(value, keys)
            kernel = kernel_for(own[0], *seen)
            kept = [left.pop(0) for _ in range(kernel.num_kept)]
            found = kernel.backward(own[2], own[0], *seen, own[1], kept)
            for (start, stop), part in _parts(found[0], queries, query.shape[1]):
                to_query[start:stop] = part
            for total, gradient in ((to_key, found[1]), (to_value, found[2])):
                for (start, stop), part in _parts(gradient, keys, query.shape[1]):
                    total[start:stop] += part
        return to_query, to_key.to(key.dtype), to_value.to(value.dtype), None


def _forward(query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Results:
    """The result [L, B, A, E], and what the kernels' backward wants of each batch of pieces."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    rest: list[Tensor | None] = []
    for pieces in batches(sight):
        queries, keys = [[p.query] for p in pieces], [p.keys for p in pieces]
        own = _side_by_side(query, queries)
        seen = _side_by_side(key, keys), _side_by_side(value, keys)
        result, kept = kernel_for(own, *seen).forward(own, *seen)
        rest += kept
        for (start, stop), part in _parts(result, queries, query.shape[1]):
            out[start:stop] = part
    return out, *rest


def _side_by_side(x_LBAE: Tensor, stretches: Sequence[Sequence[Stretch]]) -> Tensor:
    """The tokens of each piece's stretches: [pieces * B, A, tokens of a piece, E].

    A view where they follow each other, else one copy; a second one where a batch has many rows.
    """
    flat = list(itertools.chain.from_iterable(stretches))
    if all(a[1] == b[0] for a, b in itertools.pairwise(flat)):
        tokens = x_LBAE[flat[0][0] : flat[-1][1]]
    else:
        tokens = torch.cat([x_LBAE[start:stop] for start, stop in flat])
    cut = tokens.reshape(len(stretches), -1, *tokens.shape[1:])
    return cut.permute(0, 2, 3, 1, 4).flatten(0, 1)


def _parts(
    x_RALE: Tensor, stretches: Sequence[Sequence[Stretch]], rows: int
) -> Iterator[tuple[Stretch, Tensor]]:
    """Inverse of `_side_by_side`: each stretch and its tokens [L, B, A, E]."""
    cut = x_RALE.reshape(-1, rows, *x_RALE.shape[1:]).permute(0, 3, 1, 2, 4)
    for piece, own in zip(cut, stretches, strict=True):
        lengths = [stop - start for start, stop in own]
        yield from zip(own, piece.split(lengths), strict=True)
