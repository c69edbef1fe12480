"""Replaying a group: what would this policy, unrouted, have done in each branch's states?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kvpo.algorithm.energy import step_energy
from megatron_kvpo.config import EnergyConfig
from megatron_kvpo.flow import clean_from_velocity, sampler_sigmas
from megatron_kvpo.records import Trajectory
from megatron_kvpo.rollout.group import GroupNoise, SampledGroup
from megatron_kvpo.rollout.sampler import TextEncoder, context_state, encode_for_rows
from megatron_kvpo.rollout.stream import Stream, World


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """What the acting policy makes of some rows of a group."""

    energy_B: Tensor
    """Squared distance to the velocities taken in the rollout, float32."""

    drift_B: Tensor
    """Squared distance to the reference's velocities in the same states; 0 without a reference."""

    velocity_BPTFCHW: Tensor | None
    """The policy's own velocities, if they were to be kept."""


def replay(
    sampled: SampledGroup, encode: TextEncoder, noises: GroupNoise, config: EnergyConfig,
    rows: Sequence[int], *, grad: bool = False, keep: bool = False,
    reference_BPTFCHW: Tensor | None = None,
) -> Replay:  # fmt: skip
    """Trajectory velocity energy of some rows under the acting policy, in the plain context.

    E = sum over blocks and steps of w mean((v(z) - u)^2). The prefix's keys and values are the
    sampling policy's; the text's are this policy's; after a block the branch's recorded latents
    enter the cache (`replay_context: self` commits this policy's prediction instead). What the
    cache holds is data: no gradient flows through it.

    Args:
        sampled: the group and its prefix.
        encode: text embeddings.
        noises: of the group, for context noise.
        config: space, weights, gradient steps.
        rows: row numbers of the group on this rank.
        grad: build a graph through the first config.grad_steps steps. The values then have only
            these. Go backward before anything else writes pages, under the same policy.
        keep: return the velocities too.
        reference_BPTFCHW: another policy's velocities in these rows' states. The drift is E with
            these in the place of u.
    """
    world, group, plan = sampled.prefix.world, sampled.group, sampled.group.plan
    index, recorded = list(rows), replay_targets(sampled)
    latent_BFCHW = group.latent_NFCHW[index]
    energy_B = drift_B = latent_BFCHW.new_zeros(len(index), dtype=torch.float32)
    velocities = []
    with torch.set_grad_enabled(grad):
        text = encode_for_rows(world.model, encode, group.prompt, plan.fork_frame, len(index))
        stream = sampled.prefix.fork(len(index), text)
        kept: list[Stream] = []
        for block in range(plan.num_blocks):
            if block and stream.frame in group.prompt.switch_frames:
                text = encode_for_rows(world.model, encode, group.prompt, stream.frame, len(index))
                stream.recache(text, latent_BFCHW[:, : stream.frame])
            state_BTFCHW = recorded.state_NPTFCHW[index, block]
            last = block + 1 == plan.num_blocks
            predict = config.replay_context == "self" and not last
            velocity_T, predicted = _replay_block(stream, state_BTFCHW, config, grad, predict)
            if grad:  # backward's recomputation reads pages again: none may be rewritten till then
                kept.append(stream.hold())
            taken_BTFCHW = recorded.velocity_NPTFCHW[index, block]
            energy_B = energy_B + _distance(velocity_T, taken_BTFCHW, world, config)
            if reference_BPTFCHW is not None:
                target_BTFCHW = reference_BPTFCHW[:, block]
                drift_B = drift_B + _distance(velocity_T, target_BTFCHW, world, config)
            if keep:
                velocities.append(torch.stack([v.detach() for v in velocity_T], dim=1))
            if not last:
                stop = stream.frame + world.stream.block_frames
                clean = predicted if predict else latent_BFCHW[:, stream.frame : stop]
                context = context_state(clean, world.stream, noises.key(stream.frame))
                stream.commit(context, sigma=world.stream.context_noise)
        for held in (*kept, stream):
            held.release()
    kept_BPTFCHW = torch.stack(velocities, dim=1) if keep else None
    return Replay(energy_B=energy_B, drift_B=drift_B, velocity_BPTFCHW=kept_BPTFCHW)


def _replay_block(
    stream: Stream, state_BTFCHW: Tensor, config: EnergyConfig, grad: bool, predict: bool
) -> tuple[list[Tensor], Tensor]:
    """One block's velocities at the steps that count, and its last clean estimate if wanted."""
    sigmas = sampler_sigmas(stream.world.stream.steps, stream.world.stream.shift)
    velocity_T, predicted = [], torch.empty(0)
    for step, sigma in enumerate(sigmas):
        counts = not grad or step < config.grad_steps
        wanted = predict and step + 1 == len(sigmas)
        if not counts and not wanted:
            continue
        state = state_BTFCHW[:, step]
        with torch.set_grad_enabled(grad and counts):
            velocity = stream.velocity(state, sigma)
        if counts:
            velocity_T.append(velocity)
        if wanted:
            predicted = clean_from_velocity(state, velocity.detach(), sigma)
    return velocity_T, predicted


def _distance(
    velocity_T: Sequence[Tensor], target_BTFCHW: Tensor, world: World, config: EnergyConfig
) -> Tensor:
    """One block's energy terms, summed over the steps given, which are the first ones."""
    sigmas = sampler_sigmas(world.stream.steps, world.stream.shift)
    terms = [
        step_energy(velocity, target_BTFCHW[:, step], sigmas[step], config)
        for step, velocity in enumerate(velocity_T)
    ]
    return torch.stack(terms).sum(dim=0)


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
    sigma = torch.tensor(sigmas, device=trajectory.state_NPTFCHW.device).view(1, 1, -1, 1, 1, 1, 1)
    clean = clean_from_velocity(trajectory.state_NPTFCHW, trajectory.velocity_NPTFCHW, sigma)
    anchor = sampled.group.sequences.index(world.routing.num_branches)
    state = trajectory.state_NPTFCHW[anchor : anchor + 1].expand_as(clean)
    velocity = (state - clean) / sigma
    velocity[anchor] = trajectory.velocity_NPTFCHW[anchor]  # unrounded: its energy is exactly 0
    return Trajectory(state_NPTFCHW=state, velocity_NPTFCHW=velocity)
