import pytest
import torch

from megatron_kvpo.flow import (
    add_noise,
    clean_from_velocity,
    next_state,
    sampler_sigmas,
    timestep,
)


def test_default_steps_give_the_noise_levels_of_longlive():
    # 5s / (1 + 4s): 5/5, 3.75/4, 2.5/3, 1.25/2
    assert sampler_sigmas((1.0, 0.75, 0.5, 0.25), 5.0) == pytest.approx((1, 0.9375, 2.5 / 3, 0.625))
    assert [timestep(s) for s in sampler_sigmas((1.0, 0.25), 5.0)] == [1000, 625]


def test_shift_of_one_leaves_the_steps_alone():
    assert sampler_sigmas((0.9, 0.3), 1.0) == (0.9, 0.3)


def test_clean_comes_back_from_the_true_velocity():
    clean, noise = torch.randn(2, 2, 3, 4, 4, 4, dtype=torch.float64).unbind()
    state = add_noise(clean, noise, 0.625)
    torch.testing.assert_close(clean_from_velocity(state, noise - clean, 0.625), clean)


def test_sigma_may_differ_per_frame():
    clean, noise = torch.randn(2, 2, 3, 4, 4, 4).unbind()
    sigma = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1, 1)
    state = add_noise(clean, noise, sigma)
    torch.testing.assert_close(state[:, 0], clean[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(state[:, 2], noise[:, 2], rtol=0, atol=0)
    torch.testing.assert_close(state[:, 1], (clean[:, 1] + noise[:, 1]) / 2)


def test_one_step_by_hand():
    # z = 2, v = 4, sigma .75 -> .5: clean = 2 - .75*4 = -1
    state, velocity, noise = torch.tensor([2.0]), torch.tensor([4.0]), torch.tensor([3.0])
    clean = clean_from_velocity(state, velocity, 0.75)
    assert clean.item() == -1
    renoised = next_state("renoise", state, velocity, clean, 0.75, 0.5, noise)
    assert renoised.item() == 0.5 * -1 + 0.5 * 3
    euler = next_state("euler", state, velocity, clean, 0.75, 0.5, None)
    assert euler.item() == 2 + (0.5 - 0.75) * 4


def test_samplers_agree_when_renoised_with_the_noise_the_model_implies():
    state, velocity = torch.randn(2, 5, dtype=torch.float64).unbind()
    clean = clean_from_velocity(state, velocity, 0.8)
    implied_noise = clean + velocity
    torch.testing.assert_close(
        next_state("renoise", state, velocity, clean, 0.8, 0.3, implied_noise),
        next_state("euler", state, velocity, clean, 0.8, 0.3, None),
    )


def test_nonsense_is_refused():
    z = torch.zeros(1)
    with pytest.raises(ValueError, match=r"\[1\.5\] lie outside"):
        sampler_sigmas((1.5, 0.5), 5.0)
    with pytest.raises(ValueError, match="shift is 0"):
        sampler_sigmas((1.0,), 0)
    with pytest.raises(ValueError, match="needs fresh noise"):
        next_state("renoise", z, z, z, 1.0, 0.5, None)
    with pytest.raises(ValueError, match="'heun': choose renoise or euler"):
        next_state("heun", z, z, z, 1.0, 0.5, z)
