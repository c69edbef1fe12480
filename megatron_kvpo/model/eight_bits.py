"""Products in 8 bits (e4m3) with a frozen weight: scaled by rows or, by Transformer Engine, blocks.

In both a token's scale comes from that token alone, so what one row of a batch becomes never
depends on the others, and nothing is carried from pass to pass: a replay meets the numbers of its
rollout.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron_kvpo.model.fused import FP8, EightBits, quantise_rows

_ROWS = 16
"""Features come in multiples of so many, and with Transformer Engine tokens too."""


class Product(Protocol):
    """x W^T + b in 8 bits."""

    def refill(self, weight_NK: Tensor) -> None:
        """Take another weight of the same shape, into the same memory."""

    def times(self, x: Tensor | EightBits, bias: Tensor | None) -> Tensor:
        """[R, in] -> [R, out]. No graph."""


class RowScaled:
    """A unit for each token and for each output feature; torch's scaled product."""

    def __init__(self, weight_NK: Tensor) -> None:
        self._weight, self._unit_N1 = quantise_rows(weight_NK, FP8)

    def refill(self, weight_NK: Tensor) -> None:
        """See Product."""
        weight, unit_N1 = quantise_rows(weight_NK, FP8)
        self._weight.copy_(weight)
        self._unit_N1.copy_(unit_N1)

    def times(self, x: Tensor | EightBits, bias: Tensor | None) -> Tensor:
        """See Product."""
        if isinstance(x, Tensor):
            dtype, (tokens, unit_R1) = x.dtype, quantise_rows(x, FP8)
        else:
            dtype, tokens, unit_R1 = x.dtype, x.tokens_RD, x.unit_R1
        if not tokens.is_cuda:
            out = (tokens.float() @ self._weight.float().t()) * unit_R1 * self._unit_N1.t()
            return (out if bias is None else out + bias).to(dtype)
        return torch._scaled_mm(
            tokens, self._weight.t(), scale_a=unit_R1, scale_b=self._unit_N1.t(), bias=bias,
            out_dtype=dtype, use_fast_accum=True,
        )  # fmt: skip


class BlockScaled:
    """A unit for 128 features of a token and for 128 x 128 of a weight; Transformer Engine's."""

    def __init__(self, weight_NK: Tensor) -> None:
        import transformer_engine.pytorch as engine
        from transformer_engine.common.recipe import Float8BlockScaling

        self._engine, self._recipe = engine, Float8BlockScaling()
        outputs, inputs = weight_NK.shape
        self._layer: Any = engine.Linear(
            inputs, outputs, bias=False, params_dtype=weight_NK.dtype, device=weight_NK.device
        )
        self.refill(weight_NK)

    def refill(self, weight_NK: Tensor) -> None:
        """See Product."""
        self._layer.weight.data = weight_NK
        self._layer.weight.requires_grad_(False)
        self._run(weight_NK.new_zeros(_ROWS, weight_NK.shape[1]), first=True)

    def times(self, x: Tensor | EightBits, bias: Tensor | None) -> Tensor:
        """See Product."""
        assert isinstance(x, Tensor)
        rows = x.shape[0]
        if rows % _ROWS:
            x = nn.functional.pad(x, (0, 0, 0, -rows % _ROWS))
        out = self._run(x, first=False)[:rows]
        return out if bias is None else out.add_(bias)

    @torch.no_grad()
    def _run(self, x_RD: Tensor, *, first: bool) -> Tensor:
        with self._engine.autocast(enabled=True, recipe=self._recipe):
            return self._layer(x_RD, is_first_microbatch=first)  # type: ignore[no-any-return]


KINDS: dict[str, type[RowScaled] | type[BlockScaled]] = {"row": RowScaled, "block": BlockScaled}
"""By model.fp8_scaling."""


def check_scaling(scaling: str, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError unless this kind of product can run here."""
    if scaling == "block" and importlib.util.find_spec("transformer_engine") is None:
        raise ValueError(
            "model.fp8_scaling is block and Transformer Engine is not installed: install it, or "
            "set model.fp8_scaling to row"
        )
    if scaling == "block" and device.type != "cuda":
        raise ValueError(
            f"model.fp8_scaling is block and the device is {device.type}: Transformer Engine needs "
            "a GPU; set model.fp8_scaling to row"
        )
    if device.type != "cuda":
        return
    if dtype != torch.bfloat16:
        raise ValueError(
            f"model.fp8 on a GPU gives bfloat16 and model.dtype is {dtype}: set model.dtype to "
            "bfloat16, or leave model.fp8 out"
        )
    if torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(
            f"model.fp8 needs a GPU of compute capability 8.9 or later, {device} has "
            f"{torch.cuda.get_device_capability(device)}: leave it out"
        )


def check_sizes(outputs: int, inputs: int) -> None:
    """Raise ValueError for a rank's share of a layer that 8-bit products do not take."""
    if outputs % _ROWS or inputs % _ROWS:
        raise ValueError(
            f"model.fp8: a rank's share of a layer is {outputs} x {inputs}, 8-bit products take "
            f"multiples of {_ROWS}: leave this family out, or lower parallel.tensor"
        )
