"""Which tokens of a pass see which, and attention over exactly these: no mask, no masked-out work.

A sight cuts a pass's tokens into stretches of queries and names the stretches of keys that each of
them sees. Stretches of one shape are one call of a kernel; the keys of each are laid side by side
for it and forgotten, in backward laid side by side again. On a GPU `kernels.py` lays keys out and
sums their gradients; elsewhere plain torch does, to the same bits.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_kvpo.method_config import StreamConfig
from megatron_kvpo.model.held import ATTENTION, Results, results_of
from megatron_kvpo.model.sdpa import kernel_for
from megatron_kvpo.routing import plain_context

Stretch = tuple[int, int]
"""[start, stop) in tokens of the pass."""

_KEYS_AT_ONCE = 160_000
"""Keys that are laid side by side for one call, at most, if a single piece has no more: eight
windows of Wan's fill a GPU to 96 %."""

_TILE = 32
"""Tokens that one program of a kernel holds, at most."""

Batches = tuple[tuple["Piece", ...], ...]


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
def batches(sight: Sight) -> Batches:
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


PLACES = 5
"""Column of a table of places at which they begin."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where each batch sees which tokens."""

    tables: tuple[Tensor, ...]
    """Of each batch, int32 [N, 5 + P], a row for a tile of tokens: the first; how many; how many of
    them earlier batches see, all or none; later ones; at how many places this one does, and these,
    ascending: piece * M + offset, of M keys a piece. What no batch sees has no place in the last.
    """

    shared: int
    """Tokens up to the last one that several batches see."""


@functools.cache
def places(found: Batches, device: torch.device, tile: int) -> Places:
    """Tables on a device, in tiles of at most `tile` tokens that lie together wherever seen."""
    tokens = max(piece.query[1] for pieces in found for piece in pieces)
    seen = [piece.keys for pieces in found for piece in pieces]
    edges = {0, tokens, *itertools.chain.from_iterable(itertools.chain.from_iterable(seen))}
    rows: list[list[list[int]]] = [[] for _ in found]
    shared = 0
    for start, stop in itertools.pairwise(sorted(edges)):
        at = [_places_of(start, pieces) for pieces in found]
        who = [number for number, mine in enumerate(at) if mine] or [len(found) - 1]
        shared = stop if len(who) > 1 else shared
        for first, number in itertools.product(range(start, stop, tile), who):
            size = min(tile, stop - first)
            mine = [place + first - start for place in at[number]]
            others = [size * (number > who[0]), size * (number < who[-1])]
            rows[number].append([first, size, *others, len(mine), *mine])
    made = []
    for own in rows:
        widest = max(len(row) for row in own)
        table = [row + [0] * (widest - len(row)) for row in own]
        made.append(torch.tensor(table, dtype=torch.int32, device=device))
    return Places(tuple(made), shared)


def _places_of(token: int, pieces: Sequence[Piece]) -> list[int]:
    """Where a batch sees a token."""
    found = []
    for number, piece in enumerate(pieces):
        offset = number * piece.shape[1]
        for start, stop in piece.keys:
            if start <= token < stop:
                found.append(offset + token - start)
            offset += stop - start
    return found


@functools.cache
def _kernels(device: str) -> ModuleType | None:
    """Those of a type of device; None where plain torch is to do their work."""
    if device != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from megatron_kvpo.model import kernels

    return kernels


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


class _Seen(torch.autograd.Function):
    """`attend_seen`. Keys are saved once, not as often as they are seen."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
        make = functools.partial(_forward, query, key, value, sight)
        out, *rest = results_of(ATTENTION, make)
        ctx.save_for_backward(query, key, value, out, *rest)
        ctx.sight = sight
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, *rest = ctx.saved_tensors
        sums = Sums(key, value, batches(ctx.sight))
        to_query, left = torch.empty_like(query), list(rest)
        for number, pieces in enumerate(batches(ctx.sight)):
            queries = [[p.query] for p in pieces]
            own = [_side_by_side(x, queries) for x in (query, out, grad)]
            seen = seen_by(number, key, value, batches(ctx.sight))
            kernel = kernel_for(own[0], *seen)
            kept = [left.pop(0) for _ in range(kernel.num_kept)]
            found = kernel.backward(own[2], own[0], *seen, own[1], kept)
            for (start, stop), part in _parts(found[0], queries, query.shape[1]):
                to_query[start:stop] = part
            sums.add(number, found[1], found[2])
        return to_query, *sums.finished(), None


def _forward(query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Results:
    """The result [L, B, A, E], and what the kernels' backward wants of each batch of pieces."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    rest: list[Tensor | None] = []
    for number, pieces in enumerate(batches(sight)):
        queries = [[p.query] for p in pieces]
        own = _side_by_side(query, queries)
        seen = seen_by(number, key, value, batches(sight))
        result, kept = kernel_for(own, *seen).forward(own, *seen)
        rest += kept
        for (start, stop), part in _parts(result, queries, query.shape[1]):
            out[start:stop] = part
    return out, *rest


class Sums:
    """Gradients of keys and values [L, B, A, E], over all places where they are seen.

    In float32, piece after piece: those of the sink's keys are sums as long as the video. Kernels
    round what no later batch sees at once, and keep float32 of what several see.
    """

    def __init__(self, key: Tensor, value: Tensor, found: Batches) -> None:
        self._batches, self._dtypes = found, (key.dtype, value.dtype)
        self._kernels, both = _kernels(key.device.type), (key, value)
        if self._kernels is None:
            self._outs = self._totals = [torch.zeros_like(x, dtype=torch.float32) for x in both]
            return
        self._places = places(found, key.device, _TILE)
        shape = self._places.shared, *key.shape[1:]
        self._outs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in both]
        self._totals = [key.new_empty(shape, dtype=torch.float32) for _ in both]

    def add(self, number: int, to_key_RAME: Tensor, to_value_RAME: Tensor) -> None:
        """What a batch gave, where `seen_by` had laid the keys; batches come in order."""
        if self._kernels is not None:
            table = self._places.tables[number]
            self._kernels.sum_seen(
                to_key_RAME, to_value_RAME, self._totals, self._outs, table, PLACES, _TILE
            )
            return
        keys = [piece.keys for piece in self._batches[number]]
        for total, gradient in zip(self._totals, (to_key_RAME, to_value_RAME), strict=True):
            for (start, stop), part in _parts(gradient, keys, total.shape[1]):
                total[start:stop] += part

    def finished(self) -> tuple[Tensor, Tensor]:
        """Of keys and of values, in their types."""
        to_key, to_value = self._outs
        return to_key.to(self._dtypes[0]), to_value.to(self._dtypes[1])


def seen_by(number: int, key: Tensor, value: Tensor, found: Batches) -> tuple[Tensor, Tensor]:
    """Keys and values that one of the batches sees, side by side: two [pieces * B, A, M, E]."""
    pieces, kernels = found[number], _kernels(key.device.type)
    keys = [piece.keys for piece in pieces]
    if kernels is None or _follow(keys):
        return _side_by_side(key, keys), _side_by_side(value, keys)
    table = places(found, key.device, _TILE).tables[number]
    laid: tuple[Tensor, Tensor] = kernels.spread_seen(
        key, value, table, PLACES, _TILE, len(pieces), pieces[0].shape[1]
    )
    return laid


def _follow(stretches: Sequence[Sequence[Stretch]]) -> bool:
    flat = itertools.chain.from_iterable(stretches)
    return all(a[1] == b[0] for a, b in itertools.pairwise(flat))


def _side_by_side(x_LBAE: Tensor, stretches: Sequence[Sequence[Stretch]]) -> Tensor:
    """The tokens of each piece's stretches: [pieces * B, A, tokens of a piece, E].

    A view where they follow each other, else one copy; a second one where a batch has many rows.
    """
    flat = list(itertools.chain.from_iterable(stretches))
    if _follow(stretches):
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
