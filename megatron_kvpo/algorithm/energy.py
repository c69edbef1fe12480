"""Trajectory velocity energy: how far a policy is from having taken a branch's steps itself.

    E(g) = sum_b sum_s w_s mean_{f,c,h,w} (v_theta(z_bs; unrouted context) - u_bs)^2
    log pi(g) = log_softmax over the group's branches of ( -E(g) / temperature )

z and u are what the branch recorded under routing: its noisy states and the velocities taken there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_kvpo.method_config import EnergyConfig

FRAME_DIMS = (-4, -3, -2, -1)
"""F, C, H and W of a block's latents."""


def trajectory_velocity_energy(
    velocity: Tensor, recorded_velocity: Tensor, sigma_T: Tensor, config: EnergyConfig
) -> Tensor:
    """Energy of whole policy windows: the weighted squared velocity error, summed over P and T.

    Steps from `config.grad_steps` on count in the value and carry no gradient.

    Args:
        velocity: [..., P, T, F, C, H, W], the replaying policy's. Carries gradient.
        recorded_velocity: Same shape, as taken in the rollout. Data.
        sigma_T: Noise level of each denoising step, in (0, 1].
        config: Space, weight and number of gradient steps.

    Returns:
        [...] in float32, >= 0; 0 where the replay repeats the recording. Lower is likelier.

    Raises:
        ValueError: the shapes differ or disagree with the number of noise levels.
    """
    num_steps = velocity.shape[-5] if velocity.dim() >= 6 else 0
    if velocity.shape != recorded_velocity.shape or num_steps != len(sigma_T):
        raise ValueError(
            f"velocity {tuple(velocity.shape)} and recorded velocity "
            f"{tuple(recorded_velocity.shape)} must have one shape [..., P, T, F, C, H, W] with "
            f"T = {len(sigma_T)}, the number of noise levels"
        )
    live, value_only = velocity.tensor_split([config.grad_steps], dim=-5)
    velocity = torch.cat([live, value_only.detach()], dim=-5)
    error_PT = (velocity.float() - recorded_velocity.detach().float()).square().mean(FRAME_DIMS)
    return (error_PT * _weight(sigma_T.to(error_PT), config)).sum(dim=(-2, -1))


def step_energy(
    velocity_BFCHW: Tensor, recorded_BFCHW: Tensor, sigma: float | Tensor, config: EnergyConfig
) -> Tensor:
    """One term of the energy: a single block and denoising step of each row.

    Summed over a window's blocks and steps it is `trajectory_velocity_energy`, so a replay can add
    up step by step. Whether the step carries gradient is the caller's choice here
    (`config.grad_steps`).

    Args:
        velocity_BFCHW: The replaying policy's velocity.
        recorded_BFCHW: As taken in the rollout. Data.
        sigma: This step's noise level, one number or one per row [B].
        config: Space and weight.

    Returns:
        energy_B in float32.

    Raises:
        ValueError: the shapes differ.
    """
    if velocity_BFCHW.shape != recorded_BFCHW.shape:
        raise ValueError(
            f"velocity {tuple(velocity_BFCHW.shape)} and recorded velocity "
            f"{tuple(recorded_BFCHW.shape)} must have one shape [B, F, C, H, W]"
        )
    error_BFCHW = velocity_BFCHW.float() - recorded_BFCHW.detach().float()
    return error_BFCHW.square().mean(FRAME_DIMS) * _weight(sigma, config)


def clean_energy(
    velocity_BFCHW: Tensor,
    state_BFCHW: Tensor,
    target_clean_BFCHW: Tensor,
    sigma: float,
    config: EnergyConfig,
) -> Tensor:
    """One term of the energy for exploration `noise`, whose target is a clean estimate.

    A branch that differs by its noises alone repeats its own steps exactly, so its own states give
    energy 0 and no gradient. Replayed instead are the *anchor's* states z, and the target is the
    velocity that leads from there to the branch's clean estimate x0 of the same block and step,
    (z - x0) / sigma. For x0 = z - sigma u this is u up to rounding.

    Args:
        velocity_BFCHW: The replaying policy's velocity at the anchor's states.
        state_BFCHW: The anchor's noisy states, repeated per branch.
        target_clean_BFCHW: Each branch's clean estimate, state - sigma velocity of its own record.
        sigma: This step's noise level, in (0, 1].
        config: Space and weight.

    Returns:
        energy_B in float32.

    Raises:
        ValueError: sigma is not positive, or the shapes differ.
    """
    if sigma <= 0:
        raise ValueError(f"sigma is {sigma}: a clean target has a velocity only above 0")
    target_BFCHW = (state_BFCHW.float() - target_clean_BFCHW.float()) / sigma
    return step_energy(velocity_BFCHW, target_BFCHW, sigma, config)


def _weight(sigma: float | Tensor, config: EnergyConfig) -> float | Tensor:
    """w_s, times sigma^2 where clean estimates are compared: their error is sigma |dv|."""
    return config.step_weight * (sigma * sigma if config.space == "x0" else 1.0)


def branch_log_probs(energy_PG: Tensor, temperature: float) -> Tensor:
    """Surrogate policy over each group: log_softmax(-energy / temperature) over the branches.

    Raises:
        ValueError: the temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"energy.temperature is {temperature}: it must be above 0")
    return torch.log_softmax(-energy_PG / temperature, dim=-1)
