"""Self-attention over pages and cross-attention to text, heads over the tensor ranks.

Under context parallelism tokens are shared between ranks everywhere but here: an all-to-all trades
tokens for heads around the attention itself (Ulysses). For one rank it is the identity. Query, key
and value travel while the next of them is made, their gradients while layers go backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from megatron_kvpo.model.fused import (
    Form,
    Tokens,
    heads_apart,
    joined,
    rms_rotated,
    rms_scaled,
    sum_of_squares,
)
from megatron_kvpo.model.lora import mark_sharded
from megatron_kvpo.model.memory_bank import choose_frames
from megatron_kvpo.model.pages import PassPages
from megatron_kvpo.model.sdpa import chosen_kernels
from megatron_kvpo.model.sight import Sight, attend_seen
from megatron_kvpo.model.specs import Spec
from megatron_kvpo.parallel.exchange import Exchange


class WideRMSNorm(nn.Module):
    """RMSNorm over the whole hidden size, of which this rank holds a share of the features."""

    def __init__(self, dim: int, eps: float, spec: Spec) -> None:
        super().__init__()
        self._dim, self._eps, self._spec, self._dtype = dim, eps, spec, spec.dtype
        self.weight = nn.Parameter(
            torch.ones(dim // spec.ranks.tensor.size, device=spec.ranks.device)
        )
        mark_sharded(self.weight, 0)

    def forward(self, x_LBD: Tensor) -> Tensor:
        """Normalise in float32: x / sqrt(mean(x^2) + eps) * weight, mean over all ranks."""
        (total,) = totals(self._spec, x_LBD)
        return rms_scaled(x_LBD, total, self.weight.to(self._dtype), self._dim, self._eps)

    def rotated(self, x_LBD: Tensor, total_LB1: Tensor | None, table_2LE: Tensor) -> Tensor:
        """Normalise by `totals`, cut into heads, turn these by their tokens' phases.

        Laid out as the context ranks exchange them: see `heads_apart`.
        """
        weight_D, parts = self.weight.to(self._dtype), self._spec.ranks.context.size
        return rms_rotated(x_LBD, total_LB1, weight_D, table_2LE, self._dim, self._eps, parts)


def totals(spec: Spec, *parts_LBD: Tensor) -> Sequence[Tensor | None]:
    """Sum of squares over all ranks' features of each, in one exchange; None: this rank has all."""
    if spec.ranks.tensor.size == 1:
        return [None] * len(parts_LBD)
    summed = spec.sum_features(torch.cat([sum_of_squares(x) for x in parts_LBD], dim=-1))
    return summed.chunk(len(parts_LBD), dim=-1)


class _Attention(nn.Module):
    """The projections and norms that both kinds of attention have."""

    def __init__(self, dim: int, num_heads: int, eps: float, spec: Spec, family: str) -> None:
        super().__init__()
        self._spec, self._head_dim = spec, dim // num_heads
        self.q = spec.column(dim, dim, family)
        self.k = spec.column(dim, dim, family)
        self.v = spec.column(dim, dim, family)
        self.o = spec.row(dim, dim, family)
        self.norm_q = WideRMSNorm(dim, eps, spec)
        self.norm_k = WideRMSNorm(dim, eps, spec)

    @property
    def form(self) -> Form:
        """How it wants its input."""
        return self.q.form  # type: ignore[return-value]

    def _heads(self, x_LBD: Tensor) -> Tensor:
        return x_LBD.view(*x_LBD.shape[:-1], -1, self._head_dim)


class SelfAttention(_Attention):
    """A pass's tokens attend to cached pages and to each other."""

    def forward(
        self, hidden_LBD: Tokens, table: Tensor, layer: int, pages: PassPages | None,
        sight: Sight | None,
    ) -> Tensor:  # fmt: skip
        """[L, B, D] -> [L, B, D]. Keys: the pages read, then the pass's own frames.

        Writes own keys (after rotation) and values where `pages` says. `sight`: what each token
        sees of the pass, by default all; only for passes without a cache.
        """
        whole = self._spec.share_input(hidden_LBD)
        turned = ((self.q, self.norm_q), (self.k, self.norm_k))
        query, key, value = self._exchanged(whole, table, *turned)
        if sight is not None:
            out_LBAE = attend_seen(query, key, value, sight)
        else:
            key, value = key.transpose(0, 1), value.transpose(0, 1)
            if pages is not None:
                key, value = _with_cache(query, key, value, layer, pages)
            out_LBAE = attend(query, key, value)
        return self.o(heads_to_tokens(out_LBAE, self._spec).flatten(-2))  # type: ignore[no-any-return]

    def fill(self, hidden_LBD: Tokens, table: Tensor, layer: int, pages: PassPages) -> None:
        """Leave the keys and values that `forward` would, and do nothing else. No graph."""
        whole = self._spec.share_input(hidden_LBD)
        key, value = self._exchanged(whole, table, (self.k, self.norm_k))
        assert pages.write_BF is not None
        pages.pool.write(layer, pages.write_BF, key.transpose(0, 1), value.transpose(0, 1))

    def _exchanged(
        self, whole: Tokens, table: Tensor, *turned: tuple[nn.Module, WideRMSNorm]
    ) -> list[Tensor]:  # fmt: skip
        """What these layers and norms make, and the value: all tokens of a share of the heads."""
        context = self._spec.ranks.context
        under_way = [Exchange(x, context) for x in self._made(whole, table, *turned)]
        return [exchange.wait() for exchange in under_way]

    def _made(
        self, whole: Tokens, table: Tensor, *turned: tuple[nn.Module, WideRMSNorm]
    ) -> Iterator[Tensor]:  # fmt: skip
        """What is to be exchanged, each made when asked for; products that share a sum, at once.

        The value comes last: the order of layers is that in which their input's gradient is summed.
        """
        if self._spec.ranks.tensor.size == 1:
            for layer, norm in turned:
                yield norm.rotated(layer(whole, shared=True), None, table)
        else:
            wide = [layer(whole, shared=True) for layer, _ in turned]
            for (_, norm), x, total in zip(turned, wide, totals(self._spec, *wide), strict=True):
                yield norm.rotated(x, total, table)
        yield heads_apart(self._heads(self.v(whole, shared=True)), self._spec.ranks.context.size)


class CrossAttention(_Attention):
    """Tokens attend to all text tokens, padding too."""

    def encode(self, text_XBD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of embedded texts: two [B, X, A, E]."""
        whole = self._spec.share_input(text_XBD)
        key = self._heads(self.norm_k(self.k(whole, shared=True)))
        value = self._heads(self.v(whole, shared=True))
        return key.transpose(0, 1), value.transpose(0, 1)

    def forward(self, hidden_LBD: Tokens, key_BXAE: Tensor, value_BXAE: Tensor) -> Tensor:
        """[L, B, D] -> [L, B, D]."""
        query = self._heads(self.norm_q(self.q(hidden_LBD)))
        return self.o(attend(query, key_BXAE, value_BXAE).flatten(-2))  # type: ignore[no-any-return]


def _with_cache(
    query_LBAE: Tensor, key_BLAE: Tensor, value_BLAE: Tensor, layer: int, pages: PassPages
) -> tuple[Tensor, Tensor]:
    """Leave this pass's keys and values in its pages; return all those that it sees."""
    if pages.write_BF is not None:
        pages.pool.write(layer, pages.write_BF, key_BLAE, value_BLAE)
    tokens = pages.pool.key.shape[2]
    hidden = pages.own_from * tokens
    key_BLAE, value_BLAE = key_BLAE[:, hidden:], value_BLAE[:, hidden:]
    if pages.read_BM.shape[1] == 0:
        return key_BLAE, value_BLAE
    if not 0 < pages.num_chosen < pages.num_memory:
        held, read_BM = pages.pool, pages.read_BM
        return (joined(held.key[layer], read_BM, key_BLAE),
                joined(held.value[layer], read_BM, value_BLAE))  # fmt: skip
    cached_key, cached_value = choose_frames(
        query_LBAE, pages.pool.read(layer, pages.read_BM), pages.num_memory, pages.num_chosen,
        tokens,
    )  # fmt: skip
    return torch.cat([cached_key, key_BLAE], dim=1), torch.cat([cached_value, value_BLAE], dim=1)


def attend(query_LBAE: Tensor, key_BMAE: Tensor, value_BMAE: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(E)) V, per row and head. Returns [L, B, A, E]."""
    with chosen_kernels(query_LBAE):
        out_BALE = nn.functional.scaled_dot_product_attention(
            query_LBAE.permute(1, 2, 0, 3),
            key_BMAE.transpose(1, 2),
            value_BMAE.transpose(1, 2),
        )
    return out_BALE.permute(2, 0, 1, 3)


def heads_to_tokens(x_LBAE: Tensor, spec: Spec) -> Tensor:
    """All heads of a share of the tokens, from a share of the heads of all tokens."""
    size = spec.ranks.context.size
    if size == 1:
        return x_LBAE
    tokens, rows, heads, dim = x_LBAE.shape
    parts = spec.all_to_all(x_LBAE.contiguous()).view(size, tokens // size, rows, heads, dim)
    return parts.permute(1, 2, 0, 3, 4).reshape(tokens // size, rows, size * heads, dim)
