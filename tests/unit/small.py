"""A whole generator, its policies and one rank, small enough that a group takes a blink.

Import `ranks` into a test module by assignment, `ranks = small.ranks`: the fixture joins one rank
for the module and leaves it at the end.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_kvpo import settings
from megatron_kvpo.config import ParallelConfig, RunConfig
from megatron_kvpo.data.prompts import PromptStream
from megatron_kvpo.model.causal_wan import CausalWan, TextKeys
from megatron_kvpo.model.lora import AdapterBank
from megatron_kvpo.model.text_encoder import WordEncoder
from megatron_kvpo.model.weights import base_parameters, local_part, whole_shape
from megatron_kvpo.parallel.groups import Ranks, start_ranks, stop_ranks
from megatron_kvpo.parallel.seeds import noise
from megatron_kvpo.records import Prompt, RewardTable, RolloutGroup, RoutingPlan
from megatron_kvpo.reward.composite import ScoredGroup
from megatron_kvpo.rollout.group import GroupNoise, SampledGroup, roll_out_group
from megatron_kvpo.rollout.replay import replay
from megatron_kvpo.rollout.sampler import encode_texts
from megatron_kvpo.rollout.stream import Stream, World, new_world
from megatron_kvpo.training.policy import Policy
from megatron_kvpo.training.stages import Stages

BASE = {
    "seed": 5,
    "device": "cpu",
    "model": {
        "hidden_dim": 32, "ffn_dim": 48, "num_layers": 2, "num_heads": 2, "latent_channels": 4,
        "latent_height": 4, "latent_width": 4, "text_dim": 16, "text_length": 8,
        "max_frames": 64,
    },
    "stream": {"num_frames": 21, "resident_frames": 21},
    "routing": {"num_branches": 3, "num_routed_blocks": 2, "fork_chunks": 1},
    "energy": {"grad_steps": 4},
    "optimizer": {"lr": 1e-2, "ema_decay": 0.9, "warmup_updates": 0},
    "policy": {"lora_rank": 4, "lora_alpha": 8, "groups_per_update": 2,
               "rollouts_per_policy_sync": 1},
    "loss": {"kl_coefficient": 0.5},
}  # fmt: skip
"""Latent frames of 4 tokens; forks at 12 and 15; a pool of 8 or more frames."""

TEXTS = ("a red square moves right", "it turns blue and falls", "a green circle falls")
ONE = Prompt(segments=TEXTS[:1], index=0)
"""One segment."""

PROMPTS = (ONE, Prompt(segments=TEXTS[2:], index=1), Prompt(segments=TEXTS[1:2], index=2))


def switching(*frames: int, index: int = 0) -> Prompt:
    """A prompt whose text changes at these latent frames."""
    texts = itertools.islice(itertools.cycle(TEXTS), len(frames) + 1)
    return Prompt(segments=tuple(texts), switch_frames=frames, index=index)


def config(*overrides: str) -> RunConfig:
    """BASE with `section.key=value` overrides."""
    values = copy.deepcopy(BASE)
    for override in overrides:
        settings.merge_override(values, override)
    return settings.from_mapping(RunConfig, values)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """This process as the only rank."""
    joined = start_ranks(ParallelConfig(timeout_s=120), "cpu")
    torch.set_num_threads(1)  # afterwards: joining takes all cores, where more are much slower
    yield joined
    stop_ranks()


@torch.no_grad()
def enliven(model: CausalWan) -> None:
    """Give the base weights at which text, time and every frame of history matter."""
    axis = model.spec.ranks.tensor
    for name, p in base_parameters(model):
        drawn = noise(tuple(whole_shape(p, axis)), "lively", name)
        if "norm" in name and name.endswith("weight"):
            drawn = 1 + 0.2 * drawn
        elif name.endswith("weight"):
            drawn *= 1.5 / drawn[0].numel() ** 0.5
        else:
            drawn *= 0.3
        p.copy_(local_part(drawn, p, axis))


@dataclass(frozen=True)
class Small:
    """Everything that a run has besides rewards and files."""

    config: RunConfig
    ranks: Ranks
    policy: Policy
    world: World
    stages: Stages

    @property
    def model(self) -> CausalWan:
        return self.policy.model

    @property
    def num_pages(self) -> int:
        return self.world.pool.key.shape[1]

    def encode(self, texts: Sequence[str]) -> Tensor:
        return self.stages.encode(texts)

    def text(self, *texts: str) -> TextKeys:
        """Text keys of the acting weights, one row a text."""
        with torch.no_grad():
            return encode_texts(self.model, self.encode, texts or TEXTS[:1])

    def noises(self, prompt: Prompt = ONE, update: int = 0) -> GroupNoise:
        return self.stages.noises(update, prompt.index)

    def latents(self, frames: int, rows: int = 1, name: str = "latents") -> Tensor:
        """Random latents [rows, frames, C, H, W]."""
        shape = (rows, frames, *self.config.model.frame_shape)
        return noise(shape, "test", name, device=self.ranks.device)

    def streamed(self, frames: int, rows: int = 1, text: TextKeys | None = None) -> Stream:
        """A stream whose cache holds random clean latents of the first frames."""
        text = text or self.text(*[TEXTS[0]] * rows)
        stream, size = Stream.begin(self.world, rows, text), self.config.stream.block_frames
        for block in self.latents(frames, rows).split(size, dim=1):
            stream.commit(block)
        return stream

    def roll_out(
        self, plan: RoutingPlan | None = None, prompt: Prompt = ONE,
        sequences: tuple[int, ...] | None = None,
    ) -> SampledGroup:  # fmt: skip
        """One group of the sampling policy."""
        with self.policy.acting("old"):
            return roll_out_group(
                self.world, self.encode, prompt, plan or self.plan(), self.noises(prompt),
                sequences or self.stages.sequences,
            )  # fmt: skip

    def plan(self, fork: int = 12, blocks: int | None = None) -> RoutingPlan:
        """Routes that leave the newest frames out, each its own; none without routing."""
        routing = self.config.routing
        routes = tuple(tuple(range(3 + g, 8 + g)) for g in range(routing.num_branches))
        if routing.exploration != "chr":
            routes = ((),) * routing.num_branches
        return RoutingPlan(
            fork_frame=fork, num_blocks=blocks or routing.num_routed_blocks,
            routed_frames_G=routes,
        )  # fmt: skip

    def energies(
        self, sampled: SampledGroup, slot: str = "old", rows: Sequence[int] | None = None,
        grad: bool = False,
    ) -> Tensor:  # fmt: skip
        """Energies of some rows, by default all, under one policy."""
        rows = range(len(sampled.group.sequences)) if rows is None else rows
        noises = self.noises(sampled.group.prompt)
        with self.policy.acting(slot):
            return replay(
                sampled, self.encode, noises, self.config.energy, rows, grad=grad
            ).energy_B

    @torch.no_grad()
    def stir(self, *slots: str, size: float = 0.1) -> None:
        """Move these policies off the base, each its own way: their up-projections leave zero."""
        assert isinstance(self.policy.bank, AdapterBank)
        axis = self.ranks.tensor
        for name, adapter in self.policy.bank.adapters.items():
            for slot in slots:
                up = adapter.lora_B[slot]
                drawn = noise(tuple(whole_shape(up, axis)), "stir", name, slot, device=up.device)
                up.add_(size * local_part(drawn, up, axis))


class LatentScorer:
    """Stands in for the rewards: scores latents by what is in them, without a codec."""

    def send_group(self, group: RolloutGroup) -> ScoredGroup:
        after = group.latent_NFCHW[:, group.plan.fork_frame :].flatten(1)
        scores = torch.stack([after.mean(1), after.std(1)])
        return ScoredGroup(
            RewardTable(components=("mean", "std"), weights=(1.0, 2.0), local_KN=scores,
                        global_KN=scores.flip(0))
        )  # fmt: skip


def build(ranks: Ranks, *overrides: str) -> Small:
    """A lively model in all four policies, alike; the world and the stages around it."""
    settings_ = config(*overrides)
    policy = Policy.build(settings_, ranks)
    enliven(policy.model)
    if settings_.policy.mode == "full":
        for slot in ("old", "reference", "ema"):
            policy.bank.copy("current", slot)
    routing, model = settings_.routing, settings_.model
    rows = 2 * routing.num_branches + 4
    world = new_world(policy.model, settings_.stream, routing, rows, settings_.memory)
    encode = WordEncoder(model.text_dim, model.text_length).encode
    prompts = PromptStream(PROMPTS, settings_.seed, settings_.policy.groups_per_update)
    stages = Stages(settings_, ranks, policy, world, encode, LatentScorer(), prompts)  # type: ignore[arg-type]
    return Small(settings_, ranks, policy, world, stages)
