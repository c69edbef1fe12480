"""Replaying a group: what would this policy, unrouted, have done in each branch's states?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_kvpo.algorithm.energy import step_energy
from megatron_kvpo.config import EnergyConfig
from megatron_kvpo.flow import clean_from_velocity, sampler_sigmas
from megatron_kvpo.records import Trajectory
from megatron_kvpo.rollout.group import GroupNoise, SampledGroup
from megatron_kvpo.rollout.sampler import TextEncoder, context_state, encode_for_rows
from megatron_kvpo.rollout.stream import Stream


def replay_energies(
    sampled: SampledGroup, encode: TextEncoder, noises: GroupNoise, config: EnergyConfig,
    rows: Sequence[int], *, grad: bool = False,
) -> Tensor:  # fmt: skip
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
        grad: build a graph through the first config.grad_steps steps. The value then has only
            these. Go backward before anything else writes pages, under the same policy.

    Returns:
        energy_B in float32, one a row.
    """
    world, group, plan = sampled.prefix.world, sampled.group, sampled.group.plan
    index, recorded = list(rows), replay_targets(sampled)
    latent_BFCHW = group.latent_NFCHW[index]
    with torch.set_grad_enabled(grad):
        text = encode_for_rows(world.model, encode, group.prompt, plan.fork_frame, len(index))
        stream = sampled.prefix.fork(len(index), text)
        energy_B = latent_BFCHW.new_zeros(len(index), dtype=torch.float32)
        kept = []  # recomputation in backward reads pages again: none may be rewritten till then
        for block in range(plan.num_blocks):
            if block and stream.frame in group.prompt.switch_frames:
                text = encode_for_rows(world.model, encode, group.prompt, stream.frame, len(index))
                stream.recache(text, latent_BFCHW[:, : stream.frame])
            state_BT = recorded.state_NPTFCHW[index, block]
            target_BT = recorded.velocity_NPTFCHW[index, block]
            last = block + 1 == plan.num_blocks
            predict = config.replay_context == "self" and not last
            kept += [table.fork() for table in stream.tables if grad]
            terms, predicted = _replay_block(stream, state_BT, target_BT, config, grad, predict)
            energy_B = energy_B + terms
            if not last:
                start, size = stream.frame, world.stream.block_frames
                clean = predicted if predict else latent_BFCHW[:, start : start + size]
                context = context_state(clean, world.stream, noises.key(start))
                stream.commit(context, sigma=world.stream.context_noise)
        for table in (*kept, *stream.tables):
            table.release()
    return energy_B


def _replay_block(
    stream: Stream, state_BTFCHW: Tensor, target_BTFCHW: Tensor, config: EnergyConfig,
    grad: bool, predict: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One block's energy terms, summed, and the clean estimate of its last step if wanted."""
    sigmas = sampler_sigmas(stream.world.stream.steps, stream.world.stream.shift)
    energy_B = state_BTFCHW.new_zeros(len(state_BTFCHW), dtype=torch.float32)
    predicted = torch.empty(0)
    for step, sigma in enumerate(sigmas):
        counts = not grad or step < config.grad_steps
        wanted = predict and step + 1 == len(sigmas)
        if not counts and not wanted:
            continue
        state = state_BTFCHW[:, step]
        with torch.set_grad_enabled(grad and counts):
            velocity = stream.velocity(state, sigma)
        if counts:
            energy_B = energy_B + step_energy(velocity, target_BTFCHW[:, step], sigma, config)
        if wanted:
            predicted = clean_from_velocity(state, velocity.detach(), sigma)
    return energy_B, predicted


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
