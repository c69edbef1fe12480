"""The policies of a run on one set of weights: current, old, reference and ema."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_kvpo.checkpoint.adapters import load_adapter
from megatron_kvpo.checkpoint.convert import load_base
from megatron_kvpo.checkpoint.state import shard_parameters
from megatron_kvpo.config import RunConfig
from megatron_kvpo.model.causal_wan import CausalWan, serves_text
from megatron_kvpo.model.lora import AdapterBank, FullBank
from megatron_kvpo.model.specs import Spec
from megatron_kvpo.model.weights import initialise, initialise_adapters
from megatron_kvpo.parallel.groups import Ranks
from megatron_kvpo.stopwatch import stage
from megatron_kvpo.training.optimizer import Optimizer, build_optimizer

WEIGHTS = ("model", "slots")
"""The parts of a policy's state that hold weights."""


class Policy:
    """A model, its four slots of weights and the optimizer of the current one."""

    def __init__(
        self, model: CausalWan, bank: AdapterBank | FullBank, optimizer: Optimizer,
        config: RunConfig,
    ) -> None:  # fmt: skip
        self.model, self.bank, self.optimizer, self._config = model, bank, optimizer, config

    @staticmethod
    def build(config: RunConfig, ranks: Ranks, *, on_device: bool = False) -> Policy:
        """Model from config.model.weights (random if None), fresh optimizer, slots all equal.

        They start at config.policy.adapter; without one they act as the base does. `on_device`:
        draw random weights there, which is fast, and not the same everywhere.
        """
        spec = Spec.build(config.model, config.parallel, ranks, config.policy)
        model = CausalWan(config.model, spec)
        if config.model.weights is None:
            initialise(model, config.seed, on_device=on_device)
        else:
            load_base(model, config.model.weights)
        lora = config.policy.mode == "lora"
        if lora:
            initialise_adapters(model, config.seed, on_device=on_device)
            if config.policy.adapter is not None:
                load_adapter(model, config.policy.adapter)
        optimizer = build_optimizer(model, model.config, config.optimizer, ranks, serves_text)
        bank = AdapterBank(model, spec.switch) if lora else FullBank(model)  # after values moved
        return Policy(model, bank, optimizer, config)

    @contextlib.contextmanager
    def acting(self, slot: str) -> Iterator[CausalWan]:
        """The model with the weights of `slot`."""
        with self.bank.use(slot):
            yield self.model

    def is_synced(self, update: int) -> bool:
        """Whether the sampling policy is the current one at the start of `update`."""
        return update % self._config.policy.rollouts_per_policy_sync == 0

    def sync_old(self, update: int) -> None:
        """Every rollouts_per_policy_sync updates: old <- current."""
        if self.is_synced(update):
            self.bank.copy("current", "old")

    def step(self, update: int) -> float:
        """Apply the reduced gradients; ema <- decay ema + (1 - decay) current. Gradient norm."""
        config = self._config
        scale = 1 - update / config.num_updates if config.optimizer.decay == "linear" else 1.0
        with stage("step"):
            norm = self.optimizer.step(update, scale)
            self.bank.blend("current", "ema", config.optimizer.ema_decay)
        return norm

    def trained(self) -> dict[str, Tensor]:
        """The parameters of the current policy that train, by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def sharded_state(self) -> dict[str, Any]:
        """Everything a resumed run needs of the policy, as Megatron's sharded tensors."""
        ranks = self.model.spec.ranks
        model = shard_parameters(dict(self.model.named_parameters()), ranks)
        state = {"model": model, "optimizer": self.optimizer.sharded_state_dict(model)}
        if isinstance(self.bank, FullBank):
            state["slots"] = shard_parameters(
                {f"slots.{name}": p for name, p in self.bank.named_parameters()}, ranks
            )
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Take what was loaded into `sharded_state`. Weights were filled in place."""
        self.load_weights(state)
        self.optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def load_weights(self, state: dict[str, Any]) -> None:
        """Take the parts WEIGHTS of what was loaded, and leave the optimizer as it is."""
        own = dict(self.model.named_parameters())
        for name, value in state["model"].items():
            own[name].copy_(value)
        if isinstance(self.bank, FullBank):
            held = {f"slots.{name}": p for name, p in self.bank.named_parameters()}
            for name, value in state["slots"].items():
                held[name].copy_(value)
