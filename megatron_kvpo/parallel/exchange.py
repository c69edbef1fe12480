"""All-to-alls that go on beside what a rank computes meanwhile, in backward too."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kvpo.parallel.groups import Axis


class Exchange:
    """Equal dim-0 parts of a tensor, on their way between the ranks of an axis.

    Ranks start theirs in one order. Of several that are all started before the first is waited for,
    so are the exchanges of the gradients. The identity over an axis of one rank.
    """

    def __init__(self, x: Tensor, axis: Axis) -> None:
        """Send x. Nobody may write to it before `wait`."""
        self._flight = None if axis.size == 1 else _Flight(axis.group)
        self._held: Tensor | None = x
        if self._flight is not None:
            self._held = _Start.apply(x, self._flight)  # type: ignore[no-untyped-call]

    def wait(self) -> Tensor:
        """What has come, once."""
        held, self._held = self._held, None  # what has travelled goes
        assert held is not None, "an exchange is waited for once"
        if self._flight is None:
            return held
        return _Wait.apply(held, self._flight)  # type: ignore[no-untyped-call, no-any-return]


class _Flight:
    """What is under way: first the values, in backward the gradient."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._under_way: tuple[Any, Tensor, Tensor] | None = None

    def start(self, x: Tensor) -> None:
        sent = x.contiguous()
        came = torch.empty_like(sent)
        beside = not _captures(x)
        work = dist.all_to_all_single(came, sent, group=self._group, async_op=beside)
        self._under_way = work, sent, came

    def wait(self) -> Tensor:
        assert self._under_way is not None, "nothing is under way"
        work, _, came = self._under_way
        if work is not None:
            work.wait()  # on a GPU: the stream waits, not the host
        self._under_way = None
        return came


def _captures(x: Tensor) -> bool:
    """Whether a CUDA graph is made, which then has all work in one line."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class _Start(torch.autograd.Function):
    """Hands on what is sent, so that the graph never holds what is still under way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.start(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.wait(), None


class _Wait(torch.autograd.Function):
    """Takes what was sent, gives what has come. Autograd runs later nodes first: all starts."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.flight.start(grad)
        return grad, None
