"""From the host to where a rank computes, without waiting for what runs there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The same values on `device`. A copy to a GPU goes through pinned memory, not awaited."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Inside, a GPU is the current one: Triton's kernels run there. Nothing on the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def indices(values: Any, device: torch.device | str) -> Tensor:
    """Whole numbers, nested as a tensor is, as int64 on `device`."""
    return to_device(torch.tensor(values, dtype=torch.long), device)
