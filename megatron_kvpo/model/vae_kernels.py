"""Kernels of the VAE's decoder: what lies between its convolutions, read once and written once.

They are Triton's, so this module is imported on a GPU only; `vae_decoder.py` says what each does.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096
"""Values, masked ones included, that one program holds: several pixels, so that loads are wide."""


@triton.jit
def _norm_kernel(
    x, gamma, bias, out, pixels, frames, x_row, x_frame, out_row, out_frame, out_pixel, apart,
    scale, DIM: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, PLACES: tl.constexpr,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, frame = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, BLOCK)
    inside = channel < DIM
    live = (pixel < pixels)[:, None] & inside[None, :]
    at = x + row * x_row + frame * x_frame + pixel[:, None] * DIM + channel[None, :]
    value = tl.load(at, mask=live, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    length = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), 1e-12)
    factor = tl.load(gamma + channel, mask=inside, other=0.0).to(tl.float32) * scale
    value = value / length[:, None] * factor[None, :]
    if SILU:
        value *= tl.sigmoid(value)
    found = value.to(out.dtype.element_ty)
    place = out + row * out_row + frame * out_frame
    place = place + pixel[:, None] * out_pixel + channel[None, :]
    for number in tl.static_range(PLACES):
        tl.store(place + number * apart, found, mask=live & (frame + number < frames))


def norm(
    x_BFHWC: Tensor, gamma_C: Tensor, bias_C: Tensor | None, places: Sequence[Tensor], *, silu: bool
) -> None:
    """See vae_decoder.norm. A frame of x is contiguous; in a place, its pixels lie evenly apart."""
    rows, frames, height, width, dim = x_BFHWC.shape
    block, count = _tile(dim)
    out, pixels = places[0], height * width
    apart = (
        (places[-1].data_ptr() - out.data_ptr()) // out.element_size() // max(1, len(places) - 1)
    )
    _norm_kernel[(triton.cdiv(pixels, count), frames, rows)](
        x_BFHWC, gamma_C, bias_C, out, pixels, frames, x_BFHWC.stride(0), x_BFHWC.stride(1),
        out.stride(0), out.stride(1), out.stride(3), apart, dim**0.5, DIM=dim,
        BIAS=bias_C is not None, SILU=silu, PLACES=len(places), PIXELS=count, BLOCK=block,
        num_warps=4,
    )  # fmt: skip


@triton.jit
def _add_kernel(
    x, bias, shortcut, pixels,
    DIM: tl.constexpr, BIAS: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, BLOCK)
    inside = channel < DIM
    live = (pixel < pixels)[:, None] & inside[None, :]
    at = pixel[:, None] * DIM + channel[None, :]
    value = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    value += tl.load(shortcut + at, mask=live, other=0.0).to(tl.float32)
    tl.store(x + at, value.to(x.dtype.element_ty), mask=live)


def add_(x_BFHWC: Tensor, bias_C: Tensor | None, shortcut_BFHWC: Tensor) -> None:
    """See vae_decoder.add_. Both are contiguous."""
    dim = x_BFHWC.shape[-1]
    pixels = x_BFHWC.numel() // dim
    block, count = _tile(dim)
    _add_kernel[(triton.cdiv(pixels, count),)](
        x_BFHWC, bias_C, shortcut_BFHWC, pixels, DIM=dim, BIAS=bias_C is not None, PIXELS=count,
        BLOCK=block, num_warps=4,
    )  # fmt: skip


def _tile(dim: int) -> tuple[int, int]:
    """A pixel's channels up to the next power of two, and how many pixels one program takes."""
    block = triton.next_power_of_2(dim)
    return block, max(1, _TILE // block)
