import math

import pytest
import torch
from torch import Tensor

from megatron_kvpo.algorithm.energy import branch_log_probs, trajectory_velocity_energy
from megatron_kvpo.algorithm.loss import energy_weights, kvpo_loss
from megatron_kvpo.method_config import EnergyConfig, LossConfig

DEFAULT = LossConfig()
NO_KL = LossConfig(kl_coefficient=0.0)


def logs(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).log()


def ones(count: int) -> Tensor:
    return torch.ones(count)


def test_loss_golden_by_hand():
    """Two branches, policy moved from 50/50 to 80/20: ratios 1.6 and .4, both past the clip.

    surrogate = -(min(1.6 * 1, 1.2 * 1) + min(.4 * -1, .9 * -1)) / 2 = -(1.2 - .9) / 2 = -.15
    KL = .8 ln 1.6 + .2 ln .4
    """
    out = kvpo_loss(
        logs([0.8, 0.2]),
        logs([0.5, 0.5]),
        logs([0.5, 0.5]),
        torch.tensor([[1.0, -1.0]]),
        ones(1),
        DEFAULT,
    )
    kl = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    assert out.loss.item() == pytest.approx(-0.15 + 10 * kl, rel=1e-5)
    metrics = {name: value.item() for name, value in out.metrics.items()}
    assert metrics["loss/surrogate"] == pytest.approx(-0.15)
    assert metrics["loss/kl"] == pytest.approx(kl, rel=1e-5)
    assert metrics["policy/ratio_max"] == pytest.approx(1.6)
    assert metrics["policy/ratio_min"] == pytest.approx(0.4)
    assert metrics["policy/clip_fraction"] == 1
    entropy = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    assert metrics["policy/entropy"] == pytest.approx(entropy, rel=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.0, 2.0, 2.0, 2.0),  # inside: rho A
        (1.15, 2.0, 2.3, 2.0),  # inside the wider upper side
        (1.5, 2.0, 2.4, 0.0),  # already likelier than allowed: capped at 1.2 A, no more push
        (1.5, -2.0, -3.0, -2.0),  # likelier and bad: full force back
        (0.5, 2.0, 1.0, 2.0),  # less likely and good: full force back
        (0.5, -2.0, -1.8, 0.0),  # less likely and bad: capped at .9 A
        (0.95, -2.0, -1.9, -2.0),  # inside
        (0.85, -2.0, -1.8, 0.0),  # past the narrower lower side
    ],
)
def test_clip_regions(ratio: float, advantage: float, value: float, slope: float):
    # one branch alone, so that its ratio can be set by hand
    log_ratio = torch.tensor([[math.log(ratio)]], requires_grad=True)
    out = kvpo_loss(log_ratio, torch.zeros(1, 1), None, torch.tensor([[advantage]]), ones(1), NO_KL)
    assert out.loss.item() == pytest.approx(-value)
    out.loss.backward()
    # d rho / d log rho = rho
    assert log_ratio.grad.item() == pytest.approx(-slope * ratio)


def test_first_update_has_ratio_one_and_no_kl_bit_for_bit():
    log_prob = branch_log_probs(torch.rand(3, 8), 0.05)
    out = kvpo_loss(
        log_prob, log_prob.clone(), log_prob.clone(), torch.randn(3, 8), ones(3), DEFAULT
    )
    assert out.metrics["policy/ratio_max"] == 1
    assert out.metrics["policy/ratio_min"] == 1
    assert out.metrics["loss/kl"] == 0
    assert out.metrics["policy/clip_fraction"] == 0


def test_groups_are_averaged():
    log_prob = branch_log_probs(torch.rand(3, 4), 0.1)
    old, reference = (branch_log_probs(torch.rand(3, 4), 0.1) for _ in range(2))
    advantage, scale = torch.randn(3, 4), torch.tensor([1.0, 0.5, 1.0])
    together = kvpo_loss(log_prob, old, reference, advantage, scale, DEFAULT).loss
    alone = [
        kvpo_loss(
            log_prob[p : p + 1],
            old[p : p + 1],
            reference[p : p + 1],
            advantage[p : p + 1],
            scale[p : p + 1],
            DEFAULT,
        ).loss
        for p in range(3)
    ]
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_unsafe_scale_halves_a_group_s_whole_loss():
    args = (logs([0.6, 0.4]), logs([0.5, 0.5]), logs([0.5, 0.5]), torch.tensor([[1.0, -1.0]]))
    full = kvpo_loss(*args, ones(1), DEFAULT)
    half = kvpo_loss(*args, 0.5 * ones(1), DEFAULT)
    assert full.loss.item() != 0
    assert half.loss == 0.5 * full.loss
    assert half.metrics["loss/kl"] == 0.5 * full.metrics["loss/kl"]


def test_energy_weights_by_hand():
    """On policy, flat, no KL: c_g = (A_g - mean A) / (G T). G = 2, T = .1, A = (3, 1): +-5.

    dL/dlog pi_g = -A_g / G and dlog pi_h / dE_g = -(1[g = h] - 1/G) / T.
    """
    energy = torch.tensor([[0.3, 0.3]])
    output, weight = energy_weights(
        energy, energy, None, torch.tensor([[3.0, 1.0]]), ones(1), 0.1, NO_KL
    )
    torch.testing.assert_close(weight, torch.tensor([[5.0, -5.0]]))
    assert output.loss.item() == pytest.approx(-2)
    assert not output.loss.requires_grad
    assert not weight.requires_grad


def test_energy_weights_of_a_group_sum_to_zero():
    energy, old, reference = torch.rand(3, 4, 8, dtype=torch.float64).unbind()
    advantage = torch.randn(4, 8, dtype=torch.float64)
    _, weight = energy_weights(energy, old, reference, advantage, ones(4), 0.07, DEFAULT)
    assert weight.abs().max() > 0.1
    torch.testing.assert_close(weight.sum(dim=1), torch.zeros(4, dtype=torch.float64))


class Toy(torch.nn.Module):
    """A velocity model with a weight per use, so that every part of the chain is exercised."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix = torch.nn.Parameter(torch.randn(3, 3, generator=generator, dtype=torch.float64))
        self.bias = torch.nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64))

    def forward(self, state: Tensor) -> Tensor:
        mixed = torch.einsum("...fchw,cd->...fdhw", state, self.mix)
        return torch.tanh(mixed + self.bias[:, None, None])


@pytest.mark.parametrize("space", ["velocity", "x0"])
@pytest.mark.parametrize("temperature", [0.02, 1.0])
def test_one_branch_at_a_time_gives_the_gradient_of_one_pass(space: str, temperature: float):
    generator = torch.Generator().manual_seed(1)
    # groups 2, branches 4, blocks 2, steps 3, frames 1, channels 3, 2 x 2
    state, noise = (
        torch.randn(2, 4, 2, 3, 1, 3, 2, 2, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    sigmas = torch.tensor([1.0, 0.8, 0.6])
    config = EnergyConfig(space=space, temperature=temperature, grad_steps=2)
    model = Toy()
    recorded = (model(state) + 0.3 * noise).detach()

    def energies(rows: slice = slice(None), groups: slice = slice(None)) -> Tensor:
        part = (groups, rows)
        return trajectory_velocity_energy(model(state[part]), recorded[part], sigmas, config)

    spread = 3 * temperature * torch.rand(3, 2, 4, generator=generator)
    old, reference = energies().detach() + 0.02 * spread[0], energies().detach() + spread[1]
    advantage, scale = torch.randn(2, 4, generator=generator), torch.tensor([1.0, 0.5])

    log_probs = [branch_log_probs(e, temperature) for e in (energies(), old, reference)]
    one_pass = kvpo_loss(*log_probs, advantage, scale, DEFAULT)
    one_pass.loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    assert all(g.abs().max() > 1e-4 for g in expected)

    model.zero_grad()
    with torch.no_grad():
        energy = energies()
    output, weight = energy_weights(energy, old, reference, advantage, scale, temperature, DEFAULT)
    for p in range(2):
        for g in range(4):
            one = energies(slice(g, g + 1), slice(p, p + 1))
            (weight[p, g] * one).sum().backward()
    torch.testing.assert_close(output.loss, one_pass.loss.detach())
    for actual, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(actual.grad, wanted, rtol=2e-5, atol=1e-6)


def test_energy_weights_leave_the_callers_graph_alone():
    energy = torch.rand(1, 4, requires_grad=True)
    with torch.no_grad():
        _, weight = energy_weights(energy, energy, None, torch.randn(1, 4), ones(1), 1.0, NO_KL)
    assert weight.abs().max() > 0
    assert energy.grad is None


def test_what_is_not_finite_is_named():
    good, advantage = logs([0.5, 0.5]), torch.tensor([[1.0, -1.0]])
    bad = torch.tensor([[0.0, math.nan]])
    cases = [
        ((bad, good, good, advantage), r"current policy are not finite.*\[0, 1\]"),
        ((good, bad, good, advantage), "old policy are not finite"),
        ((good, good, bad, advantage), "reference policy are not finite"),
        ((good, good, good, bad), "advantages are not finite in 1 of 2"),
    ]
    for inputs, message in cases:
        with pytest.raises(ValueError, match=message):
            kvpo_loss(*inputs, ones(1), DEFAULT)


def test_a_ratio_that_overflows_names_the_surrogate_and_the_remedy():
    log_prob, old = torch.tensor([[0.0, -200.0]]), torch.tensor([[-200.0, 0.0]])
    with pytest.raises(ValueError, match=r"loss/surrogate is inf.*energy\.temperature"):
        kvpo_loss(log_prob, old, None, torch.tensor([[-1.0, 1.0]]), ones(1), DEFAULT)


def test_shapes_that_disagree_are_named():
    good = logs([0.5, 0.5])
    with pytest.raises(ValueError, match="advantages have shape"):
        kvpo_loss(good, good, None, torch.ones(2), ones(1), DEFAULT)
    with pytest.raises(ValueError, match="one factor per group"):
        kvpo_loss(good, good, None, good, torch.ones(1, 1), DEFAULT)
