"""What lies between matrix products and attention: one kernel each on a GPU.

Moving memory, not arithmetic, is their cost. On a GPU torch.compile makes one pass over the tokens
of each function here, forward and backward; elsewhere they run as they are written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_kvpo.model.pages import gather_pages
from megatron_kvpo.model.rope import rotate


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function)


def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a function at its first CUDA tensor; its first argument decides."""

    @functools.wraps(function)
    def choose(first: Tensor, *others: Any) -> Tensor:
        return (_compiled(function) if first.is_cuda else function)(first, *others)

    return choose


@fused
def modulated_norm(x_LBD: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift. [L, B, D] -> [L, B, D]."""
    normed = nn.functional.layer_norm(x_LBD, x_LBD.shape[-1:], None, None, eps)
    return torch.addcmul(shift, normed, 1 + scale)


@fused
def gated_add(x_LBD: Tensor, update_LBD: Tensor, gate: Tensor) -> Tensor:
    """The residual: x + update * gate."""
    return torch.addcmul(x_LBD, update_LBD, gate)


@fused
def sum_of_squares(x_LBD: Tensor) -> Tensor:
    """Over the features, in float32. [L, B, D] -> [L, B, 1]."""
    return x_LBD.float().square().sum(dim=-1, keepdim=True)


def _rms(x_LBD: Tensor, total_LB1: Tensor | None, weight_D: Tensor, dim: int, eps: float) -> Tensor:
    wide = x_LBD.float()
    if total_LB1 is None:
        total_LB1 = wide.square().sum(dim=-1, keepdim=True)
    return (wide * torch.rsqrt(total_LB1 / dim + eps)).to(x_LBD.dtype) * weight_D


@fused
def rms_scaled(
    x_LBD: Tensor, total_LB1: Tensor | None, weight_D: Tensor, dim: int, eps: float
) -> Tensor:
    """RMSNorm: x / sqrt(total / dim + eps) * weight, in float32 up to the weight.

    `total` is the sum of squares over all `dim` features of which x holds a share; None: x has all.
    """
    return _rms(x_LBD, total_LB1, weight_D, dim, eps)


@fused
def rms_rotated(
    x_LBD: Tensor, total_LB1: Tensor | None, weight_D: Tensor, table_2LE: Tensor, dim: int,
    eps: float,
) -> Tensor:  # fmt: skip
    """`rms_scaled`, cut into heads of twice the table's width, each turned: [L, B, A, E]."""
    normed = _rms(x_LBD, total_LB1, weight_D, dim, eps)
    return rotate(normed.view(*normed.shape[:-1], -1, 2 * table_2LE.shape[-1]), table_2LE)


@fused
def joined(page_NTAE: Tensor, pages_BM: Tensor, own_BLAE: Tensor) -> Tensor:
    """Each row's pages, in order, then the pass's own tokens: [B, M * T + L, A, E]."""
    return torch.cat([gather_pages(page_NTAE, pages_BM), own_BLAE], dim=1)
