"""What ranks tell each other outside the model: shares of rows, means, small objects.

Everything here is the identity over an axis of one rank. No function carries gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kvpo.parallel.groups import Axis, Ranks

T = TypeVar("T")


def share_of(n: int, axis: Axis) -> range:
    """Which of `n` items are this rank's: contiguous, sizes differ by at most 1, larger first."""
    return shares(n, axis.size)[axis.rank]


def from_first(x: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Fill x with what the rank that is first on all these axes has. Collective over them."""
    for axis in axes:
        if axis.size > 1:
            dist.broadcast(x, src=dist.get_global_rank(axis.group, 0), group=axis.group)
    return x


def shares(n: int, size: int) -> list[range]:
    """The share of every rank of an axis of `size`, in rank order."""
    if n < 0:
        raise ValueError(f"{n} items cannot be shared over {size} ranks: give 0 or more")
    small, larger = divmod(n, size)
    starts = [r * small + min(r, larger) for r in range(size + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


def leveled_shares(
    n: int, cost: Callable[[int], float], loads: Sequence[float]
) -> list[range]:  # fmt: skip
    """The share of every rank, contiguous, when they carry `loads` already.

    `cost` of so many items on one rank. Each item goes to who would then be done first.
    """
    counts = [0] * len(loads)
    for _ in range(n):
        done = [(load + cost(k + 1), k) for load, k in zip(loads, counts, strict=True)]
        counts[done.index(min(done))] += 1
    starts = [sum(counts[:r]) for r in range(len(counts) + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


class Gathering:
    """All ranks' rows of some tensors, on their way while this rank does something else."""

    @torch.no_grad()
    def __init__(self, tensors: Sequence[Tensor], axis: Axis, sizes: Sequence[int]) -> None:
        """Send this rank's rows; see `gather_rows` for the arguments. Collective."""
        for x in tensors:
            if len(sizes) != axis.size or x.shape[0] != sizes[axis.rank]:
                raise ValueError(
                    f"rank {axis.rank} of {axis.size} holds {x.shape[0]} rows, sizes are "
                    f"{list(sizes)}: give one size per rank, this rank's own among them"
                )
        self._sizes, self._found = sizes, [x.detach() for x in tensors]
        self._waiting: list[tuple[Any, list[Tensor], Tensor]] = []
        for x in self._found if axis.size > 1 else []:
            padded = x.new_zeros((max(sizes), *x.shape[1:]))
            padded[: x.shape[0]] = x
            parts = [torch.empty_like(padded) for _ in sizes]
            work = dist.all_gather(parts, padded, group=axis.group, async_op=True)
            self._waiting.append((work, parts, padded))

    @torch.no_grad()
    def wait(self) -> list[Tensor]:
        """[sum(sizes), ...] of each, in rank order, on every rank, detached."""
        for number, (work, parts, _) in enumerate(self._waiting):
            work.wait()
            rows = [part[:size] for part, size in zip(parts, self._sizes, strict=True)]
            self._found[number] = torch.cat(rows)
        self._waiting = []  # what has travelled goes
        return self._found


def gather_rows(x: Tensor, axis: Axis, sizes: Sequence[int]) -> Tensor:
    """All ranks' rows of `x`, concatenated in rank order along dim 0.

    Args:
        x: float [sizes[axis.rank], ...]; the other dims are the same on all ranks.
        axis: who shares the rows.
        sizes: rows of each rank; 0 is allowed.

    Returns:
        [sum(sizes), ...], on every rank, detached.

    Raises:
        ValueError: `sizes` does not fit the axis or this rank's `x`.
    """
    return Gathering([x], axis, sizes).wait()[0]


@torch.no_grad()
def all_equal(x: Tensor, axis: Axis) -> tuple[bool, float]:
    """Whether all ranks of the axis hold the same bits of `x`, and the largest |difference|.

    The difference is to the axis's first rank; NaN against a number counts as infinite. The same
    answer on every rank. `x` has one shape and dtype on all of them.
    """
    if axis.size == 1 or not x.numel():
        return True, 0.0
    first = x.detach().contiguous().clone()
    dist.broadcast(first, src=dist.get_global_rank(axis.group, 0), group=axis.group)
    bits, first_bits = (t.contiguous().reshape(-1).view(torch.uint8) for t in (x.detach(), first))
    unequal = not torch.equal(bits, first_bits)
    difference = (x.double() - first.double()).abs().nan_to_num(torch.inf).max().item()
    worst = torch.tensor(
        [float(unequal), difference if unequal else 0.0], dtype=torch.float64, device=x.device
    )
    dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=axis.group)
    return worst[0].item() == 0.0, worst[1].item()


@torch.no_grad()
def mean_over(x: Tensor, axis: Axis) -> Tensor:
    """Mean of `x` over the ranks of the axis, in x's dtype. A new tensor, the same on all ranks."""
    total = x.detach().clone()
    if axis.size > 1:
        dist.all_reduce(total, group=axis.group)
        total /= axis.size
    return total


def largest(values: Sequence[float], ranks: Ranks) -> list[float]:
    """The largest of each number that any rank has, on every rank. Collective over all."""
    told = torch.tensor(values, dtype=torch.float64, device=ranks.device)
    if ranks.world > 1:
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
    found: list[float] = told.tolist()
    return found


def smallest(values: Sequence[int], axes: Sequence[Axis], device: torch.device) -> list[int]:
    """The smallest of each number that any rank of these axes has. Collective over them."""
    if all(axis.size == 1 for axis in axes):
        return [*values]
    told = torch.tensor(values, dtype=torch.int64, device=device)
    for axis in axes:
        if axis.size > 1:
            dist.all_reduce(told, op=dist.ReduceOp.MIN, group=axis.group)
    found: list[int] = told.tolist()
    return found


def broadcast_object(value: T, axis: Axis) -> T:
    """The first rank's `value`, on every rank of the axis. It must pickle."""
    if axis.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=dist.get_global_rank(axis.group, 0), group=axis.group)
    return box[0]


def barrier(axis: Axis) -> None:
    """Wait until every rank of the axis has come here."""
    if axis.size > 1:
        dist.barrier(group=axis.group)
