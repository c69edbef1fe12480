"""One block of the transformer: modulated self-attention, text, modulated feed-forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_kvpo.config import ModelConfig
from megatron_kvpo.model.attention import CrossAttention, SelfAttention
from megatron_kvpo.model.fused import Form, Tokens, gated_add, residual_norm
from megatron_kvpo.model.held import FFN
from megatron_kvpo.model.lora import mark_replicated
from megatron_kvpo.model.pages import PassPages
from megatron_kvpo.model.sight import Sight
from megatron_kvpo.model.specs import Spec


class FeedForward(nn.ModuleDict):
    """Linear, GELU(tanh), Linear; named 0 and 2 as in the released weights."""

    def __init__(self, config: ModelConfig, spec: Spec) -> None:
        super().__init__({
            "0": spec.column(config.hidden_dim, config.ffn_dim, "ffn"),
            "2": spec.row(config.ffn_dim, config.hidden_dim, "ffn"),
        })  # fmt: skip

    def forward(self, hidden_LBD: Tokens) -> Tensor:
        """[L, B, D] -> [L, B, D]."""
        narrow: Any = self["2"]
        return narrow(self["0"](hidden_LBD, gelu=narrow.form), kind=FFN)  # type: ignore[no-any-return]

    @property
    def form(self) -> Form:
        """How it wants its input."""
        return self["0"].form  # type: ignore[return-value]


class CausalBlock(nn.Module):
    """A Wan transformer block whose self-attention reads pages."""

    def __init__(self, config: ModelConfig, spec: Spec) -> None:
        super().__init__()
        dim, eps, device = config.hidden_dim, config.eps, spec.ranks.device
        self._eps, self._dtype = eps, spec.dtype
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim, device=device))
        self.self_attn = SelfAttention(dim, config.num_heads, eps, spec, "attention")
        self.norm3 = nn.LayerNorm(dim, eps, device=device)
        self.cross_attn = CrossAttention(dim, config.num_heads, eps, spec, "text")
        self.ffn = FeedForward(config, spec)
        for parameter in (self.modulation, *self.norm3.parameters()):
            mark_replicated(parameter, sequence=spec.sequence)

    def forward(
        self, hidden_LBD: Tensor, time_LB6D: Tensor, text: tuple[Tensor, Tensor], table: Tensor,
        layer: int, pages: PassPages | None, sight: Sight | None,
    ) -> Tensor:  # fmt: skip
        """[L, B, D] -> [L, B, D]; `time_LB6D` may have fewer tokens, each for as many in a row.

        x += gate1 * attn(LN(x)(1 + scale1) + shift1); x += cross(LN3(x), text);
        x += gate2 * ffn(LN(x)(1 + scale2) + shift2).
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self._modulations(time_LB6D).unbind(2)
        attention, crossing, eps = self.self_attn, self.cross_attn, self._eps
        _, normed = residual_norm(hidden_LBD, None, None, shift1, scale1, eps, form=attention.form)
        hidden_LBD, normed = residual_norm(
            hidden_LBD, attention(normed, table, layer, pages, sight), gate1,
            *self._text_norm(), eps, plus_one=False, form=crossing.form,
        )  # fmt: skip
        hidden_LBD, normed = residual_norm(
            hidden_LBD, crossing(normed, *text), None, shift2, scale2, eps,
            form=self.ffn.form,
        )  # fmt: skip
        return gated_add(hidden_LBD, self.ffn(normed), gate2)

    def _modulations(self, time_LB6D: Tensor) -> Tensor:
        return self.modulation[0].to(self._dtype) + time_LB6D

    def _text_norm(self) -> tuple[Tensor, Tensor]:
        return self.norm3.bias.to(self._dtype), self.norm3.weight.to(self._dtype)

    def fill(
        self, hidden_LBD: Tensor, time_LB6D: Tensor, table: Tensor, layer: int, pages: PassPages
    ) -> None:
        """As the last block of a pass that only fills pages: no output, no graph."""
        shift, scale = self._modulations(time_LB6D).unbind(2)[:2]
        form = self.self_attn.form
        _, normed = residual_norm(hidden_LBD, None, None, shift, scale, self._eps, form=form)
        self.self_attn.fill(normed, table, layer, pages)
