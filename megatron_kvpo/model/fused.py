"""What lies between matrix products and attention: one pass over the tokens each on a GPU.

Moving memory, not arithmetic, is their cost. On a GPU a pass without a graph runs `kernels.py`, one
with a graph `norm_kernels.py`; elsewhere all run as they are written here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from megatron_kvpo.model.pages import gather_pages
from megatron_kvpo.model.rope import rotate

FP8 = torch.float8_e4m3fn

_SHAPES = 64
"""Shapes and gradient states that a function is compiled for before it runs uncompiled."""


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SHAPES)
    return torch.compile(function, dynamic=False)  # a kernel for any shape is several times slower


def _fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a function at its first CUDA tensor; its first argument decides."""

    @functools.wraps(function)
    def choose(first: Tensor, *others: Any) -> Tensor:
        return (_compiled(function) if first.is_cuda else function)(first, *others)

    return choose


@functools.cache
def _kernels() -> ModuleType:
    from megatron_kvpo.model import kernels  # needs Triton, which CPU builds of torch lack

    return kernels


@functools.cache
def _norms() -> ModuleType:
    from megatron_kvpo.model import norm_kernels

    return norm_kernels


def without_graph(x: Tensor) -> bool:
    """Whether what follows is neither on a CPU nor differentiated."""
    return x.is_cuda and not torch.is_grad_enabled()


@dataclass(frozen=True, slots=True)
class Form:
    """How a linear layer wants its input where `without_graph` holds; elsewhere it is plain."""

    margin: int = 0
    """Features to leave room for behind the tokens' own. Their values are not set."""

    eight_bits: bool = False
    """As EightBits."""

    whole: bool = True
    """Under eight_bits: as they are, too."""


@dataclass(frozen=True, slots=True)
class EightBits:
    """Tokens in 8 bits, each with a unit of its own; and as they were, if that is wanted too."""

    tokens_RD: Tensor
    unit_R1: Tensor
    whole_RD: Tensor | None
    shape: tuple[int, ...]
    """Of the tokens: [L, B, D]."""

    dtype: torch.dtype


Tokens = Tensor | EightBits


def residual_norm(
    x_LBD: Tensor, update_LBD: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor,
    eps: float, *, plus_one: bool = True, form: Form | None = None,
) -> tuple[Tensor, Tokens]:  # fmt: skip
    """The sum x + update * gate, and its LayerNorm times (1 +) scale plus shift: two [L, B, D].

    `shift` and `scale` broadcast over what they lack; under a graph they, and `gate`, may have a
    token for each of several equal parts of x. `form`: of the normed tokens.
    """
    form = form or Form()
    if without_graph(x_LBD):
        return _normed_in(x_LBD, update_LBD, gate, shift, scale, eps, plus_one, form)
    if x_LBD.is_cuda:
        return _norms().residual_norm(  # type: ignore[no-any-return]
            x_LBD, update_LBD, gate, shift, scale, eps, plus_one=plus_one
        )
    if update_LBD is not None:
        x_LBD = gated_add(x_LBD, update_LBD, gate)
    if plus_one:
        normed = nn.functional.layer_norm(x_LBD, x_LBD.shape[-1:], None, None, eps)
        normed = modulated(normed, shift, scale)
    else:
        normed = nn.functional.layer_norm(x_LBD, x_LBD.shape[-1:], scale, shift, eps)
    return x_LBD, in_form(normed, form)


def _normed_in(
    x_LBD: Tensor, update_LBD: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor,
    eps: float, plus_one: bool, form: Form,
) -> tuple[Tensor, Tokens]:  # fmt: skip
    total, out, tokens, unit = _kernels().residual_norm(
        x_LBD, update_LBD, gate, shift, scale, eps, plus_one=plus_one, margin=form.margin,
        whole=form.whole, eight=FP8 if form.eight_bits else None,
    )  # fmt: skip
    if not form.eight_bits:
        return total, out
    whole = out.view(-1, x_LBD.shape[-1]) if form.whole else None
    return total, EightBits(tokens, unit, whole, tuple(x_LBD.shape), x_LBD.dtype)


def in_form(x_LBD: Tensor, form: Form) -> Tokens:
    """Plain tokens, in 8 bits if the form says so. A margin is left out."""
    if not form.eight_bits or torch.is_grad_enabled():
        return x_LBD
    flat = x_LBD.reshape(-1, x_LBD.shape[-1])
    tokens, unit = quantise_rows(flat, FP8)
    whole = flat if form.whole else None
    return EightBits(tokens, unit, whole, tuple(x_LBD.shape), x_LBD.dtype)


def gelu_in(x_LBD: Tensor, form: Form) -> Tokens:
    """GELU(tanh), in a form. No graph; x may be written over."""
    if not (form.eight_bits and x_LBD.is_cuda):
        return in_form(nn.functional.gelu(x_LBD, approximate="tanh"), form)
    flat = x_LBD.view(-1, x_LBD.shape[-1])
    tokens, unit = _kernels().gelu_rows(flat, torch.finfo(FP8).max, FP8, whole=form.whole)
    whole = flat if form.whole else None
    return EightBits(tokens, unit, whole, tuple(x_LBD.shape), x_LBD.dtype)


def modulated(x_LBD: Tensor, shift_UBD: Tensor, scale_UBD: Tensor) -> Tensor:
    """X (1 + scale) + shift; U is 1, L, or a number of parts of L that share one each."""
    if shift_UBD.dim() < 3 or shift_UBD.shape[0] in (1, x_LBD.shape[0]):
        return torch.addcmul(shift_UBD, x_LBD, 1 + scale_UBD)
    parts = _in_parts(x_LBD, shift_UBD)
    return torch.addcmul(shift_UBD[:, None], parts, 1 + scale_UBD[:, None]).flatten(0, 1)


def _in_parts(x_LBD: Tensor, one_UBD: Tensor) -> Tensor:
    """[U, L / U, B, D]."""
    return x_LBD.reshape(one_UBD.shape[0], -1, *x_LBD.shape[1:])


def gated_add(x_LBD: Tensor, update_LBD: Tensor, gate: Tensor | None) -> Tensor:
    """The residual: x + update * gate; without a gate x + update."""
    if without_graph(x_LBD):
        return _kernels().residual_norm(  # type: ignore[no-any-return]
            x_LBD, update_LBD, gate, None, None, 0.0
        )[0]
    if x_LBD.is_cuda:
        return _norms().gated_add(x_LBD, update_LBD, gate)  # type: ignore[no-any-return]
    if gate is None:
        return x_LBD + update_LBD
    if gate.shape[0] in (1, x_LBD.shape[0]):
        return torch.addcmul(x_LBD, update_LBD, gate)
    parts, updates = _in_parts(x_LBD, gate), _in_parts(update_LBD, gate)
    return torch.addcmul(parts, updates, gate[:, None]).flatten(0, 1)


@_fused
def sum_of_squares(x_LBD: Tensor) -> Tensor:
    """Over the features, in float32. [L, B, D] -> [L, B, 1]."""
    return x_LBD.float().square().sum(dim=-1, keepdim=True)


def rms_scaled(
    x_LBD: Tensor, total_LB1: Tensor | None, weight_D: Tensor, dim: int, eps: float
) -> Tensor:
    """RMSNorm: x / sqrt(total / dim + eps) * weight, in float32 up to the weight.

    `total` is the sum of squares over all `dim` features of which x holds a share; None: x has all.
    """
    if x_LBD.is_cuda:
        return _rms_on_gpu(x_LBD, total_LB1, weight_D, dim, eps)
    return _rms(x_LBD, total_LB1, weight_D, dim, eps)


def rms_rotated(
    x_LBD: Tensor, total_LB1: Tensor | None, weight_D: Tensor, table_2LE: Tensor, dim: int,
    eps: float, parts: int = 1,
) -> Tensor:  # fmt: skip
    """`rms_scaled`, cut into heads of twice the table's width, each turned; then `heads_apart`."""
    if x_LBD.is_cuda:
        return _rms_on_gpu(x_LBD, total_LB1, weight_D, dim, eps, table_2LE, parts)
    normed = _rms(x_LBD, total_LB1, weight_D, dim, eps)
    heads = normed.view(*normed.shape[:-1], -1, 2 * table_2LE.shape[-1])
    return rotate(_parts_first(heads, parts), table_2LE).flatten(0, 1)


def heads_apart(x_LBAE: Tensor, parts: int) -> Tensor:
    """One part of the heads of all tokens after the other: [parts * L, B, A / parts, E]."""
    return x_LBAE if parts == 1 else _parts_first(x_LBAE, parts).flatten(0, 1)


def _parts_first(x_LBAE: Tensor, parts: int) -> Tensor:
    """A view: [parts, L, B, A / parts, E]."""
    tokens, rows, heads, dim = x_LBAE.shape
    return x_LBAE.reshape(tokens, rows, parts, heads // parts, dim).permute(2, 0, 1, 3, 4)


def _rms_on_gpu(x_LBD: Tensor, *others: Any) -> Tensor:
    module = _kernels() if without_graph(x_LBD) else _norms()
    return module.rms(x_LBD, *others)  # type: ignore[no-any-return]


def _rms(x_LBD: Tensor, total_LB1: Tensor | None, weight_D: Tensor, dim: int, eps: float) -> Tensor:
    wide = x_LBD.float()
    if total_LB1 is None:
        total_LB1 = wide.square().sum(dim=-1, keepdim=True)
    return (wide * torch.rsqrt(total_LB1 / dim + eps)).to(x_LBD.dtype) * weight_D


def joined(page_NTAE: Tensor, pages_BM: Tensor, own_BLAE: Tensor) -> Tensor:
    """Each row's pages, in order, then the pass's own tokens: [B, M * T + L, A, E]."""
    if own_BLAE.is_cuda:
        return _Joined.apply(page_NTAE, pages_BM, own_BLAE)  # type: ignore[no-untyped-call, no-any-return]
    return torch.cat([gather_pages(page_NTAE, pages_BM), own_BLAE], dim=1)


class _Joined(torch.autograd.Function):
    """`joined` on a GPU. Only the pass's own tokens have a gradient."""

    @staticmethod
    def forward(ctx: Any, page_NTAE: Tensor, pages_BM: Tensor, own_BLAE: Tensor) -> Tensor:
        ctx.length = own_BLAE.shape[1]
        return _kernels().joined(page_NTAE, pages_BM, own_BLAE)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        return None, None, grad[:, -ctx.length :]


def quantise_rows(x_RD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each row in 8 bits and its unit: x is about q * unit, q of `dtype`, unit_R1 in float32.

    A row's unit is its largest magnitude over the type's, so no row depends on another.
    """
    limit = torch.finfo(dtype).max
    if x_RD.is_cuda:
        return _kernels().quantise_rows(x_RD, limit, dtype)  # type: ignore[no-any-return]
    wide = x_RD.float()
    unit_R1 = (wide.abs().amax(dim=1, keepdim=True) / limit).clamp(min=1e-12)
    return (wide / unit_R1).clamp(-limit, limit).to(dtype), unit_R1
