"""Sums, norms and rotations of passes with a graph: one kernel forward, one backward.

Forward kernels are those of passes without a graph, in `kernels.py`. A backward kernel reads what
it needs once and writes every gradient of a token; what is summed over tokens leaves it as one part
for each tile of these, in float32, and a sum over the parts follows. Imported on a GPU only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_kvpo.model import kernels
from megatron_kvpo.model.kernels import modulation

_TOKENS = 64
"""Of one program, at most: few enough to fill a GPU. Parts are then small beside tokens."""

_STAGES = 3
"""Tokens that are computed or on their way at a time: backward moves 2.5 to 2.6 TB/s on an H100,
without stages 2.0 to 2.4."""


@triton.jit
def _norm_back(value, back, factor, live, dim, eps):
    """Normed value, and the gradient of the value for one of the normed value times a factor."""
    centred = tl.where(live, value - tl.sum(value, axis=0) / dim, 0.0)
    root = tl.rsqrt(tl.sum(centred * centred, axis=0) / dim + eps)
    normed = centred * root
    back *= factor
    along = tl.sum(back * normed, axis=0) / dim
    return normed, root * (back - tl.sum(back, axis=0) / dim - normed * along)


@triton.jit
def _norm_back_kernel(
    total, update, gate, scale, from_total, from_normed, to_x, to_update, sums, run, tiles, dim,
    gate_rows, gate_span, gate_far, mod_rows, mod_span, mod_far, part, eps,
    BEYOND: tl.constexpr, NORM: tl.constexpr, ONE: tl.constexpr, GATE: tl.constexpr,
    GATE_SUM: tl.constexpr, MOD_SUM: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    tile, rows = tl.program_id(0).to(tl.int64), tl.num_programs(1)
    begin = (tile % tiles) * TOKENS
    first = ((tile // tiles) * run + begin) * rows + tl.program_id(1)
    column = tl.arange(0, BLOCK)
    live = column < dim
    to_gate = tl.zeros((BLOCK,), tl.float32)
    to_shift, to_scale, through, factor = to_gate, to_gate, to_gate, to_gate
    if GATE:
        through = modulation(gate, first, gate_rows, gate_span, gate_far, column, live)
    if NORM:
        factor = modulation(scale, first, mod_rows, mod_span, mod_far, column, live) + ONE
    stop = tl.minimum(TOKENS, run - begin).to(tl.int32)
    for token in tl.range(0, stop, num_stages=STAGES):
        at = (first + token * rows) * dim + column
        grad = tl.zeros((BLOCK,), tl.float32)
        if BEYOND:
            grad = tl.load(from_total + at, mask=live, other=0.0).to(tl.float32)
        if NORM:
            value = tl.load(total + at, mask=live, other=0.0).to(tl.float32)
            back = tl.load(from_normed + at, mask=live, other=0.0).to(tl.float32)
            normed, own = _norm_back(value, back, factor, live, dim, eps)
            to_shift += back
            to_scale += back * normed
            grad += own
        tl.store(to_x + at, grad.to(to_x.dtype.element_ty), mask=live)
        if GATE_SUM:
            to_gate += grad * tl.load(update + at, mask=live, other=0.0).to(tl.float32)
        if GATE:
            tl.store(to_update + at, (grad * through).to(to_update.dtype.element_ty), mask=live)
    at = (tile * rows + tl.program_id(1)) * dim + column
    if MOD_SUM:
        tl.store(sums + at, to_shift, mask=live)
        tl.store(sums + part + at, to_scale, mask=live)
    if GATE_SUM:
        tl.store(sums + 2 * part + at, to_gate, mask=live)


class _ResidualNorm(torch.autograd.Function):
    """`residual_norm`, or without a scale the sum alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, update: Tensor | None, gate: Tensor | None, shift: Tensor | None,
        scale: Tensor | None, eps: float, plus_one: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        total, out, *_ = kernels.residual_norm(
            x, update, gate, shift, scale, eps, plus_one=plus_one
        )
        ctx.set_materialize_grads(False)
        seen = None if scale is None else total
        moved = update if gate is not None and ctx.needs_input_grad[2] else None
        ctx.save_for_backward(seen, moved, gate, shift, scale)
        ctx.eps, ctx.plus_one = eps, plus_one
        ctx.kinds = x.dtype, None if update is None else update.dtype
        return total if scale is None else (total, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, from_total: Tensor | None, from_normed: Tensor | None = None) -> Any:
        total, update, gate, shift, scale = ctx.saved_tensors
        if from_total is None and from_normed is None:
            return (None,) * 7
        if from_normed is None:
            shift = scale = None  # only the sum was used
        needs = ctx.needs_input_grad
        modulates = scale is not None and (needs[3] or needs[4])
        to_x, to_update, sums = _residual_back(
            total, update, gate, scale, from_total, from_normed, ctx, modulates=modulates
        )
        owners = (shift, scale) if modulates else (None, None)
        to_shift, to_scale, to_gate = (
            None if one is None else _summed(part, one)
            for part, one in zip(sums, (*owners, None if update is None else gate), strict=True)
        )
        return to_x, to_update, to_gate, to_shift, to_scale, None, None


def _residual_back(
    total: Tensor | None, update: Tensor | None, gate: Tensor | None, scale: Tensor | None,
    from_total: Tensor | None, from_normed: Tensor | None, ctx: Any, *, modulates: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of x and of the update; sums of shift, scale and gate: [3, U, tiles, B, D]."""
    from_total, from_normed = (
        None if grad is None else grad.contiguous() for grad in (from_total, from_normed)
    )
    given = from_normed if from_total is None else from_total
    assert given is not None
    to_x = torch.empty_like(given, dtype=ctx.kinds[0])
    length, rows, dim = to_x.shape
    parts = max(_parts(gate), _parts(scale))
    run = length // parts
    tiles = triton.cdiv(run, _TOKENS)
    sums = to_x.new_empty(3, parts, tiles, rows, dim, dtype=torch.float32)
    to_update = to_x if ctx.kinds[1] is not None else None
    if gate is not None:
        to_update = torch.empty_like(to_x, dtype=ctx.kinds[1])
    block = triton.next_power_of_2(dim)
    _norm_back_kernel[(parts * tiles, rows)](
        total, None if update is None else update.contiguous(), gate, scale, from_total,
        from_normed, to_x, to_update, sums, run, tiles, dim, *kernels.rows_of(gate, length, rows),
        *kernels.rows_of(scale, length, rows), sums.stride(0), ctx.eps,
        BEYOND=from_total is not None, NORM=scale is not None, ONE=float(ctx.plus_one),
        GATE=gate is not None, GATE_SUM=update is not None, MOD_SUM=modulates, TOKENS=_TOKENS,
        BLOCK=block, STAGES=_STAGES, num_warps=kernels.warps(block),
    )  # fmt: skip
    return to_x, to_update, sums


def _parts(modulation: Tensor | None) -> int:
    """Equal parts of the tokens that have values of their own."""
    return 1 if modulation is None or modulation.dim() < 3 else modulation.shape[0]


def _summed(parts_UTBD: Tensor, one: Tensor) -> Tensor:
    """The gradient of a modulation [U, B, D], [1, B, D] or [D]."""
    if one.dim() == 1:
        return parts_UTBD.sum((0, 1, 2)).to(one.dtype)
    over = (1,) if one.shape[0] == parts_UTBD.shape[0] else (0, 1)
    return parts_UTBD.sum(over).view(one.shape).to(one.dtype)


def residual_norm(
    x_LBD: Tensor, update_LBD: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor,
    eps: float, *, plus_one: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See fused.residual_norm."""
    return _ResidualNorm.apply(x_LBD, update_LBD, gate, shift, scale, eps, plus_one)  # type: ignore[no-any-return]


def gated_add(x_LBD: Tensor, update_LBD: Tensor, gate: Tensor | None) -> Tensor:
    """See fused.gated_add."""
    return _ResidualNorm.apply(x_LBD, update_LBD, gate, None, None, 0.0, False)  # type: ignore[no-any-return]


@triton.jit
def _rms_back_kernel(
    x, total, weight, cosine, sine, grad, to_x, to_total, sums, count, dim, whole, rows, half,
    head_dim, token_far, row_far, part_far, eps,
    TOTAL: tl.constexpr, TURN: tl.constexpr, WEIGHT_SUM: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * TOKENS
    column = tl.arange(0, BLOCK)
    live = column < dim
    weights = tl.load(weight + column, mask=live, other=0.0).to(tl.float32)
    to_weight = tl.zeros((BLOCK,), tl.float32)
    inside = (column // head_dim).to(tl.int64) * part_far + column % head_dim
    stop = tl.minimum(TOKENS, count - first).to(tl.int32)
    for number in tl.range(0, stop, num_stages=STAGES):
        row = first + number
        value = tl.load(x + row * dim + column, mask=live, other=0.0).to(tl.float32)
        at = (row // rows) * token_far + (row % rows) * row_far + inside
        back = tl.load(grad + at, mask=live, other=0.0).to(tl.float32)
        if TURN:  # as far back
            even, odd = tl.split(tl.reshape(back, (BLOCK // 2, 2)))
            at = (row // rows) * half + tl.arange(0, BLOCK // 2) % half
            cos, sin = tl.load(cosine + at), tl.load(sine + at)
            turned = tl.join(even * cos + odd * sin, odd * cos - even * sin)
            back = tl.reshape(turned, (BLOCK,))
        if TOTAL:  # noqa: SIM108
            square = tl.load(total + row)
        else:
            square = tl.sum(value * value, axis=0)
        root = tl.rsqrt(square / whole + eps)
        if WEIGHT_SUM:
            to_weight += back * value * root
        back *= weights
        pull = tl.sum(back * value, axis=0) * root * root * root / whole
        own = back * root
        if TOTAL:
            tl.store(to_total + row, -0.5 * pull)
        else:
            own -= value * pull
        tl.store(to_x + row * dim + column, own.to(to_x.dtype.element_ty), mask=live)
    if WEIGHT_SUM:
        tl.store(sums + tl.program_id(0).to(tl.int64) * dim + column, to_weight, mask=live)


class _Rms(torch.autograd.Function):
    """`rms`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, total: Tensor | None, weight: Tensor, dim: int, eps: float,
        table: Tensor | None, parts: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, total, weight, table)
        ctx.dim, ctx.eps, ctx.parts = dim, eps, parts
        return kernels.rms(x, total, weight, dim, eps, table, parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, total, weight, table = ctx.saved_tensors
        x = x.contiguous()
        length, rows, dim = x.shape
        own, count = dim // ctx.parts, length * rows
        grad = grad.flatten(2)  # heads of a part lie side by side, tokens and rows anywhere
        if grad.stride(2) != 1:
            grad = grad.contiguous()
        to_x = torch.empty_like(x)
        to_total = None if total is None else torch.empty_like(total)
        programs = triton.cdiv(count, _TOKENS)
        sums = x.new_empty(programs, dim, dtype=torch.float32)
        cosine, sine, half = kernels.phases(table)
        block = triton.next_power_of_2(dim)
        _rms_back_kernel[(programs,)](
            x, None if total is None else total.contiguous(), weight, cosine, sine, grad, to_x,
            to_total, sums, count, dim, ctx.dim, rows, half, own, grad.stride(0),
            grad.stride(1), length * grad.stride(0), ctx.eps, TOTAL=total is not None,
            TURN=table is not None, WEIGHT_SUM=ctx.needs_input_grad[2], TOKENS=_TOKENS,
            BLOCK=block, STAGES=_STAGES, num_warps=kernels.warps(block),
        )  # fmt: skip
        to_weight = sums.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        return to_x, to_total, to_weight, None, None, None, None


def rms(
    x_LBD: Tensor, total_LB1: Tensor | None, weight_D: Tensor, dim: int, eps: float,
    table_2LE: Tensor | None = None, parts: int = 1,
) -> Tensor:  # fmt: skip
    """See fused.rms_scaled and, with a table, fused.rms_rotated."""
    return _Rms.apply(x_LBD, total_LB1, weight_D, dim, eps, table_2LE, parts)  # type: ignore[no-any-return]
