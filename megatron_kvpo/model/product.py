"""A linear layer's product with its weight and with the low-rank adapter that acts beside it.

y = x W^T + b + s (x A^T) B^T is one node of the graph. In narrow types it is one product: B stands
in the margin of W and x A^T in the margin of x. So it is rounded once; added to a product that is
rounded already, the small adapter of the first updates would be lost. Without a graph it may be
merged into a copy of W instead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_kvpo.model.eight_bits import KINDS, Product
from megatron_kvpo.model.fused import EightBits, Form, gelu_in, without_graph
from megatron_kvpo.model.held import Results
from megatron_kvpo.model.lora import Adapter, LowRank


class Weight:
    """A frozen weight as products use it: as it is or in 8 bits, bare or with the adapter merged.

    With a graph the gradient passes through the weight as it is.
    """

    def __init__(
        self, parameter: nn.Parameter, scaling: str | None, merges: int | None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        """What it is computed in.

        Args:
            parameter: the weight.
            scaling: of 8 bits, or None.
            merges: number of this layer's dither, or None.
            dtype: of products, by default the parameter's; one that trains is float32.
        """
        self._dtype = dtype
        self.parameter, self.scaling, self.merges = parameter, scaling, merges
        self.acts_merged = False
        """Whether passes without a graph use the merged weight, and so no adapter."""

        self.margin = 0
        """Columns behind the weight, where `make_margin` moved it."""

        self._merged: Tensor | None = None
        self._bare: tuple[int, Product] | None = None
        self._full: Product | None = None

    def merge(self, acting: LowRank | None) -> None:
        """Take the adapter that acts into a copy of the weight. None: the weight is bare again."""
        self.acts_merged = acting is not None and self.merges is not None
        if acting is None or self.merges is None:
            return
        wide = torch.addmm(
            self.parameter.detach().float(), acting.acting_up.float(), acting.acting_down.float(),
            alpha=acting.scale,
        )  # fmt: skip
        whole = dithered(wide, self.parameter.dtype, self.merges)
        if self.scaling is None:
            if self._merged is None:
                self._merged = torch.empty_like(whole)
            self._merged.copy_(whole)
        elif self._full is None:
            self._full = KINDS[self.scaling](whole)
        else:
            self._full.refill(whole)

    def multiplies_in_eight_bits(self, merged: bool) -> bool:
        """Whether `times` does."""
        return self.scaling is not None and (merged or self.merges is None)

    def times(self, x: Tensor | EightBits, bias: Tensor | None, *, merged: bool) -> Tensor:
        """The product x W^T + b, [R, in] -> [R, out]. No graph.

        In 8 bits if the layer is; but a bare weight in a run that merges is met by the gradient's
        passes alone, and these are as exact as can be.
        """
        if self.multiplies_in_eight_bits(merged):
            return self._product(merged).times(x, bias)
        assert isinstance(x, Tensor)
        return nn.functional.linear(x, self.value(merged), bias)

    def make_margin(self, rank: int) -> Tensor:
        """Move the weight to where `rank` columns are free behind it; returns these, [N, rank].

        Whoever later changes the weight must do so in place.
        """
        outputs, inputs = self.parameter.shape
        wide = self.parameter.new_zeros(outputs, inputs + rank)
        wide[:, :inputs] = self.parameter.data
        self.parameter.data, self.margin = wide[:, :inputs], rank
        return wide[:, inputs:]

    def with_adapter(self, acting: LowRank) -> Tensor:
        """The weight and B side by side, [N, K + r]: in one piece where there is a margin."""
        own = self.parameter.detach()
        if not self.margin:
            return torch.cat([own, acting.acting_up], dim=1)
        outputs, inputs = own.shape
        return own.as_strided((outputs, inputs + self.margin), (inputs + self.margin, 1))

    def value(self, merged: bool) -> Tensor:
        """[N, K], with the adapter merged or bare."""
        if merged and self._merged is not None:
            return self._merged
        return self.cast(self.parameter.detach())

    def cast(self, x: Tensor) -> Tensor:
        """The weight or its bias in the type that is computed with."""
        return x if self._dtype is None else x.to(self._dtype)

    def _product(self, merged: bool) -> Product:
        if merged:
            assert self._full is not None
            return self._full
        version = self.parameter._version
        if self._bare is None or self._bare[0] != version:
            assert self.scaling is not None
            self._bare = (version, KINDS[self.scaling](self.parameter.detach()))
        return self._bare[1]


def dithered(x: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """The values of x in `dtype`, rounded up or down by chance in proportion.

    The chance is the same at every call. A small change of x moves a small share of the results,
    where rounding to the nearest would lose it; what `dtype` can hold is left as it is. Float32 to
    bfloat16; another type rounds as usual.
    """
    if dtype != torch.bfloat16:
        return x.to(dtype)
    rng = torch.Generator(device=x.device).manual_seed(seed)
    chance = torch.randint(1 << 16, x.shape, generator=rng, device=x.device, dtype=torch.int32)
    return ((x.view(torch.int32) + chance) & -(1 << 16)).view(torch.float32).to(dtype)


def product(
    x: Tensor | EightBits, weight: Weight, bias: Tensor | None, adapter: Adapter | None, *,
    gelu: Form | None = None, partition: int = 0, group: dist.ProcessGroup | None = None,
    known: Results | None = None,
) -> Tensor | EightBits:  # fmt: skip
    """One rank's part of a linear layer, [..., in] -> [..., out].

    Args:
        x: without a graph it may have r features more than W takes: room for x A^T.
        weight: this rank's share, cut along `partition` (0: outputs, 1: inputs).
        bias: added if given.
        adapter: acts beside it, if a slot is chosen. No other may be chosen before backward.
        gelu: return GELU(tanh) of the result, in this form.
        partition: see `weight`.
        group: tensor ranks, if the gradients of the adapter's whole matrix must be summed here.
        known: the result, one tensor without a graph. Then only the graph is made.
    """
    acting = None if adapter is None else adapter.acting
    if not torch.is_grad_enabled():
        return _plain(x, weight, bias, acting, gelu)
    assert isinstance(x, Tensor)
    if not weight.parameter.requires_grad:
        pair = (None, None) if acting is None else (acting.down, acting.up)
        out = _Product.apply(x, *pair, bias, weight, adapter, partition, group, known)  # type: ignore[no-untyped-call]
    elif acting is None and known is None:
        out = nn.functional.linear(x, weight.cast(weight.parameter), bias)
    elif acting is None:
        out = _graph_of(x, weight.cast(weight.parameter), bias, known)
    else:
        raise RuntimeError("a weight that trains has an adapter that acts: freeze the base")
    return out if gelu is None else nn.functional.gelu(out, approximate="tanh")


def _graph_of(x: Tensor, weight: Tensor, bias: Tensor | None, known: Results | None) -> Tensor:
    """A linear layer's result as it is known, and torch's own graph of it."""
    instead = _Instead(known)
    with instead:
        flat = nn.functional.linear(x.reshape(-1, x.shape[-1]), weight, bias)
    assert not instead.known, "torch multiplies by other means than it did: find them"
    return flat.view(*x.shape[:-1], -1)


class _Instead(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, below autograd and autocast, a matrix product has the value that is known of it."""

    def __init__(self, known: Results | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            return func(*args, **(kwargs or {}))
        assert self.known is not None
        (value,), self.known = self.known, None
        assert value is not None
        return value.view(-1, value.shape[-1])


def _plain(
    x: Tensor | EightBits, weight: Weight, bias: Tensor | None, acting: LowRank | None,
    gelu: Form | None,
) -> Tensor | EightBits:  # fmt: skip
    shape = x.shape[:-1]
    if isinstance(x, Tensor):
        x = x.reshape(-1, x.shape[-1])
    merged, dim = weight.acts_merged, weight.parameter.shape[1]
    whole = weight.value(merged)
    if merged:
        acting = None
    if acting is not None and isinstance(x, Tensor) and x.shape[1] > dim:
        torch.mm(x[:, :dim], acting.acting_down.t(), out=x[:, dim:])
        whole, acting = weight.with_adapter(acting), None
    if acting is not None or weight.scaling is not None:
        out = _sum(x, weight, bias, acting, merged=merged)[0]
    elif gelu and not gelu.eight_bits and bias is not None and without_graph(bias):
        assert isinstance(x, Tensor)
        return torch._addmm_activation(bias, x, whole.t(), use_gelu=True).view(*shape, -1)
    else:
        assert isinstance(x, Tensor)
        out = nn.functional.linear(x, whole, bias)
    out = out.view(*shape, -1)
    return out if gelu is None else gelu_in(out, gelu)


def _sum(
    x: Tensor | EightBits, weight: Weight, bias: Tensor | None, acting: LowRank | None, *,
    merged: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The product, and x A^T."""
    if acting is None:
        return weight.times(x, bias, merged=merged), None
    wide = x if isinstance(x, Tensor) else x.whole_RD
    assert wide is not None
    narrow = torch.mm(wide, acting.acting_down.t())
    if wide.dtype == torch.float32 or weight.multiplies_in_eight_bits(merged):
        out = weight.times(x, bias, merged=merged)
        torch.addmm(out, narrow, acting.acting_up.t(), alpha=acting.scale, out=out)
        return out, narrow
    both = torch.cat([wide, narrow], dim=1)
    return nn.functional.linear(both, weight.with_adapter(acting), bias), narrow


class _Product(torch.autograd.Function):
    """`product` of a frozen weight, with a graph. Gradients of A and B come in their own type."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor | None, up: Tensor | None, bias: Tensor | None,
        weight: Weight, adapter: Adapter | None, partition: int, group: dist.ProcessGroup | None,
        known: Results | None,
    ) -> Tensor:  # fmt: skip
        flat = x.reshape(-1, x.shape[-1])
        acting = None if adapter is None else adapter.acting
        trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        out, narrow = known[0] if known else None, None
        if out is None:
            out, narrow = _sum(flat, weight, bias, acting, merged=False)
        elif trains and acting is not None:
            narrow = torch.mm(flat, acting.acting_down.t())
        ctx.save_for_backward(*((flat, narrow) if trains else ()))
        ctx.weight, ctx.adapter, ctx.partition, ctx.group = weight, adapter, partition, group
        ctx.shape, ctx.trains, ctx.acting = x.shape, trains, acting
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat = grad.reshape(-1, grad.shape[-1])
        acting: LowRank | None = ctx.acting
        if acting is not None and not ctx.adapter.holds(acting):
            raise RuntimeError("another adapter slot was chosen between forward and backward")
        back = None if acting is None else torch.mm(flat, acting.acting_up).mul_(acting.scale)
        to_x = to_down = to_up = None
        if ctx.needs_input_grad[0]:
            to_x = torch.mm(flat, ctx.weight.parameter)
            if acting is not None and back is not None:
                torch.addmm(to_x, back, acting.acting_down, out=to_x)
            to_x = to_x.view(ctx.shape)
        if ctx.trains and acting is not None and back is not None:
            x, narrow = ctx.saved_tensors
            if ctx.group is not None:  # the whole matrix sees every rank's part of its sum
                summed = (back if ctx.partition == 0 else narrow).clone()
                dist.all_reduce(summed, group=ctx.group)
                back, narrow = (summed, narrow) if ctx.partition == 0 else (back, summed)
            to_down = torch.mm(back.t(), x).to(acting.down.dtype)
            to_up = torch.mm(flat.t(), narrow).to(acting.up.dtype).mul_(ctx.adapter.scale)
        return to_x, to_down, to_up, None, None, None, None, None, None
