"""Averaging of gradients over replicas, bucket by bucket, while the last backward pass goes on.

Megatron lays gradients out in buckets in the order in which backward makes them, and can send a
bucket off in the background. When, it decides by counting a first update's gradients. Here passes
differ from update to update and ranks have different numbers of them, even none. So the caller says
which pass is the last, and every rank sends its buckets off in one order, whatever comes when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn


class LateFirst(nn.Module):
    """A model whose parameters are listed so that those that get gradients late are in front.

    Megatron fills its buckets from the back.
    """

    def __init__(self, model: nn.Module, late: Callable[[str], bool]) -> None:
        super().__init__()
        self.model, self._late = model, late

    def named_parameters(self, *given: Any, **named: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As the model lists them, the late ones first."""
        listed = self.model.named_parameters(*given, **named)
        yield from sorted(listed, key=lambda pair: not self._late(pair[0]))


class OverlappedReduction:
    """Sends off the buckets of a Megatron DistributedDataParallel with overlap_grad_reduce."""

    def __init__(self, wrapped: Any) -> None:
        self._groups: list[Any] = wrapped.bucket_groups
        self._index = {p: i for i, group in enumerate(self._groups) for p in group.params}
        buffers = enumerate(wrapped.buffers)
        self._buffer = {id(bucket): i for i, buffer in buffers for bucket in buffer.buckets}
        self._missing: list[set[nn.Parameter]] = []
        self._held: Sequence[Tensor] = ()
        self._next = 0
        self.armed = False
        """Buckets go as they fill."""

        for group in self._groups:
            group.register_grad_ready = self._come

    def reset(self) -> None:
        """Start an update."""
        self._missing = [set(group.params) for group in self._groups]
        self._held, self._next, self.armed = (), 0, False

    def arm(self, held: Sequence[Tensor]) -> None:
        """From here on each parameter gets one more gradient at most.

        `held`: for each of Megatron's buffers what is added to its sum before that goes, or none.
        """
        self._held, self.armed = held, True

    def start(self) -> None:
        """Send off whatever has not gone."""
        self.armed = True
        while self._next < len(self._groups):
            self._send()
        self._held = ()

    def _come(self, parameter: nn.Parameter, *_: Any) -> None:
        """Megatron has added a gradient to its buffer."""
        if not self.armed:
            return
        index = self._index[parameter]
        if index < self._next:
            raise RuntimeError(
                f"a gradient of shape {tuple(parameter.shape)} came after its bucket, number "
                f"{index}, had been sent off: a parameter is reached twice from the last pass, or "
                "there was another pass. Call last_pass later"
            )
        self._missing[index].discard(parameter)
        while self._next < len(self._groups) and not self._missing[self._next]:
            self._send()

    def _send(self) -> None:
        group = self._groups[self._next]
        for bucket in group.buckets if self._held else ():
            held, size = self._held[self._buffer[id(bucket)]], bucket.grad_data.numel()
            bucket.grad_data.add_(held[bucket.offset : bucket.offset + size])
        group.start_grad_sync()
        self._next += 1
