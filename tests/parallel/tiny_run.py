"""A whole run at a tiny size: its recipe, and the real loop with what it did written down."""

from __future__ import annotations

import json
import logging
import math
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
from megatron_kvpo.model.causal_wan import CausalWan
from megatron_kvpo.model.codec import ShapesCodec, save_codec
from megatron_kvpo.model.lora import FullBank, mark_sharded, partition_of
from megatron_kvpo.model.specs import Spec
from megatron_kvpo.model.weights import base_parameters, initialise, save_weights, whole_value
from megatron_kvpo.parallel.groups import Axis, start_ranks, stop_ranks
from megatron_kvpo.parallel.seeds import noise
from megatron_kvpo.records import Clip
from megatron_kvpo.reward.base import REWARDS, measured
from megatron_kvpo.training.evaluate import Evaluator
from megatron_kvpo.training.metrics import read_jsonl
from megatron_kvpo.training.policy import Policy
from megatron_kvpo.training.run import Run

# Switches before the fork (12), at it and inside the policy window [12, 18).
PROMPTS: tuple[dict[str, Any], ...] = (
    {"segments": ["a red square moves right"]},
    {"segments": ["a cyan circle falls", "it turns red"], "switch_frames": [6]},
    {"segments": ["a blue cross rises slowly", "it moves left"], "switch_frames": [12]},
    {
        "segments": ["a green square stays still", "it turns purple and falls"],
        "switch_frames": [15],
    },
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
    "stream": {"num_frames": 18, "resident_frames": 18, "steps": [1.0, 0.5]},
    "routing": {"num_branches": 4, "num_routed_blocks": 2, "fork_chunks": 1},
    "energy": {"grad_steps": 1, "temperature": 0.1},
    "optimizer": {"lr": 5e-3, "eps": 1e-4, "warmup_updates": 0, "ema_decay": 0.5},
    "policy": {"lora_rank": 4, "lora_alpha": 8, "groups_per_update": 2,
               "rollouts_per_policy_sync": 2},
    "reward": {"weights": {"pattern": 1.0, "temporal_consistency": 1.0}},
    "checkpoint": {"every": 0},
    "log": {"wandb": "disabled", "report": False, "costs": False, "samples_every": 0},
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


class Pattern:
    """How much of a fixed pattern of noise a clip's last pixel frames hold.

    The rewards of the shapes world hardly tell noise from noise: their differences between the
    branches of a random model are near the rounding of float32. These are not.
    """

    name = "pattern"

    def score(self, clips: Sequence[Clip]) -> Tensor:
        """See Reward.score."""
        shape = tuple(clips[0].frames_FCHW.shape[1:])
        pattern_CHW = noise(shape, "pattern").double() * 40 / math.prod(shape) ** 0.5
        pattern_CHW -= pattern_CHW.mean()
        pattern_CHW = pattern_CHW.to(clips[0].frames_FCHW.device)
        frames = [clip.frames_FCHW[-8:].mean(0).double() for clip in clips]
        return torch.stack([(frame * pattern_CHW).sum().float() for frame in frames])


def write_strong_weights(folder: Path) -> dict[str, dict[str, str]]:
    """Random weights that say something: `model` and `codec` sections that name their files.

    Those of a run that starts from nothing leave every gate, the head and the decoder near zero:
    branches then hardly differ, and gradients are of the size of rounding.
    """
    config = load_config(write_recipe(folder))
    with ranks_left():
        ranks = start_ranks(config.parallel, "cpu")
        spec = Spec.build(config.model, config.parallel, ranks, None)
        model = CausalWan(config.model, spec)
        initialise(model, seed=0)
        with torch.no_grad():
            for name, parameter in base_parameters(model):
                if name.endswith("modulation"):
                    parameter.mul_(4)
                elif name.startswith(("time_", "text_", "head.")):
                    parameter.mul_(8)
        save_weights(model, folder / "transformer.safetensors", torch.float32, {})
    codec = ShapesCodec(config.codec, config.model.latent_channels)
    with torch.no_grad():
        for name, parameter in codec.named_parameters():
            parameter.copy_(noise(tuple(parameter.shape), "codec", name))
            parameter.mul_(0.3 / max(1, parameter[0].numel()) ** 0.5)
        codec.decoder_skip[0].bias.sub_(0.7)  # dark, as the shapes' ground is
    save_codec(codec, folder / "codec.safetensors")
    return {
        "model": {"weights": str(folder / "transformer.safetensors")},
        "codec": {"weights": str(folder / "codec.safetensors")},
    }


def tiny_config(folder: Path, *overrides: str, **sections: Any) -> RunConfig:
    """The recipe of `write_recipe`, with dotted overrides."""
    return load_config(write_recipe(folder, **sections), list(overrides))


@dataclass
class Trace:
    """What one rank saw of a run. All tensors are on the CPU."""

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
    start, step, finish = Run.start, Policy.step, Run.finish

    def watched_start(config: RunConfig) -> Run:
        run = start(config)
        trace.first_update, trace.start = run.update, whole_weights(run.policy)
        return run

    def watched_step(policy: Policy, update: int) -> float:
        trace.gradients.append(whole_gradients(policy))
        return step(policy, update)

    def watched_finish(run: Run, seconds_per_update: float) -> None:
        trace.weights, trace.moments = whole_weights(run.policy), moments(run.policy)
        free = run.stages.world.pool.num_free
        assert free == run.stages.world.pool.key.shape[1], f"only {free} pages were given back"
        finish(run, seconds_per_update)

    with (
        mock.patch.object(Run, "start", staticmethod(watched_start)),
        mock.patch.object(Policy, "step", watched_step),
        mock.patch.object(Run, "finish", watched_finish),
        mock.patch.object(Evaluator, "real", return_value=0.0),  # slow, and without a policy
        mock.patch.dict(REWARDS, pattern=measured(Pattern)),
        ranks_left(),
    ):
        program.train(config)
    path = config.run_folder / "metrics.jsonl"
    trace.metrics = read_jsonl(path) if path.is_file() else []
    return trace


@contextmanager
def ranks_left() -> Iterator[None]:
    """Leave the ranks even if a run stops half-way, and the loggers as they were. One thread."""
    from megatron.core import parallel_state

    package = logging.getLogger("megatron_kvpo")
    before = package.handlers[:], package.propagate, package.level
    with mock.patch.dict("os.environ", OMP_NUM_THREADS="1"):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            for handler in set(package.handlers) - set(before[0]):
                handler.close()
            package.handlers[:], package.propagate = before[:2]
            package.setLevel(before[2])
            if parallel_state.model_parallel_is_initialized():
                stop_ranks()


def whole_weights(policy: Policy) -> dict[str, Tensor]:
    """Every slot's weights and the frozen base's, not this rank's share of them. Collective."""
    axis = policy.model.spec.ranks.tensor
    held = dict(policy.model.named_parameters())
    if isinstance(policy.bank, FullBank):
        held |= dict(policy.bank.named_parameters())
    return {name: whole_value(parameter, axis).cpu() for name, parameter in held.items()}


def whole_gradients(policy: Policy) -> dict[str, Tensor]:
    """The reduced gradients of what trains. Collective."""
    axis = policy.model.spec.ranks.tensor
    return {name: _whole_gradient(p, axis) for name, p in policy.trained().items()}


def _whole_gradient(parameter: Tensor, axis: Axis) -> Tensor:
    gradient = torch.nn.Parameter(parameter.main_grad.clone(), requires_grad=False)  # type: ignore[attr-defined]
    dim = partition_of(parameter)
    if dim is not None:
        mark_sharded(gradient, dim)
    return whole_value(gradient, axis).cpu()


def moments(policy: Policy) -> dict[str, Tensor]:
    """This rank's share of Adam's state, by the numbers of its parameters or of their parts."""
    adam, found = policy.optimizer._inner.optimizer, {}
    held = [(p, group) for group in adam.param_groups for p in group["params"]]
    for number, (p, group) in enumerate(held):
        state = adam.state[p]
        step = state["step"] if "step" in state else group["step"]  # fused ones count for a group
        for key, value in (("exp_avg", state["exp_avg"]), ("exp_avg_sq", state["exp_avg_sq"]),
                           ("step", torch.as_tensor(step, dtype=torch.float32))):  # fmt: skip
            found[f"{number}/{key}"] = value.clone().cpu()
    return found


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute difference of each tensor."""
    assert ours.keys() == theirs.keys()
    return {name: float((ours[name] - theirs[name]).abs().max()) for name in ours}
