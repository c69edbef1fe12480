"""The seam to Megatron's layers: which classes the blocks are built from, and token splits.

One spec so far, Megatron's own linear layers; a Transformer Engine spec takes the same calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, mappings
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_kvpo.config import ModelConfig, ParallelConfig, PolicyConfig
from megatron_kvpo.model.eight_bits import check_scaling, check_sizes
from megatron_kvpo.model.fused import EightBits, Form, Tokens, without_graph
from megatron_kvpo.model.held import Results, keep, taken
from megatron_kvpo.model.lora import Adapter, Switch, mark_sharded
from megatron_kvpo.model.product import Weight, product
from megatron_kvpo.parallel.groups import Axis, Ranks


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, *, masters: bool = False
) -> TransformerConfig:
    """What Megatron's layers and optimizer need to know of the model. `masters`: see Spec."""
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_dim,
        num_attention_heads=model.num_heads,
        ffn_hidden_size=model.ffn_dim,
        tensor_model_parallel_size=parallel.tensor,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=torch.float32 if masters else model.torch_dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
    )


@dataclass(frozen=True, slots=True)
class Spec:
    """Everything a block needs to build its layers on these ranks."""

    megatron: TransformerConfig
    ranks: Ranks
    switch: Switch
    lora: tuple[int, float] | None
    """LoRA rank and alpha, or None for bare layers."""

    eight_bits: tuple[str, ...] = ()
    """Families of layers whose products are FP8: see model.fp8."""

    scaling: str = "row"
    """Of these products: see model.fp8_scaling."""

    swaps: bool = False
    """Whether the policies are whole weights, exchanged for each other."""

    merges: bool = False
    """Whether passes without a graph have the acting adapter in their weights: policy.merge."""

    dtype: torch.dtype = torch.float32
    """That is computed with: model.dtype."""

    masters: bool = False
    """Whether the base trains, and so is float32 whatever it is computed in."""

    @staticmethod
    def build(
        model: ModelConfig, parallel: ParallelConfig, ranks: Ranks, policy: PolicyConfig | None,
        *, masters: bool = False,
    ) -> Spec:  # fmt: skip
        """Spec of a model that trains by `policy`; None builds bare layers, for pre-training."""
        check_layout(model, parallel)
        lora, merges, swaps = None, False, False
        if policy is not None and policy.mode == "lora":
            lora, merges = (policy.lora_rank, policy.lora_alpha), policy.merge
        elif policy is not None:
            swaps = True
        if model.fp8:
            check_scaling(model.fp8_scaling, model.torch_dtype, ranks.device)
        return Spec(
            transformer_config(model, parallel, masters=masters), ranks, Switch(), lora,
            eight_bits=model.fp8, scaling=model.fp8_scaling, swaps=swaps, merges=merges,
            dtype=model.torch_dtype, masters=masters,
        )  # fmt: skip

    @property
    def sequence(self) -> bool:
        """Whether tokens are shared over the tensor ranks between linear layers."""
        return bool(self.megatron.sequence_parallel)

    def column(self, in_dim: int, out_dim: int, family: str) -> nn.Module:
        """Linear whose output features are shared over the tensor ranks. See model.fp8."""
        layer = _Column(
            in_dim, out_dim, config=self.megatron, init_method=nn.init.zeros_, bias=True
        )
        layer.attach(self, in_dim, out_dim // self.ranks.tensor.size, 0, family)
        return layer

    def row(self, in_dim: int, out_dim: int, family: str) -> nn.Module:
        """Linear whose input features are shared over the tensor ranks. See model.fp8."""
        layer = _Row(
            in_dim, out_dim, config=self.megatron, init_method=nn.init.zeros_, bias=True,
            input_is_parallel=True, skip_bias_add=False,
        )  # fmt: skip
        layer.attach(self, in_dim // self.ranks.tensor.size, out_dim, 1, family)
        return layer

    def split_tokens(self, hidden_LBD: Tensor) -> Tensor:
        """This tensor rank's share of the tokens, if they are shared; else all of them."""
        if not self.sequence:
            return hidden_LBD
        return mappings.scatter_to_sequence_parallel_region(hidden_LBD)  # type: ignore[no-any-return]

    def gather_tokens(self, hidden_LBD: Tensor) -> Tensor:
        """Inverse of split_tokens, for a result that every tensor rank then uses alike."""
        if not self.sequence:
            return hidden_LBD
        return mappings.gather_from_sequence_parallel_region(  # type: ignore[no-any-return]
            hidden_LBD, tensor_parallel_output_grad=False
        )

    def share_input(self, x_LBD: Tokens) -> Tokens:
        """What several column layers take at once; they are then told that it is `shared`."""
        return _share_input(x_LBD, self.ranks.tensor, sequence=self.sequence)

    def gather_context(self, x_LBD: Tensor) -> Tensor:
        """All tokens of a pass, from the context ranks' shares; backward keeps the own share."""
        axis = self.ranks.context
        if axis.size == 1:
            return x_LBD
        return mappings.gather_from_sequence_parallel_region(  # type: ignore[no-any-return]
            x_LBD, tensor_parallel_output_grad=False, group=axis.group
        )

    def sum_features(self, x: Tensor) -> Tensor:
        """Sum over the tensor ranks of a statistic of sharded features; backward sums too."""
        axis = self.ranks.tensor
        if axis.size == 1:
            return x
        return mappings.copy_to_tensor_model_parallel_region(  # type: ignore[no-any-return]
            mappings.reduce_from_tensor_model_parallel_region(x, axis.group), axis.group
        )

    def all_to_all(self, x: Tensor) -> Tensor:
        """Exchange equal dim-0 parts between the context ranks."""
        return mappings.all_to_all(self.ranks.context.group, x)  # type: ignore[no-any-return]


def check_layout(model: ModelConfig, parallel: ParallelConfig, block_frames: int = 3) -> None:
    """Raise ValueError unless heads and tokens divide over the model ranks."""
    share = parallel.tensor * parallel.context
    if model.num_heads % share:
        raise ValueError(
            f"model.num_heads {model.num_heads} does not divide by parallel.tensor x "
            f"parallel.context = {share}"
        )
    if model.ffn_dim % parallel.tensor:
        raise ValueError(
            f"model.ffn_dim {model.ffn_dim} does not divide by parallel.tensor {parallel.tensor}"
        )
    parts = parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)
    tokens = block_frames * model.tokens_per_frame
    if tokens % parts:
        raise ValueError(
            f"a block's {tokens} tokens do not divide over context x sequence = {parts} ranks"
        )
    if parallel.sequence_parallel and model.text_length % parallel.tensor:
        raise ValueError(
            f"model.text_length {model.text_length} does not divide by parallel.tensor "
            f"{parallel.tensor}, as sequence parallelism needs"
        )


class AdaptedLinear(nn.Module):
    """A linear layer's product, with the active adapter's. Mixed into Megatron's classes.

    Megatron makes and marks the parameters; what travels between the ranks is said below.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    adapter: Adapter | None

    def attach(self, spec: Spec, in_dim: int, out_dim: int, partition: int, family: str) -> None:
        """Give the layer, as Megatron has made it, its weight's forms and its adapter.

        `partition`: of the weight's two dimensions, the one that the tensor ranks share.
        """
        self._sequence, self._axis, self._partition = spec.sequence, spec.ranks.tensor, partition
        mark_sharded(self.weight, partition)  # Megatron does so only where it initialises
        scaling = spec.scaling if family in spec.eight_bits else None
        if scaling is not None:
            check_sizes(out_dim, in_dim)
        merges = len(spec.switch.adapters) if spec.merges else None
        self._held = Weight(self.weight, scaling, merges, spec.dtype if spec.masters else None)
        self.adapter = None
        if spec.lora is not None:
            rank, alpha = spec.lora
            self.adapter = Adapter(
                in_dim, out_dim, rank, alpha, partition, sequence=spec.sequence,
                dtype=self.weight.dtype,
            ).to(spec.ranks.device)  # fmt: skip
            spec.switch.adapters.append(self.adapter)
            self.adapter.chosen = self._held.merge

    def prepare(self) -> None:
        """On a GPU: let B stand in the margin of the weight, whose memory and type are final."""
        sums = self._held.scaling is None or self._held.merges is not None
        if self.adapter is not None and self.weight.is_cuda and sums:
            rank = next(iter(self.adapter.lora_A.values())).shape[0]
            self.adapter.place_up(self._held.make_margin(rank))

    @property
    def form(self) -> Form:
        """How whoever makes this layer's input should leave it, where tokens are not exchanged."""
        if self._sequence:
            return Form()
        acts, held = self.adapter is not None and self.adapter.acting is not None, self._held
        if held.scaling == "row" and (held.merges is None or held.acts_merged):
            return Form(eight_bits=True, whole=acts and not held.acts_merged)
        room = acts and not held.acts_merged and without_graph(self.weight)
        return Form(margin=held.margin) if room else Form()

    def product(
        self, x: Tokens, bias: Tensor | None, gelu: Form | None = None,
        known: Results | None = None,
    ) -> Any:  # fmt: skip
        """This rank's part. Under sequence parallelism Megatron sums the adapter's gradients."""
        group = None if self._sequence or self._axis.size == 1 else self._axis.group
        bias = None if bias is None else self._held.cast(bias)
        return product(
            x, self._held, bias, self.adapter, gelu=gelu, partition=self._partition, group=group,
            known=known,
        )  # fmt: skip


def prepare(model: nn.Module) -> None:
    """Once a model's parameters have their device and type: ready its linear layers for it."""
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.prepare()


class _Column(AdaptedLinear, ColumnParallelLinear):  # type: ignore[misc]
    """Its input is made whole here, once for weight and adapter, and once for several layers."""

    def forward(self, x: Tokens, *, shared: bool = False, gelu: Form | None = None) -> Any:
        """`shared`: x comes from Spec.share_input. `gelu`: apply it, and leave it in this form."""
        if not shared:
            x = _share_input(x, self._axis, sequence=self._sequence)
        return self.product(x, self.bias, gelu)


class _Row(AdaptedLinear, RowParallelLinear):  # type: ignore[misc]
    """Weight and adapter are summed over the ranks together."""

    def forward(self, x: Tokens, *, kind: str = "") -> Tensor:
        """`kind`: of results, by which a block may hold this one: see held.py."""
        known = taken(kind)
        if self._axis.size == 1:
            whole = self.product(x, self.bias, known=known)
        elif known is None:
            whole = self._summed(self.product(x, None))
        else:
            assert isinstance(x, Tensor)
            whole = self._graph_of_sum(x, known)
        if known is None:
            keep(kind, (whole,))
        return whole if self._axis.size == 1 else whole + self._held.cast(self.bias)  # type: ignore[no-any-return]

    def _summed(self, part: Tensor) -> Tensor:
        """Over the tensor ranks, each of which has its tokens or all."""
        group = self._axis.group
        if self._sequence:
            return mappings.reduce_scatter_to_sequence_parallel_region(part, group=group)  # type: ignore[no-any-return]
        return mappings.reduce_from_tensor_model_parallel_region(part, group)  # type: ignore[no-any-return]

    def _graph_of_sum(self, x: Tensor, known: Results) -> Tensor:
        """The sum as it is known, and its graph: nothing is multiplied, nothing travels."""
        assert known[0] is not None
        unread = known[0].new_empty(*x.shape[:-1], known[0].shape[-1])
        part = self.product(x, None, known=(unread,))
        return _Summed.apply(part, known, self._axis.group if self._sequence else None)  # type: ignore[no-untyped-call, no-any-return]


class _Summed(torch.autograd.Function):
    """A sum over the tensor ranks that is known. Backward is that of Megatron's."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, known: Results, group: dist.ProcessGroup | None) -> Any:
        ctx.group = group
        return known[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.group is not None:
            grad = mappings.gather_from_sequence_parallel_region(
                grad, tensor_parallel_output_grad=False, group=ctx.group
            )
        return grad, None, None


def _share_input(x_LBD: Tokens, axis: Axis, *, sequence: bool) -> Tokens:
    """All tokens on every tensor rank; backward sums the ranks' gradients of each."""
    if axis.size == 1 or isinstance(x_LBD, EightBits):
        return x_LBD
    if sequence:
        return mappings.gather_from_sequence_parallel_region(  # type: ignore[no-any-return]
            x_LBD, tensor_parallel_output_grad=True, group=axis.group
        )
    return mappings.copy_to_tensor_model_parallel_region(x_LBD, axis.group)  # type: ignore[no-any-return]
