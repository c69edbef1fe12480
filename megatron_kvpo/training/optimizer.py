"""AdamW over Megatron's gradient buffers: one update is reduced, checked, clipped and applied here.

optimizer.zero_grad()
for part in parts:
    if part is parts[-1]:
        optimizer.last_pass()
    (optimizer.loss_scale * loss(part)).backward()
optimizer.finalize()
optimizer.step(update)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_kvpo.config import OptimizerConfig
from megatron_kvpo.parallel.collect import all_equal
from megatron_kvpo.parallel.groups import Ranks
from megatron_kvpo.training.overlap import LateFirst, OverlappedReduction
from megatron_kvpo.training.shared_moments import SharedMoments

_log = logging.getLogger(__name__)


def build_optimizer(
    model: nn.Module, transformer_config: Any, config: OptimizerConfig, ranks: Ranks,
    late: Callable[[str], bool] = lambda name: False,
) -> Optimizer:  # fmt: skip
    """Put the model's trainable parameters into Megatron's gradient buffers and AdamW.

    Args:
        model: its parameters with requires_grad are trained, float32, for the optimizer's life:
            change their values in place and never rebind `.data`. With config.distributed their
            values move into a buffer: what keeps a `.data` of them is built afterwards.
        transformer_config: Megatron's TransformerConfig, the model's own.
        config: learning rate, decay, clipping. Decay is decoupled and falls on every parameter.
        ranks: who holds replicas.
        late: whether the parameter of a name gets its gradient after all others.

    Raises:
        ValueError: nothing is trainable, or a trainable parameter is not float32.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer

    _check_trainable(model)
    with torch.enable_grad():  # the wrapper finds each parameter's gradient node by using it once
        wrapped = DistributedDataParallel(
            transformer_config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, overlap_grad_reduce=True,
                bucket_size=math.ceil(config.bucket_mib * 2**18),  # in numbers of four bytes
                use_distributed_optimizer=config.distributed,
            ),
            LateFirst(model, late),
        )  # fmt: skip
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=0.0,
        weight_decay=config.weight_decay,
        decoupled_weight_decay=True,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.grad_clip,
        params_dtype=torch.float32,
        use_distributed_optimizer=config.distributed,
    )
    # An empty table of overrides: by default Megatron spares biases and vectors the decay.
    with torch.no_grad():  # shares of parameters are leaves then
        inner = get_megatron_optimizer(
            megatron_config, [wrapped], config_overrides={}, use_gloo_process_groups=False
        )
    optimizer = Optimizer(wrapped, inner, config, ranks)
    _log.info("optimizer is %s on %d tensors", optimizer.name, len(optimizer.parameters))
    return optimizer


def _check_trainable(model: nn.Module) -> None:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(
            "the model has 0 trainable parameters: set requires_grad on the adapter or the weights"
        )
    wrong = [f"{name} {p.dtype}" for name, p in trainable.items() if p.dtype != torch.float32]
    if wrong:
        raise ValueError(
            f"{len(wrong)} trainable parameters are not float32 (first: {wrong[:3]}): keep what "
            "trains in float32 and freeze the rest"
        )


class Optimizer:
    """What build_optimizer returns. Gradients add up over backward passes until `step`."""

    def __init__(self, wrapped: Any, inner: Any, config: OptimizerConfig, ranks: Ranks) -> None:
        self._wrapped = wrapped
        self._inner = inner
        self._config = config
        self._ranks = ranks
        self._reduced = self._any = False
        self._held: list[Tensor] = []
        self._reduction = OverlappedReduction(wrapped)
        self._reduction.reset()
        self._prime()
        self._shared: SharedMoments | None = None
        if config.distributed:
            (buffer,) = wrapped.buffers  # one, as all parameters are float32
            self._shared = SharedMoments(buffer, inner.optimizer)
        self.gradient_norm = math.nan
        """Norm over all ranks' shares at the last step, before clipping. NaN before the first."""

    @property
    def loss_scale(self) -> float:
        """Factor for every loss: ranks.branch.size x ranks.context.size.

        Megatron averages gradients over branch, data and context ranks. The terms of a loss that
        branch ranks hold, and the tokens that context ranks hold, are parts of one sum; only data
        ranks hold samples of a mean. Multiplying by the two sizes makes up for it.
        """
        return float(self._ranks.branch.size * self._ranks.context.size)

    @property
    def name(self) -> str:
        """Class of the AdamW in use: fused where Transformer Engine or Apex is there."""
        kind = type(self._inner.optimizer)
        return f"{kind.__module__.split('.')[0]} {kind.__name__}"

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in the optimizer's order."""
        return [p for p in self._wrapped.module.parameters() if p.requires_grad]

    def zero_grad(self) -> None:
        """Start an update: forget all gradients."""
        self._wrapped.zero_grad_buffer()
        self._inner.zero_grad(set_to_none=True)
        self._reduction.reset()
        self._reduced = self._any = False

    @contextmanager
    def part(self) -> Iterator[None]:
        """Sum the backward passes inside by themselves, then add that to what there is.

        So a sum over groups has the same bits whether one rank has them or several. RuntimeError
        after `last_pass`.
        """
        if self._reduction.armed:
            raise RuntimeError("last_pass was called: no part of this update may follow")
        sums = [buffer.grad_data for buffer in self._wrapped.buffers] if self._any else []
        self._held = [total.clone() for total in sums]
        for total in sums:
            total.zero_()
        yield
        if not self._reduction.armed:  # else each bucket gets its own before it goes
            for total, held in zip(sums, self._held, strict=True):
                total.add_(held)
        self._held = []
        self._any = True

    def last_pass(self) -> None:
        """Say, before it, that the next backward pass is this rank's last of the update.

        A bucket of gradients is then averaged, in the background, as soon as each of its parameters
        has got one. What makes the pass's graph may be cut in two, if no parameter is in both.
        Without this call all buckets wait for `reduce`. RuntimeError from the backward pass if a
        gradient comes too late for its bucket.
        """
        self._reduction.arm(self._held)

    def reduce(self) -> None:
        """Average the rest in the background: no backward pass will come in this update.

        Call it before other collectives between replicas: all ranks then do theirs in one order.
        """
        self._reduction.start()

    def finalize(self) -> None:
        """Average the gradients over replicas. Once per update, after the last backward.

        With optimizer.distributed each rank gets the averages of its own share only.
        """
        from megatron.core.distributed import finalize_model_grads

        if self._reduced:
            raise RuntimeError("the gradients are reduced already: call zero_grad for a new update")
        self.reduce()
        finalize_model_grads([self._wrapped])
        self._reduced = True

    def check_gradients_equal(self) -> float:
        """Largest difference of the reduced gradients between replicas; 0.0 if all bits agree.

        With optimizer.distributed a reduced gradient is on one rank only, and nothing is there to
        compare it with. The weights that it was taken at are compared instead: every rank has
        them, and if they agree now, one gather after each step keeps them so.

        Bits that differ without a numerical difference (0.0 and -0.0) count as the smallest
        positive float. Collective; call it between `finalize` and `step`.
        """
        largest = 0.0
        for buffer in self._wrapped.buffers:
            compared = buffer.param_data if self._config.distributed else buffer.grad_data
            for axis in (self._ranks.replicas, self._ranks.context):
                equal, difference = all_equal(compared, axis)
                largest = max(largest, difference, 0.0 if equal else math.ulp(0.0))
        return largest

    def step(self, update: int, scale: float = 1.0) -> float:
        """Apply the reduced gradients as update number `update`, counted from 0.

        The learning rate is lr x min(1, (update + 1) / warmup_updates) x `scale`.

        Returns:
            The gradient norm before clipping; the same on every rank of a replica.

        Raises:
            RuntimeError: `finalize` was not called.
            ValueError: a gradient is not finite. No weight has changed, and every rank raises.
        """
        if not self._reduced:
            raise RuntimeError("the gradients are not reduced: call finalize before step")
        self._inner.prepare_grads()
        norm = float(self._inner.get_grad_norm())
        self.gradient_norm = norm
        if not math.isfinite(norm):
            self._inner.zero_grad(set_to_none=True)
            raise ValueError(
                f"update {update} has gradient norm {norm}: no weight was changed. Look at the "
                "loss and the rewards of this update, or lower optimizer.lr"
            )
        warm = min(1.0, (update + 1) / max(1, self._config.warmup_updates))
        rate = self._config.lr * warm * scale
        for group in self._inner.param_groups:
            group["lr"] = rate
        self._inner.step()
        self._inner.zero_grad(set_to_none=True)
        self._reduced = False
        return norm

    def sharded_state_dict(self, model_sharded: dict[str, Any]) -> dict[str, Any]:
        """Moments and step count as Megatron's sharded tensors, to save or to load into.

        The form does not tell whether ranks shared the moments: any number of ranks, sharing or
        not, reads it. If they do, whole moments are gathered in host memory. Collective.
        `model_sharded` is the model's sharded state dict with the parameters themselves as data
        (state_dict with keep_vars). ValueError from Megatron if it lacks a trained parameter.
        """
        if self._shared is None:
            sharded: dict[str, Any] = self._inner.sharded_state_dict(model_sharded)
            return sharded
        from megatron.core.dist_checkpointing import optimizer as sharding

        moments = self._shared.whole(self.parameters)
        (group,) = self._inner.param_groups
        state = dict(enumerate(moments))
        sharded = {"state": state, "param_groups": [{**group, "params": list(state)}]}
        sharding.optim_state_to_sharding_state(
            sharded, sharding.get_param_id_to_sharded_param_map(model_sharded, self.parameters)
        )
        steps = [held["step"] for held in self._inner.optimizer.state.values() if "step" in held]
        if steps and steps[0]:
            sharded["state"]["common_step"] = steps[0]
        return sharded

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what was loaded into `sharded_state_dict`.

        Moments and step count come from `state`; learning rate, betas, eps and decay stay those of
        this run's config.
        """
        moments = dict(state["state"])
        if self._counts_per_tensor:  # Megatron omits the count of a run that has not stepped yet
            moments.setdefault("common_step", torch.tensor(0.0))
        if self._shared is not None:
            self._take_shares(moments, state["param_groups"])
            return
        own_groups = self._inner.param_groups
        groups = [
            {**saved, **{k: v for k, v in own.items() if k not in ("params", "step")}}
            for saved, own in zip(state["param_groups"], own_groups, strict=True)
        ]
        self._inner.load_state_dict({**state, "state": moments, "param_groups": groups})

    def _take_shares(self, moments: dict[Any, Any], groups: list[dict[str, Any]]) -> None:
        """Keep this rank's shares of whole moments, and the step count."""
        assert self._shared is not None
        step = moments.pop("common_step", None)
        self._shared.take(self.parameters, [moments[i] for i in range(len(moments))])
        if self._counts_per_tensor:
            for state in self._inner.optimizer.state.values():
                state["step"] = step.clone()  # each its own: a step raises every one
        for saved, own in zip(groups, self._inner.param_groups, strict=True):
            if "step" in saved:
                own["step"] = saved["step"]

    @property
    def _counts_per_tensor(self) -> bool:
        """Torch's AdamW counts steps per tensor, fused ones per group."""
        return isinstance(self._inner.optimizer, torch.optim.AdamW)

    def _prime(self) -> None:
        """Make the moments now, all zero: a checkpoint is loaded into them before any step."""
        for part in self._inner.chained_optimizers:
            part.init_state_fn(part.optimizer, part.config)
        if self._counts_per_tensor:
            for state in self._inner.optimizer.state.values():
                state["step"] = torch.tensor(0.0)
