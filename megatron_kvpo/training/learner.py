"""A model in pre-training: its weights, their average, the optimizer, and one step of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_kvpo.checkpoint.adapters import load_adapter, save_adapter
from megatron_kvpo.checkpoint.convert import load_base
from megatron_kvpo.checkpoint.state import shard_parameters
from megatron_kvpo.model.causal_wan import CausalWan
from megatron_kvpo.model.lora import AdapterBank, mark_sharded, partition_of
from megatron_kvpo.model.specs import Spec
from megatron_kvpo.model.weights import initialise, initialise_adapters, save_weights
from megatron_kvpo.parallel.collect import mean_over
from megatron_kvpo.parallel.groups import Ranks
from megatron_kvpo.records import LatentBatch
from megatron_kvpo.stopwatch import stage
from megatron_kvpo.training.forcing import Forcing
from megatron_kvpo.training.optimizer import build_optimizer
from megatron_kvpo.training.pretrain_config import PretrainConfig


class Average:
    """Exponential moving average of what trains."""

    def __init__(
        self, live: Mapping[str, nn.Parameter], model: nn.Module, decay: float
    ) -> None:  # fmt: skip
        """Adapters are averaged into their `ema` slot, other weights into copies; decay 0: none."""
        self._decay, own = decay, dict(model.named_parameters())
        averaged = live if decay else {}
        self._live: list[Tensor] = list(averaged.values())
        self.twins: dict[str, Tensor] = {}
        """By the names that a checkpoint has them under."""

        for name, parameter in averaged.items():
            twin = _twin_name(name)
            self.twins[twin] = own[twin] if twin in own else _twin(parameter)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the current weights in; early on the average is shorter."""
        keep = min(self._decay, (1 + step) / (10 + step))
        if self.twins:
            torch._foreach_lerp_([*self.twins.values()], self._live, 1 - keep)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the live weights and the average."""
        for live, mean in zip(self._live, self.twins.values(), strict=True):
            held = live.detach().clone()
            live.copy_(mean)
            mean.copy_(held)


def _twin_name(name: str) -> str:
    """As in a KVPO run's checkpoint, whose readers ask for slot `ema`."""
    if ".adapter." in name:
        return f"{name.removesuffix('.current')}.ema"
    return f"slots.slots.ema.{name.replace('.', '/')}"


def _twin(parameter: nn.Parameter) -> nn.Parameter:
    twin = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    dim = partition_of(parameter)
    if dim is not None:
        mark_sharded(twin, dim)
    return twin


class Learner:
    """Everything of a pre-training run that changes with its steps."""

    def __init__(self, config: PretrainConfig, model: CausalWan, empty_XD: Tensor) -> None:
        """`empty_XD`: see Forcing. The model is initialised, and says what trains."""
        self.config, self.model, self.ranks = config, model, model.spec.ranks
        self.forcing = Forcing(config, model, empty_XD)
        self.optimizer = build_optimizer(model, model.config, config.optimizer, self.ranks)
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.average = Average(self.trained, model, config.fitting.ema_decay)
        self._bank = AdapterBank(model, model.spec.switch) if model.spec.lora else None

    @staticmethod
    def build(
        config: PretrainConfig, ranks: Ranks, empty_XD: Tensor, *, on_device: bool = False
    ) -> Learner:
        """Weights from model.weights, or random ones; `on_device` as in Policy.build."""
        policy = config.trained.policy
        spec = Spec.build(config.model, config.parallel, ranks, policy, masters=policy is None)
        model = CausalWan(config.model, spec)
        if config.model.weights is None:
            initialise(model, config.seed, on_device=on_device)
        else:
            load_base(model, config.model.weights)
        if policy is not None:
            initialise_adapters(model, config.seed, on_device=on_device)
            if policy.adapter is not None:
                load_adapter(model, policy.adapter)
        return Learner(config, model, empty_XD)

    def acting(self) -> AbstractContextManager[None]:
        """With the weights as they are now: adapters are readied when their slot is chosen."""
        return nullcontext() if self._bank is None else self._bank.use("current")

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """With the average in the place of the live weights."""
        self.average.swap()
        try:
            with self.acting():
                yield
        finally:
            self.average.swap()

    def train_step(self, batch: LatentBatch, step: int, *, own: bool, scale: float) -> Tensor:
        """One update on this data rank's share of a global batch. `own`: with own estimates.

        Returns:
            This rank's loss, so that the mean over data ranks is the batch's.
        """
        fitting, size = self.config.fitting, len(batch.latent_BFCHW)
        self.optimizer.zero_grad()
        rows = self.forcing.rows(batch, step, self.ranks.data.rank * size, own=own)
        frames = mean_over(rows.inside_BF.sum(), self.ranks.data)
        at_once, total = fitting.micro_rows or size, torch.zeros((), device=self.ranks.device)
        device = self.ranks.device.type
        with self.acting(), stage("forward and backward"):
            for first in range(0, size, at_once):
                part = rows.part(slice(first, first + at_once))
                with torch.autocast(device, torch.bfloat16, fitting.autocast):
                    loss = self.forcing.loss_sum(part, own=own) / frames
                if first + at_once >= size:
                    self.optimizer.last_pass()
                (self.optimizer.loss_scale * loss).backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
        with stage("step"):
            self.optimizer.finalize()
            self.optimizer.step(step, scale=scale)
            self.average.update(step)
        return total

    def sharded_state(self) -> dict[str, Any]:
        """What a resumed run needs of it, as Megatron's sharded tensors.

        A frozen base is not in it: model.weights holds that.
        """
        weights = shard_parameters(self.trained, self.ranks)
        sizes, trained = self.config.model, self.config.trained
        facts = {"heads": sizes.num_heads, "layers": sizes.num_layers, "alpha": trained.lora_alpha}
        return {
            "model": weights, "optimizer": self.optimizer.sharded_state_dict(weights),
            "average": shard_parameters(self.average.twins, self.ranks), "weights": facts,
        }  # fmt: skip

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Take what was loaded into `sharded_state`."""
        for name, value in state["model"].items():
            self.trained[name].copy_(value)
        for name, twin in self.average.twins.items():
            twin.copy_(state["average"][name])
        self.optimizer.load_state_dict(state["optimizer"])

    def export(self, folder: Path, note: dict[str, str]) -> Path:
        """Write the averaged weights in bfloat16, or the averaged adapter for PEFT. Collective."""
        with self.averaged():
            if self._bank is not None:
                save_adapter(self.model, "current", folder / "adapter")
                return folder / "adapter"
            path = folder / "transformer.safetensors"
            save_weights(self.model, path, torch.bfloat16, note)
            return path
