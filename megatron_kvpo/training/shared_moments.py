"""AdamW's moments in shares: whole tensors from them and back, so that a checkpoint knows no ranks.

Megatron lays all trained parameters out in one buffer, cuts it into buckets and each bucket into
equal shares, one a rank, whatever parameter a cut goes through. A share of a parameter is a view of
that buffer, so its storage offset is its place there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of the moments in the state of torch's, Apex's and Transformer Engine's AdamW."""


class SharedMoments:
    """The moments of the parameters in one of Megatron's buffers, a share of them on each rank."""

    def __init__(self, buffer: Any, adam: torch.optim.Optimizer) -> None:
        """`adam` steps views of `buffer.param_data`; its moments exist already."""
        self._buffer, self._adam = buffer, adam

    def _held(self) -> Iterator[tuple[slice, dict[str, Any]]]:
        """Where in the buffer this rank's shares lie, and their states."""
        first = self._buffer.param_data.storage_offset()
        for group in self._adam.param_groups:
            for share in group["params"]:
                start = share.storage_offset() - first
                yield slice(start, start + share.numel()), self._adam.state[share]

    def _place(self, parameter: nn.Parameter) -> slice:
        """Where in the buffer a parameter lies."""
        start, stop = self._buffer.param_index_map[parameter][:2]
        return slice(start, stop)

    @torch.no_grad()
    def whole(self, parameters: Sequence[nn.Parameter]) -> list[dict[str, Tensor]]:
        """Each parameter's whole moments, in host memory, on every rank. Collective."""
        found: list[dict[str, Tensor]] = [{} for _ in parameters]
        for name in MOMENTS:
            values = torch.zeros_like(self._buffer.param_data)
            for place, state in self._held():
                values[place] = state[name]
            self._gather(values)
            values = values.cpu()
            for parameter, moments in zip(parameters, found, strict=True):
                moments[name] = values[self._place(parameter)].view(parameter.shape)
        return found

    def _gather(self, values: Tensor) -> None:
        """Fill the other ranks' shares of every bucket."""
        group = self._buffer.data_parallel_group
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        for bucket in self._buffer.buckets:
            whole = values[bucket.offset : bucket.offset + bucket.grad_data.numel()]
            dist.all_gather_into_tensor(whole, whole.chunk(size)[rank], group=group)

    @torch.no_grad()
    def take(
        self, parameters: Sequence[nn.Parameter], moments: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Keep this rank's shares of each parameter's whole moments."""
        for name in MOMENTS:
            values = torch.zeros_like(self._buffer.param_data)
            for parameter, whole in zip(parameters, moments, strict=True):
                values[self._place(parameter)] = whole[name].flatten().to(values.device)
            for place, state in self._held():
                state[name].copy_(values[place])
