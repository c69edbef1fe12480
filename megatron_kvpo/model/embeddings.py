"""Into and out of the hidden space: patches, time, text, and the head."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megatron_kvpo.model.fused import modulated
from megatron_kvpo.model.lora import mark_replicated


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """[...] -> [..., dim]: cosines, then sines, of t * 10000^(-i / (dim / 2)), in float64."""
    half = dim // 2
    rate = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    phase = timestep.double()[..., None] * torch.exp(-math.log(10000.0) * rate)
    return torch.cat([phase.cos(), phase.sin()], dim=-1).float()


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's product in the type of x: a weight that trains is float32."""
    assert isinstance(layer, nn.Linear)
    return nn.functional.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


class TwoLinears(nn.ModuleDict):
    """Linear, activation, Linear; named 0 and 2 as in the released weights. Whole on every rank."""

    def __init__(
        self, in_dim: int, dim: int, activation: nn.Module, device: torch.device, *, sequence: bool
    ) -> None:
        super().__init__({
            "0": nn.Linear(in_dim, dim, device=device), "2": nn.Linear(dim, dim, device=device),
        })  # fmt: skip
        self._activation = [activation]  # in a list: it holds no weights and is no submodule
        for parameter in self.parameters():
            mark_replicated(parameter, sequence=sequence)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., D]."""
        return _linear(self["2"], self._activation[0](_linear(self["0"], x)))


class TimeProjection(nn.ModuleDict):
    """SiLU, Linear D -> 6D, named 1 as in the released weights."""

    def __init__(self, dim: int, device: torch.device, *, sequence: bool) -> None:
        super().__init__({"1": nn.Linear(dim, 6 * dim, device=device)})
        for parameter in self.parameters():
            mark_replicated(parameter, sequence=sequence)

    def forward(self, time_FBD: Tensor) -> Tensor:
        """[F, B, D] -> [F, B, 6, D]."""
        out = _linear(self["1"], nn.functional.silu(time_FBD))
        return out.view(*out.shape[:-1], 6, -1)


def patchify(latent_BFCHW: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Tokens in the order frame, row, column: [B, F, C, H, W] -> [L, B, C * ph * pw]."""
    rows, frames, channels, height, width = latent_BFCHW.shape
    _, ph, pw = patch
    cut = latent_BFCHW.view(rows, frames, channels, height // ph, ph, width // pw, pw)
    return cut.permute(1, 3, 5, 0, 2, 4, 6).reshape(-1, rows, channels * ph * pw)


def unpatchify(
    x_LBC: Tensor, patch: tuple[int, int, int], frame_shape: tuple[int, int, int]
) -> Tensor:
    """Frames of patches, channel fastest inside one: [L, B, ph * pw * C] -> [B, F, C, H, W]."""
    channels, height, width = frame_shape
    _, ph, pw = patch
    rows = x_LBC.shape[1]
    cut = x_LBC.view(-1, height // ph, width // pw, rows, ph, pw, channels)
    return cut.permute(3, 0, 6, 1, 4, 2, 5).reshape(rows, -1, channels, height, width)


class Head(nn.Module):
    """Modulated norm and projection to patches of velocity."""

    def __init__(
        self, dim: int, out_dim: int, eps: float, device: torch.device, *, sequence: bool,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        super().__init__()
        self._dtype = dtype
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim, device=device))
        self.norm = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.head = nn.Linear(dim, out_dim, device=device)
        for parameter in self.parameters():
            mark_replicated(parameter, sequence=sequence)

    def forward(self, hidden_LBD: Tensor, time_LBD: Tensor) -> Tensor:
        """[L, B, D] -> [L, B, out]; `time_LBD` may have fewer tokens, each for many in a row."""
        shift, scale = (self.modulation[0].to(self._dtype) + time_LBD[:, :, None]).unbind(2)
        return _linear(self.head, modulated(self.norm(hidden_LBD), shift, scale))
