import math

import pytest
import torch

from megatron_kvpo.algorithm.energy import (
    branch_log_probs,
    clean_energy,
    step_energy,
    trajectory_velocity_energy,
)
from megatron_kvpo.flow import clean_from_velocity
from megatron_kvpo.method_config import EnergyConfig

VELOCITY = EnergyConfig(grad_steps=4)
X0 = EnergyConfig(space="x0", grad_steps=4)
SIGMAS = torch.tensor([1.0, 0.9375, 2.5 / 3, 0.625])
SHAPE = (5, 2, 4, 3, 2, 2, 2)
"""G, P, T, F, C, H, W."""


def test_energy_is_exactly_zero_when_the_replay_repeats_the_recording():
    for dtype in (torch.float32, torch.bfloat16):
        velocity = torch.randn(SHAPE, dtype=dtype)
        for config in (VELOCITY, X0):
            energy = trajectory_velocity_energy(velocity, velocity.clone(), SIGMAS, config)
            assert energy.shape == (5,)
            assert energy.dtype == torch.float32
            assert energy.eq(0).all()


def test_unit_errors_by_hand():
    """P = 2 blocks, T = 4 steps, every error 1: velocity 2*4*1/2 = 4.

    x0: 2 * 1/2 * (1 + .87890625 + .69444444 + .390625) = 2.96397569.
    """
    zeros = torch.zeros(SHAPE)
    energy = trajectory_velocity_energy(zeros + 1, zeros, SIGMAS, VELOCITY)
    assert energy.tolist() == [4.0] * 5
    energy = trajectory_velocity_energy(zeros + 1, zeros, SIGMAS, X0)
    assert energy.tolist() == pytest.approx([2.96397569] * 5)
    heavy = EnergyConfig(step_weight=2.0)
    assert trajectory_velocity_energy(zeros + 1, zeros, SIGMAS, heavy)[0] == 16


def test_a_mixed_error_is_averaged_over_a_block_not_summed():
    # one of 24 entries of block 1, step 2 is off by 6: 1/2 * 36/24 = .75; x0: times (5/6)^2
    velocity, recorded = torch.zeros(SHAPE), torch.zeros(SHAPE)
    velocity[3, 1, 2, 0, 1, 0, 1] = 6
    energy = trajectory_velocity_energy(velocity, recorded, SIGMAS, VELOCITY)
    assert energy.tolist() == [0, 0, 0, 0.75, 0]
    energy = trajectory_velocity_energy(velocity, recorded, SIGMAS, X0)
    assert energy[3].item() == pytest.approx(0.75 * 25 / 36)


def test_x0_space_compares_clean_estimates():
    state, velocity, recorded = torch.randn(3, 1, 3, 2, 4, 4).unbind()
    ours, theirs = (clean_from_velocity(state, v, 0.625) for v in (velocity, recorded))
    expected = 0.5 * (ours - theirs).square().mean()
    torch.testing.assert_close(step_energy(velocity, recorded, 0.625, X0)[0], expected)


@pytest.mark.parametrize("config", [VELOCITY, X0])
def test_the_whole_is_the_sum_of_its_steps(config: EnergyConfig):
    velocity, recorded = torch.randn(2, *SHAPE).unbind()
    parts = sum(
        step_energy(velocity[:, p, t], recorded[:, p, t], sigma, config)
        for p in range(2)
        for t, sigma in enumerate(SIGMAS.tolist())
    )
    whole = trajectory_velocity_energy(velocity, recorded, SIGMAS, config)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)


def test_only_the_first_steps_carry_gradient_and_all_count_in_the_value():
    velocity, recorded = torch.randn(2, *SHAPE).unbind()
    velocity.requires_grad_()
    config = EnergyConfig(grad_steps=2)
    energy = trajectory_velocity_energy(velocity, recorded, SIGMAS, config)
    full = trajectory_velocity_energy(velocity, recorded, SIGMAS, VELOCITY)
    assert torch.equal(energy, full)
    energy.sum().backward()
    assert velocity.grad[:, :, 2:].eq(0).all()
    # d/dv of 1/2 mean over 24 entries of (v - u)^2 is (v - u) / 24
    expected = (velocity - recorded)[:, :, :2] / 24
    torch.testing.assert_close(velocity.grad[:, :, :2], expected.detach())


def test_no_gradient_reaches_the_recording():
    recorded = torch.randn(SHAPE, requires_grad=True)
    velocity = torch.randn(SHAPE, requires_grad=True)
    trajectory_velocity_energy(velocity, recorded, SIGMAS, VELOCITY).sum().backward()
    assert recorded.grad is None


def test_a_clean_target_gives_back_its_velocity():
    state, recorded, velocity = torch.randn(3, 4, 3, 2, 2, 2).unbind()
    clean = clean_from_velocity(state, recorded, 0.625)
    for config in (VELOCITY, X0):
        torch.testing.assert_close(
            clean_energy(velocity, state, clean, 0.625, config),
            step_energy(velocity, recorded, 0.625, config),
        )
    assert clean_energy(recorded, state, clean, 0.625, VELOCITY).max() < 1e-12
    with pytest.raises(ValueError, match="sigma is 0"):
        clean_energy(velocity, state, clean, 0.0, VELOCITY)


def test_a_clean_target_pulls_even_where_only_the_noise_differs():
    """A branch's own replay has no gradient; the anchor's states and its clean estimate have."""
    anchor_state, anchor_velocity = torch.zeros(1, 3, 1, 1, 1), torch.ones(1, 3, 1, 1, 1)
    velocity = anchor_velocity.clone().requires_grad_()
    # anchor x0 = 0 - .5*1 = -.5; the branch's x0 is 0: target velocity 0, error 1, energy 1/2
    energy = clean_energy(velocity, anchor_state, torch.zeros(1, 3, 1, 1, 1), 0.5, VELOCITY)
    assert energy.item() == 0.5
    energy.sum().backward()
    assert velocity.grad.gt(0).all()


def test_branch_log_probs_by_hand():
    # energies 0 and T ln 3: odds 3 to 1
    energy = torch.tensor([[0.0, 0.1 * math.log(3)], [0.2, 0.2]])
    prob = branch_log_probs(energy, 0.1).exp()
    torch.testing.assert_close(prob, torch.tensor([[0.75, 0.25], [0.5, 0.5]]))
    with pytest.raises(ValueError, match="temperature is 0"):
        branch_log_probs(energy, 0)


def test_shapes_that_disagree_are_named():
    velocity = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match=r"T = 3, the number of noise levels"):
        trajectory_velocity_energy(velocity, velocity, SIGMAS[:3], VELOCITY)
    with pytest.raises(ValueError, match="must have one shape"):
        trajectory_velocity_energy(velocity, velocity[:1], SIGMAS, VELOCITY)
    with pytest.raises(ValueError, match="must have one shape"):
        step_energy(velocity[:, 0, 0], velocity[:1, 0, 0], 1.0, VELOCITY)
