"""The kernels behind scaled_dot_product_attention, forward and backward by themselves.

Whoever wants to keep less for backward than autograd would calls them here. Which one runs is
torch's choice, among `KERNELS` in this order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]  # fmt: skip
"""The fastest first; each serves what those before it cannot."""

Kept = Sequence[Tensor | None]
Three = tuple[Tensor, Tensor, Tensor]
_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Kernel:
    """softmax(Q K^T / sqrt(E)) V of [R, A, L, E], and its gradients."""

    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, list[Tensor | None]]]
    """(query, key, value) -> the result, and what backward wants besides: `num_kept` tensors."""

    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Kept], Three]
    """(gradient, query, key, value, result, kept) -> gradients of query, key and value."""

    num_kept: int


def chosen_kernels(x: Tensor) -> AbstractContextManager[None]:
    """Inside, attention on this tensor's device takes the first of KERNELS that can."""
    return sdpa_kernel(KERNELS, set_priority=True) if x.is_cuda else nullcontext()


def kernel_for(query_RALE: Tensor, key_RAME: Tensor, value_RAME: Tensor) -> Kernel:
    """What computes this attention here."""
    with chosen_kernels(query_RALE):
        choice = torch._fused_sdp_choice(query_RALE, key_RAME, value_RAME)
    return _TABLE.get((query_RALE.device.type, choice), _AGAIN)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    out, scores = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, [scores]


def _cpu_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept) -> Three:
    found: Three = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, kept[0], 0.0, False
    )
    return found


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    found = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return found[0], [found[1], found[6], found[7]]


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept
) -> Three:
    scores, seed, offset = kept
    found: Three = _aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, scores, seed, offset, None, None, None, q.shape[2], k.shape[2], 0.0,
        False,
    )  # fmt: skip
    return found


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    found = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return found[0], list(found[1:])


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept
) -> Three:
    to_q, to_k, to_v, _ = _aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, out, *kept, 0.0, [True, True, True, False]
    )
    return to_q, to_k, to_v


def _again_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    with chosen_kernels(q):
        return nn.functional.scaled_dot_product_attention(q, k, v), []


def _again_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept
) -> Three:
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        result = _again_forward(*inputs)[0]
    found: Three = torch.autograd.grad(result, inputs, grad)  # type: ignore[assignment]
    return found


_AGAIN = Kernel(_again_forward, _again_backward, 0)
"""Whatever torch chooses, through autograd: computes attention again in backward."""

_TABLE = {
    ("cpu", SDPBackend.FLASH_ATTENTION.value): Kernel(_cpu_forward, _cpu_backward, 1),
    ("cuda", SDPBackend.CUDNN_ATTENTION.value): Kernel(_cudnn_forward, _cudnn_backward, 3),
    ("cuda", SDPBackend.EFFICIENT_ATTENTION.value): Kernel(
        _efficient_forward, _efficient_backward, 3
    ),
}
