"""A whole run at a tiny size: its recipe, and the real loop with what it did written down."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from torch import Tensor

from megatron_kvpo import train as program
from megatron_kvpo.config import RunConfig, load_config
from megatron_kvpo.model.lora import FullBank, mark_sharded, partition_of
from megatron_kvpo.model.weights import whole_value
from megatron_kvpo.parallel.groups import Axis, stop_ranks
from megatron_kvpo.training.metrics import read_jsonl
from megatron_kvpo.training.policy import Policy
from megatron_kvpo.training.run import Run

# Switches before the fork (12), at it and inside the policy window [12, 18).
PROMPTS: tuple[dict[str, Any], ...] = (
    {"segments": ["a red square moves right"]},
    {"segments": ["a cyan circle falls", "it turns red"], "switch_frames": [6]},
    {"segments": ["a blue cross rises slowly", "it moves left"], "switch_frames": [12]},
    {"segments": ["a green square stays still", "it turns purple and falls"], "switch_frames": [15]},
)

RECIPE: dict[str, Any] = {
    "name": "run",
    "seed": 3,
    "device": "cpu",
    "num_updates": 3,
    "model": {"hidden_dim": 64, "ffn_dim": 96, "num_layers": 2, "num_heads": 4, "text_dim": 16,
              "text_length": 12, "latent_channels": 4, "latent_height": 8, "latent_width": 8,
              "sinusoid_dim": 32, "max_frames": 32},
    "codec": {"width": 16},
    "stream": {"num_frames": 18, "resident_frames": 18, "steps": [1.0, 0.75, 0.5]},
    "routing": {"num_branches": 4, "num_routed_blocks": 2, "fork_chunks": 1},
    "energy": {"grad_steps": 2},
    "advantage": {"baseline": "anchor", "std_floor": 1e-3},
    "optimizer": {"lr": 1e-2, "warmup_updates": 0, "ema_decay": 0.5},
    "policy": {"lora_rank": 4, "lora_alpha": 8, "groups_per_update": 2,
               "rollouts_per_policy_sync": 3},
    "reward": {"weights": {"visual_quality": 1.0, "text_alignment": 1.0}},
    "checkpoint": {"every": 0},
    "log": {"wandb": "disabled", "report": False},
}  # fmt: skip


def write_recipe(
    folder: Path, prompts: Sequence[dict[str, Any]] = PROMPTS, **sections: Any
) -> Path:
    """Write RECIPE with some sections' keys changed, and its prompts, into `folder`."""
    recipe = {key: dict(v) if isinstance(v, dict) else v for key, v in RECIPE.items()}
    recipe["folder"] = str(folder)
    recipe["data"] = {"prompts": str(folder / "prompts.jsonl")}
    for name, value in sections.items():
        recipe[name] = {**recipe.get(name, {}), **value} if isinstance(value, dict) else value
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def tiny_config(folder: Path, *overrides: str, **sections: Any) -> RunConfig:
    """The recipe of `write_recipe`, with dotted overrides."""
    return load_config(write_recipe(folder, **sections), list(overrides))


@dataclass
class Trace:
    """What one rank saw of a run."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    """Per update, whole tensors, reduced, before clipping."""

    start: dict[str, Tensor] = field(default_factory=dict)
    """Whole weights of all slots when the run had been built, or resumed."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    """And at the end."""

    moments: dict[str, Tensor] = field(default_factory=dict)
    """This rank's share of Adam's moments and its step counts, at the end."""

    first_update: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """Lines of metrics.jsonl; on the first rank only."""


def train_traced(config: RunConfig) -> Trace:
    """`train.train(config)`, watched. The ranks are left afterwards, whatever happens."""
    trace = Trace()
    start, step, log, finish = Run.start, Policy.step, Run.log, Run.finish

    def watched_start(config: RunConfig) -> Run:
        run = start(config)
        trace.first_update, trace.start = run.update, whole_weights(run.policy)
        return run

    def watched_step(policy: Policy, update: int) -> float:
        trace.gradients.append(whole_gradients(policy))
        trace.norms.append(step(policy, update))
        return trace.norms[-1]

    def watched_log(run: Run, update: int, *rest: Any) -> None:
        log(run, update, *rest)
        trace.losses.append(float(rest[3].loss))

    def watched_finish(run: Run, seconds_per_update: float) -> None:
        trace.weights, trace.moments = whole_weights(run.policy), moments(run.policy)
        free = run.stages.world.pool.num_free
        assert free == run.stages.world.pool.key.shape[1], f"only {free} pages were given back"
        finish(run, seconds_per_update)

    with (
        mock.patch.object(Run, "start", staticmethod(watched_start)),
        mock.patch.object(Policy, "step", watched_step),
        mock.patch.object(Run, "log", watched_log),
        mock.patch.object(Run, "finish", watched_finish),
        ranks_left(),
    ):
        program.train(config)
    path = config.run_folder / "metrics.jsonl"
    trace.metrics = read_jsonl(path) if path.is_file() else []
    return trace


@contextmanager
def ranks_left() -> Iterator[None]:
    """Leave the ranks even if a run stops half-way; one thread, as the ranks of a test have."""
    from megatron.core import parallel_state

    with mock.patch.dict("os.environ", OMP_NUM_THREADS="1"):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            if parallel_state.model_parallel_is_initialized():
                stop_ranks()


def whole_weights(policy: Policy) -> dict[str, Tensor]:
    """Every slot's weights and the frozen base's, not this rank's share of them. Collective."""
    axis = policy.model.spec.ranks.tensor
    held = dict(policy.model.named_parameters())
    if isinstance(policy.bank, FullBank):
        held |= dict(policy.bank.named_parameters())
    return {name: whole_value(parameter, axis) for name, parameter in held.items()}


def whole_gradients(policy: Policy) -> dict[str, Tensor]:
    """The reduced gradients of what trains. Collective."""
    axis = policy.model.spec.ranks.tensor
    return {name: _whole_gradient(p, axis) for name, p in policy.trained().items()}


def _whole_gradient(parameter: Tensor, axis: Axis) -> Tensor:
    gradient = torch.nn.Parameter(parameter.main_grad.clone(), requires_grad=False)  # type: ignore[attr-defined]
    dim = partition_of(parameter)
    if dim is not None:
        mark_sharded(gradient, dim)
    return whole_value(gradient, axis)


def moments(policy: Policy) -> dict[str, Tensor]:
    """Adam's state of each trained parameter on this rank."""
    state = policy.optimizer._inner.optimizer.state
    return {
        f"{name}/{key}": state[p][key].clone()
        for name, p in policy.trained().items()
        for key in ("exp_avg", "exp_avg_sq", "step")
    }


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute difference of each tensor."""
    assert ours.keys() == theirs.keys()
    return {name: float((ours[name] - theirs[name]).abs().max()) for name in ours}
