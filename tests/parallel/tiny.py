"""A model of two tensor-parallel layers, a replicated vector and a frozen one, for the optimizer's
and the checkpoint's tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_kvpo.config import OptimizerConfig
from megatron_kvpo.parallel.collect import share_of
from megatron_kvpo.parallel.groups import Ranks
from megatron_kvpo.parallel.seeds import noise

IN, HIDDEN, SAMPLES = 4, 6, 4
CONFIG = OptimizerConfig(lr=0.05, weight_decay=0.1, warmup_updates=3, grad_clip=0.5)


def whole_weights(seed: int) -> dict[str, Tensor]:
    """The unsharded initial weights."""
    return {
        "up.weight": noise((HIDDEN, IN), "up", seed),
        "up.bias": noise((HIDDEN,), "up bias", seed),
        "down.weight": noise((IN, HIDDEN), "down", seed),
        "scale": noise((IN,), "scale", seed),
        "frozen": noise((IN,), "frozen", seed),
    }


class Tiny(nn.Module):
    def __init__(self, ranks: Ranks, seed: int) -> None:
        super().__init__()
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
        from megatron.core.transformer import TransformerConfig

        self.ranks = ranks
        self.config = TransformerConfig(
            num_layers=1,
            hidden_size=IN,
            num_attention_heads=2,
            tensor_model_parallel_size=ranks.tensor.size,
            gradient_accumulation_fusion=False,
        )
        options = {"config": self.config, "init_method": nn.init.zeros_}
        self.up = ColumnParallelLinear(IN, HIDDEN, bias=True, gather_output=False, **options)
        self.down = RowParallelLinear(
            HIDDEN, IN, bias=False, input_is_parallel=True, skip_bias_add=False, **options
        )
        self.scale = nn.Parameter(torch.zeros(IN))
        self.frozen = nn.Parameter(torch.zeros(IN), requires_grad=False)
        rows = list(share_of(HIDDEN, ranks.tensor))
        whole = whole_weights(seed)
        whole["up.weight"], whole["up.bias"] = whole["up.weight"][rows], whole["up.bias"][rows]
        whole["down.weight"] = whole["down.weight"][:, rows]
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(whole[name])

    def forward(self, x_BD: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(x_BD[:, None])[0])
        return self.down(hidden)[0][:, 0] * self.scale + self.frozen

    def sharded(self) -> dict[str, Any]:
        from megatron.core import parallel_state
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        own = {"scale": self.scale, "frozen": self.frozen}
        return {
            **self.up.sharded_state_dict("up.", metadata={"dp_cp_group": replicas}),
            **self.down.sharded_state_dict("down.", metadata={"dp_cp_group": replicas}),
            **make_sharded_tensors_for_checkpoint(
                own, "", tp_group=self.ranks.tensor.group, dp_cp_group=replicas
            ),
        }


def sample_loss(model: Any, update: int, sample: int) -> Tensor:
    """Squared error on one sample, the same on any rank."""
    x, y = noise((1, IN), "x", update, sample), noise((1, IN), "y", update, sample)
    return (model(x) - y).square().sum()


def backward(model: Tiny, optimizer: Any, update: int) -> None:
    """Mean over data of sums over the other axes: this rank's samples, one backward each."""
    ranks = model.ranks
    for sample in own_samples(ranks):
        loss = sample_loss(model, update, sample) / (SAMPLES // ranks.data.size)
        (optimizer.loss_scale * loss).backward()


def own_samples(ranks: Ranks) -> list[int]:
    """Data ranks take contiguous shares of the samples, branch ranks of those, context ranks of
    those: their gradients, like those of tokens, are parts of one sum."""
    mine = list(share_of(SAMPLES, ranks.data))
    for axis in (ranks.branch, ranks.context):
        mine = [mine[i] for i in share_of(len(mine), axis)]
    return mine


def update_once(model: Tiny, optimizer: Any, update: int) -> float:
    optimizer.zero_grad()
    backward(model, optimizer, update)
    optimizer.finalize()
    return optimizer.step(update)


def weights(model: Tiny) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
