"""Kernels for what moves memory between matrix products and attention.

Each reads what it needs once and writes once; a pass's speed limit for them is the memory's. They
are Triton's, so this module is imported on a GPU only. `fused.py` says what each computes for a
pass without a graph, `sight.py` for the keys of a sight, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 8192
"""Elements that one program copies."""


@triton.jit
def modulation(values, row, rows, span, far, column, live):
    """What a row of tokens is modulated by: see `rows_of`."""
    at = ((row // span) * rows + row % rows) * far + column
    return tl.load(values + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _norm_kernel(
    x, update, gate, shift, scale, total, out, tokens, unit, dim, gate_rows, gate_span, gate_far,
    mod_rows, mod_span, mod_far, out_row, eps,
    ADD: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, ONE: tl.constexpr,
    WHOLE: tl.constexpr, EIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    live = column < dim
    value = tl.load(x + row * dim + column, mask=live, other=0.0).to(tl.float32)
    if ADD:
        change = tl.load(update + row * dim + column, mask=live, other=0.0).to(tl.float32)
        if GATE:
            change *= modulation(gate, row, gate_rows, gate_span, gate_far, column, live)
        rounded = (value + change).to(total.dtype.element_ty)
        tl.store(total + row * dim + column, rounded, mask=live)
        value = rounded.to(tl.float32)
    if NORM:
        mean = tl.sum(value, axis=0) / dim
        centred = tl.where(live, value - mean, 0.0)
        deviation = tl.sum(centred * centred, axis=0) / dim
        normed = centred * tl.rsqrt(deviation + eps)
        factor = modulation(scale, row, mod_rows, mod_span, mod_far, column, live) + ONE
        normed = normed * factor
        normed += modulation(shift, row, mod_rows, mod_span, mod_far, column, live)
        if WHOLE:
            tl.store(out + row * out_row + column, normed.to(out.dtype.element_ty), mask=live)
        if EIGHT > 0:
            normed = tl.where(live, normed.to(x.dtype.element_ty).to(tl.float32), 0.0)
            _store_eight(normed, tokens, unit, row, column, live, dim, EIGHT)


@triton.jit
def _store_eight(value, tokens, unit, row, column, live, dim, LIMIT: tl.constexpr):
    one = tl.maximum(tl.max(tl.abs(value), axis=0) / LIMIT, 1e-12)
    tl.store(unit + row, one)
    value = tl.minimum(tl.maximum(value / one, -LIMIT), LIMIT)
    tl.store(tokens + row * dim + column, value.to(tokens.dtype.element_ty), mask=live)


def residual_norm(
    x_LBD: Tensor, update_LBD: Tensor | None, gate: Tensor | None, shift: Tensor | None,
    scale: Tensor | None, eps: float, *, plus_one: bool = True, margin: int = 0,
    whole: bool = True, eight: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See fused.residual_norm: the sum, the normed tokens, and these in 8 bits with their units.

    The normed tokens have `margin` features more, not filled in; without `whole` they are not set.
    """
    length, rows, dim = x_LBD.shape
    x_LBD = x_LBD.contiguous()
    total = x_LBD
    if update_LBD is not None:
        update_LBD = update_LBD.contiguous()
        kind = torch.promote_types(x_LBD.dtype, update_LBD.dtype)
        total = torch.empty_like(x_LBD, dtype=kind)
    out, tokens, unit = x_LBD, None, None
    if scale is not None and whole:
        out = total.new_empty(length, rows, dim + margin)
    if eight is not None:
        tokens, unit = _places(length * rows, dim, eight, x_LBD.device)
    block = triton.next_power_of_2(dim)
    _norm_kernel[(length * rows,)](
        x_LBD, update_LBD, gate, shift, scale, total, out, tokens, unit, dim,
        *rows_of(gate, length, rows), *rows_of(scale, length, rows), dim + margin, eps,
        ADD=update_LBD is not None, GATE=gate is not None, NORM=scale is not None,
        ONE=float(plus_one), WHOLE=whole, EIGHT=0.0 if eight is None else torch.finfo(eight).max,
        BLOCK=block, num_warps=warps(block),
    )  # fmt: skip
    return total, out, tokens, unit


def _places(rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    tokens = torch.empty(rows, dim, dtype=dtype, device=device)
    return tokens, torch.empty(rows, 1, dtype=torch.float32, device=device)


def rows_of(modulation: Tensor | None, length: int, rows: int) -> tuple[int, int, int]:
    """Of a modulation [U, B, D] or [D]: rows side by side, tokens' rows that share these, stride.

    U is 1 or the number of equal parts of the tokens that have one each.
    """
    if modulation is None or modulation.dim() == 1:
        return 1, length * rows, 0
    parts, count, _ = modulation.shape
    far = modulation.stride(1) if count > 1 else modulation.stride(0)
    if modulation.stride(2) != 1 or (parts > 1 and modulation.stride(0) != count * far):
        raise ValueError(f"a modulation {tuple(modulation.shape)} has strides "
                         f"{modulation.stride()}: its rows must lie equally far apart")  # fmt: skip
    return rows, length // parts * rows, far


def warps(block: int) -> int:
    """Of a program that holds so many elements."""
    return min(16, max(1, block // 512))


@triton.jit
def _rms_kernel(
    x, total, weight, cosine, sine, out, dim, whole, rows, half, part_dim, part_far, eps,
    TOTAL: tl.constexpr, TURN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    live = column < dim
    kind = x.dtype.element_ty
    value = tl.load(x + row * dim + column, mask=live, other=0.0).to(tl.float32)
    if TOTAL:  # noqa: SIM108
        square = tl.load(total + row)
    else:
        square = tl.sum(value * value, axis=0)
    normed = (value * tl.rsqrt(square / whole + eps)).to(kind).to(tl.float32)
    weights = tl.load(weight + column, mask=live, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    normed = (normed * weights).to(kind)
    if TURN:
        even, odd = tl.split(tl.reshape(normed.to(tl.float32), (BLOCK // 2, 2)))
        at = (row // rows) * half + tl.arange(0, BLOCK // 2) % half
        cos, sin = tl.load(cosine + at), tl.load(sine + at)
        turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
        normed = tl.reshape(turned, (BLOCK,)).to(kind)
    at = (column // part_dim).to(tl.int64) * part_far + row * part_dim + column % part_dim
    tl.store(out + at, normed, mask=live)


def phases(table_2LE: Tensor | None) -> tuple[Tensor | None, Tensor | None, int]:
    """Cosines, sines and how many a token has; where nothing turns, 1."""
    if table_2LE is None:
        return None, None, 1
    cosine, sine = table_2LE.contiguous()
    return cosine, sine, table_2LE.shape[-1]


def rms(
    x_LBD: Tensor, total_LB1: Tensor | None, weight_D: Tensor, dim: int, eps: float,
    table_2LE: Tensor | None = None, parts: int = 1,
) -> Tensor:  # fmt: skip
    """See fused.rms_scaled and, with a table, fused.rms_rotated.

    [L, B, D]; with a table [parts * L, B, A / parts, E], as fused.heads_apart lays heads out.
    """
    length, rows, own = x_LBD.shape
    x_LBD = x_LBD.contiguous()
    out = torch.empty_like(x_LBD, dtype=torch.promote_types(x_LBD.dtype, weight_D.dtype))
    cosine, sine, half = phases(table_2LE)
    block = triton.next_power_of_2(own)
    _rms_kernel[(length * rows,)](
        x_LBD, None if total_LB1 is None else total_LB1.contiguous(), weight_D, cosine, sine, out,
        own, dim, rows, half, own // parts, length * rows * own // parts, eps,
        TOTAL=total_LB1 is not None, TURN=table_2LE is not None, BLOCK=block,
        num_warps=warps(block),
    )  # fmt: skip
    return out if table_2LE is None else out.view(parts * length, rows, -1, 2 * half)


@triton.jit
def _page_kernel(pages, table, out, size, columns, out_row, CHUNK: tl.constexpr):
    place, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    page = tl.load(table + place)
    offset = part * CHUNK + tl.arange(0, CHUNK)
    live = offset < size
    value = tl.load(pages + page * size + offset, mask=live)
    target = out + (place // columns) * out_row + (place % columns) * size
    tl.store(target + offset, value, mask=live)


@triton.jit
def _own_kernel(
    own, out, dim, length, own_row, own_token, out_row, start, BLOCK: tl.constexpr
):  # fmt: skip
    token, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    live = column < dim
    value = tl.load(own + row * own_row + token * own_token + column, mask=live)
    tl.store(out + row * out_row + start + token * dim + column, value, mask=live)


def joined(page_NTAE: Tensor, pages_BM: Tensor, own_BLAE: Tensor) -> Tensor:
    """See fused.joined. `own` may be any view whose heads lie side by side."""
    _, tokens, heads, size = page_NTAE.shape
    rows, columns = pages_BM.shape
    length, dim = own_BLAE.shape[1], heads * size
    out = own_BLAE.new_empty(rows, columns * tokens + length, heads, size)
    page_size = tokens * dim
    _page_kernel[(triton.cdiv(page_size, _CHUNK), rows * columns)](
        page_NTAE, pages_BM.contiguous(), out, page_size, columns, out.stride(0), CHUNK=_CHUNK,
        num_warps=8,
    )  # fmt: skip
    if own_BLAE.stride(-1) != 1 or own_BLAE.stride(-2) != size:
        own_BLAE = own_BLAE.contiguous()
    _own_kernel[(length, rows)](
        own_BLAE, out, dim, length, own_BLAE.stride(0), own_BLAE.stride(1), out.stride(0),
        columns * page_size, BLOCK=triton.next_power_of_2(dim), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _quantise_kernel(x, tokens, unit, dim, x_row, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    live = column < dim
    value = tl.load(x + row * x_row + column, mask=live, other=0.0).to(tl.float32)
    _store_eight(value, tokens, unit, row, column, live, dim, LIMIT)


def quantise_rows(x_RD: Tensor, limit: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See fused.quantise_rows. Rows may lie apart, features may not."""
    rows, dim = x_RD.shape
    tokens, unit_R1 = _places(rows, dim, dtype, x_RD.device)
    block = triton.next_power_of_2(dim)
    _quantise_kernel[(rows,)](
        x_RD, tokens, unit_R1, dim, x_RD.stride(0), LIMIT=limit, BLOCK=block,
        num_warps=warps(block),
    )  # fmt: skip
    return tokens, unit_R1


@triton.jit
def _gelu_kernel(
    x, tokens, unit, dim, LIMIT: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    live = column < dim
    value = tl.load(x + row * dim + column, mask=live, other=0.0).to(tl.float32)
    inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
    value *= tl.sigmoid(2 * inner)  # (1 + tanh(i)) / 2 = sigmoid(2 i)
    rounded = value.to(x.dtype.element_ty)
    if WHOLE:
        tl.store(x + row * dim + column, rounded, mask=live)
    _store_eight(rounded.to(tl.float32), tokens, unit, row, column, live, dim, LIMIT)


def gelu_rows(
    x_RD: Tensor, limit: float, dtype: torch.dtype, *, whole: bool
) -> tuple[Tensor, Tensor]:
    """See fused.gelu_in: GELU(tanh) in 8 bits and its units; with `whole` in place of x, too."""
    rows, dim = x_RD.shape
    tokens, unit_R1 = _places(rows, dim, dtype, x_RD.device)
    block = triton.next_power_of_2(dim)
    _gelu_kernel[(rows,)](
        x_RD, tokens, unit_R1, dim, LIMIT=limit, WHOLE=whole, BLOCK=block, num_warps=warps(block)
    )
    return tokens, unit_R1


@triton.jit
def _spread_kernel(
    key, value, out_key, out_value, table, columns, length, heads, size, key_token, key_row,
    key_head, key_one, value_token, value_row, value_head, value_one,
    FIRST: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0) % heads, tl.program_id(1).to(tl.int64)
    tile = table + (tl.program_id(0) // heads).to(tl.int64) * columns
    token, one = tl.arange(0, TOKENS)[:, None], tl.arange(0, BLOCK)[None, :]
    live = (token < tl.load(tile + 1)) & (one < size)
    source = tl.load(tile).to(tl.int64) + token
    at = source * key_token + row * key_row + head * key_head + one * key_one
    keys = tl.load(key + at, mask=live)
    at = source * value_token + row * value_row + head * value_head + one * value_one
    values = tl.load(value + at, mask=live)
    rows = tl.num_programs(1)
    for number in range(tl.load(tile + 4)):
        place = tl.load(tile + FIRST + number)
        target = (place // length * rows + row) * length + place % length + token
        at = (target * heads + head) * size + one
        tl.store(out_key + at, keys, mask=live)
        tl.store(out_value + at, values, mask=live)


def spread_seen(
    key_LBAE: Tensor, value_LBAE: Tensor, table_NC: Tensor, first: int, tokens: int, pieces: int,
    length: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See sight.seen_by: every key is read once and written wherever it is seen.

    Two [pieces * B, A, M, E] of M = `length` keys a piece, in memory [pieces * B, M, A, E]. A tile
    of the table has at most `tokens` tokens; its places begin at column `first`.
    """
    _, rows, heads, size = key_LBAE.shape
    shape = pieces * rows, length, heads, size
    out_key, out_value = key_LBAE.new_empty(shape), value_LBAE.new_empty(shape)
    _spread_kernel[(table_NC.shape[0] * heads, rows)](
        key_LBAE, value_LBAE, out_key, out_value, table_NC, table_NC.shape[1], length, heads, size,
        *key_LBAE.stride(), *value_LBAE.stride(), FIRST=first, TOKENS=tokens,
        BLOCK=triton.next_power_of_2(size), num_warps=4,
    )  # fmt: skip
    return out_key.transpose(1, 2), out_value.transpose(1, 2)


@triton.jit
def _sum_kernel(
    key, value, total_key, total_value, out_key, out_value, table, columns, length, heads, size,
    key_row, key_head, key_token, key_one, value_row, value_head, value_token, value_one,
    FIRST: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0) % heads, tl.program_id(1).to(tl.int64)
    tile = table + (tl.program_id(0) // heads).to(tl.int64) * columns
    token, one = tl.arange(0, TOKENS)[:, None], tl.arange(0, BLOCK)[None, :]
    live = (token < tl.load(tile + 1)) & (one < size)
    rows = tl.num_programs(1)
    out = (((tl.load(tile).to(tl.int64) + token) * rows + row) * heads + head) * size + one
    begun = (token < tl.load(tile + 2)) & (one < size)
    keys = tl.load(total_key + out, mask=begun, other=0.0).to(tl.float32)
    values = tl.load(total_value + out, mask=begun, other=0.0).to(tl.float32)
    for number in range(tl.load(tile + 4)):
        place = tl.load(tile + FIRST + number)
        source, seen = place // length * rows + row, (place % length + token).to(tl.int64)
        at = source * key_row + head * key_head + seen * key_token + one * key_one
        keys += tl.load(key + at, mask=live, other=0.0).to(tl.float32)
        at = source * value_row + head * value_head + seen * value_token + one * value_one
        values += tl.load(value + at, mask=live, other=0.0).to(tl.float32)
    if tl.load(tile + 3) > 0:
        tl.store(total_key + out, keys.to(total_key.dtype.element_ty), mask=live)
        tl.store(total_value + out, values.to(total_value.dtype.element_ty), mask=live)
    else:
        tl.store(out_key + out, keys.to(out_key.dtype.element_ty), mask=live)
        tl.store(out_value + out, values.to(out_value.dtype.element_ty), mask=live)


def sum_seen(
    key_RAME: Tensor, value_RAME: Tensor, totals: Sequence[Tensor], outs: Sequence[Tensor],
    table_NC: Tensor, first: int, tokens: int,
) -> None:  # fmt: skip
    """See sight.Sums: adds one batch's gradients, in the order of the table, in float32.

    `outs` are contiguous [L, B, A, E], `totals` have the tokens up to the last that several batches
    see. Each tile is written once: to the totals if a later batch sees it, else to the outs.
    """
    _, rows, heads, size = outs[0].shape
    _sum_kernel[(table_NC.shape[0] * heads, rows)](
        key_RAME, value_RAME, *totals, *outs, table_NC, table_NC.shape[1], key_RAME.shape[2], heads,
        size, *key_RAME.stride(), *value_RAME.stride(), FIRST=first, TOKENS=tokens,
        BLOCK=triton.next_power_of_2(size), num_warps=4,
    )  # fmt: skip
