"""Replaying a group: what would this policy, unrouted, have done in each branch's states?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kvpo.algorithm.energy import step_energy
from megatron_kvpo.config import EnergyConfig
from megatron_kvpo.flow import clean_from_velocity, sampler_sigmas
from megatron_kvpo.model.causal_wan import TextKeys
from megatron_kvpo.parallel.transfer import indices, to_device
from megatron_kvpo.records import Prompt, Trajectory
from megatron_kvpo.rollout.group import GroupNoise, SampledGroup
from megatron_kvpo.rollout.sampler import TextEncoder, context_state, encode_for_rows
from megatron_kvpo.rollout.stream import Stream, World
from megatron_kvpo.stopwatch import passing


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """What the acting policy makes of some rows of a group."""

    energy_B: Tensor
    """Squared distance to the velocities taken in the rollout, float32."""

    drift_B: Tensor
    """Squared distance to the reference's velocities in the same states; 0 without a reference."""

    velocity_BPTFCHW: Tensor | None
    """The policy's own velocities, if they were to be kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Push:
    """How a replay goes backward by itself: each pass at once, so that one graph lives at a time.

    The gradient is that of scale * sum_b (weight_b E_b + drift_weight D_b).
    """

    weight_B: Tensor
    """dL / dE of each row."""

    drift_weight: float = 0.0
    scale: float = 1.0
    before_last: Callable[[], None] | None = None
    """Called before the last of these passes goes backward. The texts' share comes after it."""


def replay(
    sampled: SampledGroup, encode: TextEncoder, noises: GroupNoise, config: EnergyConfig,
    rows: Sequence[int], *, grad: bool = False, push: Push | None = None, keep: bool = False,
    reference_BPTFCHW: Tensor | None = None,
) -> Replay:  # fmt: skip
    """Trajectory velocity energy of some rows under the acting policy, in the plain context.

    E = sum over blocks and steps of w mean((v(z) - u)^2). The prefix's keys and values are the
    sampling policy's; the text's are this policy's; after a block the branch's recorded latents
    enter the cache (`replay_context: self` commits this policy's prediction instead). What the
    cache holds is data: no gradient flows through it, so the passes share nothing but the text.

    Args:
        sampled: the group and its prefix.
        encode: text embeddings.
        noises: of the group, for context noise.
        config: space, weights, gradient steps.
        rows: row numbers of the group on this rank.
        grad: build a graph through the first config.grad_steps steps. The values then have only
            these. Go backward before anything else writes pages, under the same policy.
        push: instead of that, go backward through the same steps here, pass by pass.
        keep: return the velocities too.
        reference_BPTFCHW: another policy's velocities in these rows' states. The drift is E with
            these in the place of u.
    """
    world, group, plan = sampled.prefix.world, sampled.group, sampled.group.plan
    graph, index_B = grad or push is not None, indices(list(rows), group.latent_NFCHW.device)
    latent_BFCHW = group.latent_NFCHW[index_B]
    with torch.set_grad_enabled(graph):
        texts = _Texts(world, encode, group.prompt, len(rows), push is not None)
        tally = _Tally(sampled, config, index_B, push, keep, reference_BPTFCHW)
        stream = sampled.prefix.fork(len(rows), texts.at(plan.fork_frame))
        kept: list[Stream] = []
        for block in range(plan.num_blocks):
            passing(f"prompt {group.prompt.index}, rows {list(rows)}, latent frame {stream.frame}")
            if block and stream.frame in group.prompt.switch_frames:
                stream.recache(texts.at(stream.frame), latent_BFCHW[:, : stream.frame])
            last = block + 1 == plan.num_blocks
            predict = config.replay_context == "self" and not last
            predicted = _replay_block(stream, tally, block, config, graph, predict)
            if grad:  # backward's recomputation reads pages again: none may be rewritten till then
                kept.append(stream.hold())
            if not last:
                stop = stream.frame + world.stream.block_frames
                clean = predicted if predict else latent_BFCHW[:, stream.frame : stop]
                context = context_state(clean, world.stream, noises.key(stream.frame))
                stream.commit(context, sigma=world.stream.context_noise)
        for held in (*kept, stream):
            held.release()
        texts.push()
        return tally.result()


class _Texts:
    """Text keys of a replay's segments, encoded once each; under `push` their graph waits."""

    def __init__(
        self, world: World, encode: TextEncoder, prompt: Prompt, num_rows: int, push: bool
    ) -> None:
        self._model, self._encode, self._prompt = world.model, encode, prompt
        self._num_rows, self._push = num_rows, push
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def at(self, frame: int) -> TextKeys:
        """What the prompt says at a latent frame, one row each."""
        text = encode_for_rows(self._model, self._encode, self._prompt, frame, self._num_rows)
        if not self._push:
            return text
        return TextKeys(tuple((self._cut(key), self._cut(value)) for key, value in text.layers))

    def _cut(self, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        leaf = tensor.detach().requires_grad_()
        self._waiting.append((tensor, leaf))
        return leaf

    def push(self) -> None:
        """Send what all passes sent to the texts on to the weights."""
        found = [(tensor, leaf.grad) for tensor, leaf in self._waiting if leaf.grad is not None]
        if found:
            torch.autograd.backward([t for t, _ in found], [grad for _, grad in found])


class _Tally:
    """Adds up energies and drifts, velocity by velocity; under `push` each goes backward first."""

    def __init__(
        self, sampled: SampledGroup, config: EnergyConfig, index_B: Tensor, push: Push | None,
        keep: bool, reference_BPTFCHW: Tensor | None,
    ) -> None:  # fmt: skip
        stream = sampled.prefix.world.stream
        self._recorded, self._config, self._index_B = replay_targets(sampled), config, index_B
        self._sigmas = sampler_sigmas(stream.steps, stream.shift)
        self._push, self._reference, self._keep = push, reference_BPTFCHW, keep
        self._zero_B = sampled.group.latent_NFCHW.new_zeros(len(index_B), dtype=torch.float32)
        num_blocks = sampled.group.plan.num_blocks
        self._energies: list[list[Tensor]] = [[] for _ in range(num_blocks)]
        self._drifts: list[list[Tensor]] = [[] for _ in range(num_blocks)]
        self._velocities: list[list[Tensor]] = [[] for _ in range(num_blocks)]

    def state(self, block: int, step: int) -> Tensor:
        """What the policy is shown: the rows' noisy latents [B, F, C, H, W]."""
        return self._recorded.state_NPTFCHW[self._index_B, block, step]

    def add(self, block: int, step: int, velocity: Tensor) -> None:
        """Count what the policy made of a state."""
        sigma, drift_B = self._sigmas[step], None
        taken = self._recorded.velocity_NPTFCHW[self._index_B, block, step]
        energy_B = step_energy(velocity, taken, sigma, self._config)
        if self._reference is not None:
            other = self._reference[:, block, step]
            drift_B = step_energy(velocity, other, sigma, self._config)
        if self._push is not None:
            loss = (self._push.weight_B * energy_B).sum()
            if drift_B is not None:
                loss = loss + self._push.drift_weight * drift_B.sum()
            if self._push.before_last is not None and self._is_last(block, step):
                self._push.before_last()
            (self._push.scale * loss).backward()  # type: ignore[no-untyped-call]
            energy_B, drift_B = energy_B.detach(), None if drift_B is None else drift_B.detach()
        self._energies[block].append(energy_B)
        if drift_B is not None:
            self._drifts[block].append(drift_B)
        if self._keep:
            self._velocities[block].append(velocity.detach())

    def _is_last(self, block: int, step: int) -> bool:
        steps = min(len(self._sigmas), self._config.grad_steps)
        return (block + 1, step + 1) == (len(self._energies), steps)

    def result(self) -> Replay:
        """What was counted, each block's steps summed first."""
        kept = [torch.stack(steps, dim=1) for steps in self._velocities] if self._keep else None
        return Replay(
            energy_B=self._total(self._energies), drift_B=self._total(self._drifts),
            velocity_BPTFCHW=None if kept is None else torch.stack(kept, dim=1),
        )  # fmt: skip

    def _total(self, blocks: list[list[Tensor]]) -> Tensor:
        return sum((torch.stack(steps).sum(dim=0) for steps in blocks if steps), self._zero_B)


def _replay_block(
    stream: Stream, tally: _Tally, block: int, config: EnergyConfig, graph: bool, predict: bool
) -> Tensor:
    """Count one block's velocities at the steps that count; its last clean estimate if wanted."""
    sigmas = sampler_sigmas(stream.world.stream.steps, stream.world.stream.shift)
    predicted = torch.empty(0)
    for step, sigma in enumerate(sigmas):
        counts = not graph or step < config.grad_steps
        wanted = predict and step + 1 == len(sigmas)
        if not counts and not wanted:
            continue
        state = tally.state(block, step)
        with torch.set_grad_enabled(graph and counts):
            velocity = stream.velocity(state, sigma)
        if counts:
            tally.add(block, step, velocity)
        if wanted:
            predicted = clean_from_velocity(state, velocity.detach(), sigma)
    return predicted


def replay_targets(sampled: SampledGroup) -> Trajectory:
    """States to feed and velocities to compare with, per row.

    Branches that differ by routing replay their own. Branches that differ by noise only would
    repeat themselves exactly (energy 0), so there the anchor's states z are replayed and the
    branch's clean estimate x0 is the target: u = (z_anchor - x0_branch) / sigma.
    """
    trajectory, world = sampled.group.trajectory, sampled.prefix.world
    if world.routing.exploration != "noise":
        return trajectory
    sigmas = sampler_sigmas(world.stream.steps, world.stream.shift)
    device = trajectory.state_NPTFCHW.device
    sigma = to_device(torch.tensor(sigmas), device).view(1, 1, -1, 1, 1, 1, 1)
    clean = clean_from_velocity(trajectory.state_NPTFCHW, trajectory.velocity_NPTFCHW, sigma)
    anchor = sampled.group.sequences.index(world.routing.num_branches)
    state = trajectory.state_NPTFCHW[anchor : anchor + 1].expand_as(clean)
    velocity = (state - clean) / sigma
    velocity[anchor] = trajectory.velocity_NPTFCHW[anchor]  # unrounded: its energy is exactly 0
    return Trajectory(state_NPTFCHW=state, velocity_NPTFCHW=velocity)
