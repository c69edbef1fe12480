"""The seam to Megatron's layers: which classes the blocks are built from, and token splits.

One spec so far, Megatron's own linear layers; a Transformer Engine spec takes the same calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, mappings
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_kvpo.config import ModelConfig, ParallelConfig, PolicyConfig
from megatron_kvpo.model.lora import Adapter, Switch, mark_sharded
from megatron_kvpo.parallel.groups import Axis, Ranks


def transformer_config(model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """What Megatron's layers and optimizer need to know of the model."""
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_dim,
        num_attention_heads=model.num_heads,
        ffn_hidden_size=model.ffn_dim,
        tensor_model_parallel_size=parallel.tensor,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=model.torch_dtype,
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

    @staticmethod
    def build(
        model: ModelConfig, parallel: ParallelConfig, ranks: Ranks, policy: PolicyConfig | None
    ) -> Spec:
        """Spec of a model that trains by `policy`; None builds bare layers, for pre-training."""
        check_layout(model, parallel)
        lora = None
        if policy is not None and policy.mode == "lora":
            lora = (policy.lora_rank, policy.lora_alpha)
        return Spec(transformer_config(model, parallel), ranks, Switch(), lora)

    @property
    def sequence(self) -> bool:
        """Whether tokens are shared over the tensor ranks between linear layers."""
        return bool(self.megatron.sequence_parallel)

    def column(self, in_dim: int, out_dim: int) -> nn.Module:
        """Linear whose output features are shared over the tensor ranks."""
        layer = _Column(
            in_dim, out_dim, config=self.megatron, init_method=nn.init.zeros_, bias=True
        )
        layer.attach(self, in_dim, out_dim // self.ranks.tensor.size, partition=0)
        return layer

    def row(self, in_dim: int, out_dim: int) -> nn.Module:
        """Linear whose input features are shared over the tensor ranks."""
        layer = _Row(
            in_dim, out_dim, config=self.megatron, init_method=nn.init.zeros_, bias=True,
            input_is_parallel=True, skip_bias_add=False,
        )  # fmt: skip
        layer.attach(self, in_dim // self.ranks.tensor.size, out_dim, partition=1)
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

    def gather_input(self, x_LBD: Tensor) -> Tensor:
        """All tokens for several column layers at once, which are then told that they have them."""
        return _gather_input(x_LBD, self.ranks.tensor) if self.sequence else x_LBD

    def local_tokens(self, x_LB: Tensor) -> Tensor:
        """split_tokens for what every rank computes alike: no gradient travels between ranks.

        Parameters behind it see their own tokens only and are marked so.
        """
        if not self.sequence:
            return x_LB
        return x_LB.chunk(self.ranks.tensor.size)[self.ranks.tensor.rank]

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


class _Adapted(nn.Module):
    """Adds the active adapter's output to a linear layer's. Mixed into Megatron's classes."""

    weight: nn.Parameter
    adapter: Adapter | None

    def attach(self, spec: Spec, in_dim: int, out_dim: int, partition: int) -> None:
        self._switch, self._sequence, self._axis = spec.switch, spec.sequence, spec.ranks.tensor
        mark_sharded(self.weight, partition)  # Megatron does so only where it initialises
        self.adapter = None
        if spec.lora is not None:
            rank, alpha = spec.lora
            self.adapter = Adapter(
                in_dim, out_dim, rank, alpha, partition, sequence=spec.sequence
            ).to(spec.ranks.device)

    def acting(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, float] | None:
        """A, B and scale of the adapter that acts, if one does."""
        slot = self._switch.slot
        if self.adapter is None or slot is None:
            return None
        down, up = self.adapter.lora_A[slot], self.adapter.lora_B[slot]
        return down.to(dtype), up.to(dtype), self.adapter.scale


class _Column(_Adapted, ColumnParallelLinear):  # type: ignore[misc]
    """Under sequence parallelism its input is gathered here, once for weight and adapter.

    What goes back to the input is then each rank's part, and so is the gradient of A, which
    Megatron sums over the tensor ranks.
    """

    def attach(self, spec: Spec, in_dim: int, out_dim: int, partition: int) -> None:
        super().attach(spec, in_dim, out_dim, partition)
        if spec.sequence:  # leave the tokens to us
            self.sequence_parallel = self.allreduce_dgrad = False
            self.disable_grad_reduce = True

    def forward(self, x: Tensor, *, gathered: bool = False) -> Tensor:
        if self._sequence and not gathered:
            x = _gather_input(x, self._axis)
        out, _ = super().forward(x)
        found = self.acting(x.dtype)
        if found is None:
            return out  # type: ignore[no-any-return]
        down, up, scale = found
        narrow = nn.functional.linear(x, down)
        if self._axis.size > 1 and not self._sequence:
            narrow = mappings.copy_to_tensor_model_parallel_region(narrow, self._axis.group)
        return torch.add(out, nn.functional.linear(narrow, up), alpha=scale)


class _Row(_Adapted, RowParallelLinear):  # type: ignore[misc]
    """Under sequence parallelism weight and adapter are summed over the ranks together."""

    def forward(self, x: Tensor) -> Tensor:
        found = self.acting(x.dtype)
        if found is None:
            return super().forward(x)[0]  # type: ignore[no-any-return]
        down, up, scale = found
        narrow = nn.functional.linear(x, down)
        if self._sequence:
            part = nn.functional.linear(x, self.weight)
            part = torch.add(part, nn.functional.linear(narrow, up), alpha=scale)
            whole = mappings.reduce_scatter_to_sequence_parallel_region(
                part, group=self._axis.group
            )
            return whole + self.bias  # type: ignore[no-any-return]
        if self._axis.size > 1:
            narrow = mappings.reduce_from_tensor_model_parallel_region(narrow, self._axis.group)
        out, _ = super().forward(x)
        return torch.add(out, nn.functional.linear(narrow, up), alpha=scale)


def _gather_input(x_LBD: Tensor, axis: Axis) -> Tensor:
    """All tokens, from the tensor ranks' shares; backward sums the ranks' gradients of each."""
    return mappings.gather_from_sequence_parallel_region(  # type: ignore[no-any-return]
        x_LBD, tensor_parallel_output_grad=True, group=axis.group
    )
