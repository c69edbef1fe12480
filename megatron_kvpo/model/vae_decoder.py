"""Wan's VAE decoder as it runs fast: the modules and weights of diffusers, another forward.

Tensors are [B, F, H, W, C], channels side by side; convolutions get permuted views. What stands
before a causal convolution writes straight into its input, behind the two frames kept from before,
so nothing is padded, joined or cloned on the way. For some widths it writes every frame three
times, so that the convolution over three frames is one over a picture of three times the channels.
On a GPU norms and sums are one kernel each (`vae_kernels.py`), elsewhere plain torch. F counts
latent frames until they are upsampled in time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

KEPT = 2
"""Frames that a causal convolution, three frames wide, keeps of its input."""

MAX_LATENTS = 3
"""Latent frames, of all rows, that run together; more need more memory and gain nothing."""

SIDE_BY_SIDE = frozenset({96, 384})
"""Channels for which cuDNN is faster over pictures, three frames' channels side by side: 1.5 ms
for 3.3 and .5 for .7 on an H100, at Wan's sizes. At 192 it is not: 1.4 for 1.3."""

Feature = Tensor | str | None
"""What one causal convolution keeps: its last two input frames [B, 2, H, W, C], zeros for those
before the video; diffusers' mark that a temporal upsampling has seen one latent; or nothing yet."""

_SEEN = "Rep"
_WIDE = torch.int64


def arrange(decoder: nn.Module) -> None:
    """Lay the convolutions' weights out channels last, in place. Moving them keeps that."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            weight = module.weight
            weight.data = weight.data.contiguous(memory_format=formats[weight.ndim])


def latents_at_once(num_latents: int, slots: list[Feature], num_rows: int) -> list[int]:
    """How many latent frames each call of `decode_latents` takes: a video's first goes alone."""
    first = [1] if slots[0] is None else []
    step = max(1, MAX_LATENTS // num_rows)
    whole, rest = divmod(num_latents - len(first), step)
    return [*first, *[step] * whole, *[rest] * (rest > 0)]


def decode_latents(decoder: Any, hidden_BFHWC: Tensor, slots: list[Feature]) -> Tensor:
    """Latents after post_quant_conv -> pixels, 4F frames; a video's first latent gives 1.

    `decoder` is a diffusers WanDecoder3d, arranged. `slots`, one of each causal convolution in
    running order, move on; the tensors in them are read only. ValueError if a first latent is not
    alone.
    """
    if slots[0] is None and hidden_BFHWC.shape[1] != 1:
        raise ValueError(
            f"a video's first latent frame is decoded alone, not with {hidden_BFHWC.shape[1] - 1} "
            "more: latents_at_once says how many go together"
        )
    return _Run(slots).decoded(decoder, _side_by_side(hidden_BFHWC))


class _Run:
    """One pass through the decoder: its layers, and the slot of the next causal convolution."""

    def __init__(self, slots: list[Feature]) -> None:
        self._slots = slots
        self._next = 0

    def decoded(self, decoder: Any, x_BFHWC: Tensor) -> Tensor:
        x_BFHWC = self._convolved(decoder.conv_in, x_BFHWC).add_(decoder.conv_in.bias)
        first, *others = decoder.mid_block.resnets
        x_BFHWC = self._residual(first, x_BFHWC)
        for attention, block in zip(decoder.mid_block.attentions, others, strict=True):
            x_BFHWC = self._residual(block, attended(attention, x_BFHWC))
        for stage in decoder.up_blocks:
            for block in stage.resnets:
                x_BFHWC = self._residual(block, x_BFHWC)
            for upsampler in stage.upsamplers or ():
                x_BFHWC = self._upsampled(upsampler, x_BFHWC)
        x_BFHWC = self._convolved(decoder.conv_out, x_BFHWC, decoder.norm_out)
        return x_BFHWC.add_(decoder.conv_out.bias)

    def _residual(self, block: Any, x_BFHWC: Tensor) -> Tensor:
        inner_BFHWC = self._convolved(block.conv1, x_BFHWC, block.norm1)
        inner_BFHWC = self._convolved(block.conv2, inner_BFHWC, block.norm2, block.conv1.bias)
        if isinstance(block.conv_shortcut, nn.Conv3d):
            x_BFHWC = _by_pixel(block.conv_shortcut, x_BFHWC)
        return add_(inner_BFHWC, block.conv2.bias, x_BFHWC)

    def _convolved(
        self, conv: Any, x_BFHWC: Tensor, before: Any = None, bias_C: Tensor | None = None
    ) -> Tensor:
        """A causal convolution, its own bias left out, of SiLU(norm(x + bias)) or of x itself."""
        if before is not None and x_BFHWC.shape[-1] in SIDE_BY_SIDE:
            return self._convolved_in_space(conv, x_BFHWC, before, bias_C)
        rows, frames, *size = x_BFHWC.shape
        input_BFHWC = x_BFHWC.new_empty(rows, KEPT + frames, *size)
        self._recall(input_BFHWC[:, :KEPT])
        if before is None:
            _copy(input_BFHWC[:, KEPT:], x_BFHWC)
        else:
            norm(x_BFHWC, before.gamma.flatten(), bias_C, [input_BFHWC[:, KEPT:]], silu=True)
        self._keep(input_BFHWC[:, -KEPT:])
        return convolve(input_BFHWC, conv.weight)

    def _convolved_in_space(
        self, conv: Any, x_BFHWC: Tensor, before: Any, bias_C: Tensor | None
    ) -> Tensor:
        """The same, with the three frames that make one lying side by side in each pixel."""
        rows, frames, height, width, channels = x_BFHWC.shape
        input_BFHW3C = x_BFHWC.new_empty(rows, frames, height, width, KEPT + 1, channels)
        self._recall(input_BFHW3C[:, 0, :, :, :KEPT].movedim(-2, 1))
        if frames > 1:
            _copy(input_BFHW3C[:, 1, :, :, 0], input_BFHW3C[:, 0, :, :, 1])
        places = [input_BFHW3C[:, j:, :, :, KEPT - j] for j in range(min(frames, KEPT + 1))]
        norm(x_BFHWC, before.gamma.flatten(), bias_C, places, silu=True)
        self._keep(input_BFHW3C[:, -1, :, :, 1:].movedim(-2, 1))
        weight_O3CHW = conv.weight.transpose(1, 2).flatten(1, 2)
        out_NCHW = nn.functional.conv2d(
            input_BFHW3C.view(-1, height, width, (KEPT + 1) * channels).permute(0, 3, 1, 2),
            weight_O3CHW.contiguous(memory_format=torch.channels_last), padding=1,
        )  # fmt: skip
        return _pictures(out_NCHW, rows)

    def _upsampled(self, layer: Any, x_BFHWC: Tensor) -> Tensor:
        """Twice the height and width and, but for a video's first latent, twice the frames."""
        times_BFHWKC = x_BFHWC.unsqueeze(-2)
        if layer.mode == "upsample3d":
            if self._slots[self._next] is None:
                self._slots[self._next] = _SEEN
                self._next += 1
            else:
                times_BFHWKC = self._two_times(layer.time_conv, x_BFHWC)
        rows, frames, height, width, times, channels = times_BFHWKC.shape
        large_BFHWC = x_BFHWC.new_empty(rows, frames * times, 2 * height, 2 * width, channels)
        parts = large_BFHWC.view(rows, frames, times, height, 2, width, 2, channels)
        _copy(parts, times_BFHWKC.permute(0, 1, 4, 2, 3, 5)[:, :, :, :, None, :, None])
        flat_NCHW = large_BFHWC.flatten(0, 1).permute(0, 3, 1, 2)
        conv = layer.resample[1]
        out_NCHW = nn.functional.conv2d(flat_NCHW, conv.weight, conv.bias, padding=1)
        out_NHWC = _side_by_side(out_NCHW.permute(0, 2, 3, 1))
        return out_NHWC.view(rows, frames * times, *out_NHWC.shape[1:])

    def _two_times(self, conv: Any, x_BFHWC: Tensor) -> Tensor:
        """The convolution over three frames that makes two of each: [B, F, H, W, 2, C], a view.

        With a pixel's frames side by side, three of them are one row of a matrix product.
        """
        rows, frames, height, width, channels = x_BFHWC.shape
        length, pixels = KEPT + frames, rows * height * width
        input_BHWFC = x_BFHWC.new_empty(rows, height, width, length, channels)
        ordered_BFHWC = input_BHWFC.permute(0, 3, 1, 2, 4)
        self._recall(ordered_BFHWC[:, :KEPT])
        _copy(ordered_BFHWC[:, KEPT:], x_BFHWC)
        self._keep(ordered_BFHWC[:, -KEPT:])
        windows = input_BHWFC.as_strided(
            (frames, pixels, 3 * channels), (channels, length * channels, 1)
        )
        weight = conv.weight.permute(2, 1, 0, 3, 4).reshape(3 * channels, -1)
        out = torch.baddbmm(conv.bias, windows, weight.expand(frames, -1, -1))
        return out.view(frames, rows, height, width, 2, channels).transpose(0, 1)

    def _recall(self, target_BFHWC: Tensor) -> None:
        feature = self._slots[self._next]
        if isinstance(feature, Tensor):
            _copy(target_BFHWC, feature)
        else:
            target_BFHWC.zero_()

    def _keep(self, last_BFHWC: Tensor) -> None:
        """A copy, so that the whole input need not stay; the slot is done."""
        kept = last_BFHWC.new_empty(last_BFHWC.shape)
        _copy(kept, last_BFHWC)
        self._slots[self._next] = kept
        self._next += 1


def convolve(input_BFHWC: Tensor, weight: Tensor) -> Tensor:
    """A 3 x 3 x 3 convolution without a bias; space is padded, time is not: F + 2 frames to F."""
    input_BCFHW = input_BFHWC.permute(0, 4, 1, 2, 3)
    out_BCFHW = nn.functional.conv3d(input_BCFHW, weight, padding=(0, 1, 1))
    return _side_by_side(out_BCFHW.permute(0, 2, 3, 4, 1))


def _pictures(x_NCHW: Tensor, rows: int) -> Tensor:
    """A video of each of `rows` rows, [B, F, H, W, C], out of all rows' pictures."""
    x_NHWC = x_NCHW.permute(0, 2, 3, 1).contiguous()
    return x_NHWC.view(rows, -1, *x_NHWC.shape[1:])


def attended(block: Any, x_BFHWC: Tensor) -> Tensor:
    """One head over the pixels of each frame, added to x. `block` is a WanAttentionBlock."""
    rows, frames, height, width = x_BFHWC.shape[:4]
    normed_BFHWC = torch.empty_like(x_BFHWC)
    norm(x_BFHWC, block.norm.gamma.flatten(), None, [normed_BFHWC], silu=False)
    qkv = _by_pixel(block.to_qkv, normed_BFHWC).view(rows * frames, 1, height * width, -1)
    query, key, value = qkv.chunk(3, dim=-1)
    mixed = nn.functional.scaled_dot_product_attention(query, key, value)
    return add_(_by_pixel(block.proj, mixed.reshape(x_BFHWC.shape)), None, x_BFHWC)


def _by_pixel(conv: Any, x_BFHWC: Tensor) -> Tensor:
    """A convolution one pixel wide."""
    return nn.functional.linear(x_BFHWC, conv.weight.flatten(1), conv.bias)


def norm(
    x_BFHWC: Tensor, gamma_C: Tensor, bias_C: Tensor | None, places: Sequence[Tensor], *, silu: bool
) -> None:
    """To every place: y / max(|y|, 1e-12) sqrt(C) gamma of y = x + bias, then SiLU, in float32.

    A place is a view [B, f, H, W, C] for the first f frames; they lie equally far apart.
    """
    if x_BFHWC.is_cuda:
        _kernels().norm(x_BFHWC, gamma_C, bias_C, places, silu=silu)
        return
    wide = x_BFHWC.float()
    if bias_C is not None:
        wide = wide + bias_C.float()
    normed = nn.functional.normalize(wide, dim=-1) * (gamma_C.float() * len(gamma_C) ** 0.5)
    if silu:
        normed = nn.functional.silu(normed)
    for place in places:
        place.copy_(normed[:, : place.shape[1]])


def add_(x_BFHWC: Tensor, bias_C: Tensor | None, shortcut_BFHWC: Tensor) -> Tensor:
    """The sum x + bias + shortcut, in float32, in place of x."""
    if x_BFHWC.is_cuda:
        _kernels().add_(x_BFHWC, bias_C, shortcut_BFHWC)
        return x_BFHWC
    wide = x_BFHWC.float() if bias_C is None else x_BFHWC.float() + bias_C.float()
    return x_BFHWC.copy_(wide + shortcut_BFHWC.float())


@functools.cache
def _kernels() -> ModuleType:
    from megatron_kvpo.model import vae_kernels  # needs Triton, which CPU builds of torch lack

    return vae_kernels


def _side_by_side(x: Tensor) -> Tensor:
    """Contiguous, and with the strides of one where a size of 1 allows others; `_copy` needs it."""
    return x.contiguous().flatten().view(x.shape)


def _copy(target: Tensor, source: Tensor) -> None:
    """`target` = `source`, broadcast. Strided copies of 8 bytes a time are faster than of 2."""
    if source.shape[-1] * source.element_size() % _WIDE.itemsize == 0:
        target, source = target.view(_WIDE), source.view(_WIDE)
    target.copy_(source)
