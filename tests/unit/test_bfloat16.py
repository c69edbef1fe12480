"""A bfloat16 base under float32 adapters: close to float32, and every invariant still exact."""

from __future__ import annotations

import pytest
import torch

from tests.unit import small

ranks = small.ranks
BF16 = "model.dtype=bfloat16"


def velocities(ranks, *overrides: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A block behind a cached prefix, under the base and under a stirred adapter."""
    tiny = small.build(ranks, *overrides)
    stream = tiny.streamed(12)
    with torch.no_grad():
        base = stream.velocity(tiny.latents(3, name="noisy"), 0.9375)
        tiny.stir("current")
        with tiny.policy.acting("current"):
            adapted = stream.velocity(tiny.latents(3, name="noisy"), 0.9375)
    stream.release()
    return base, adapted


def test_the_output_is_the_float32_models_to_bfloat16s_precision(ranks):
    for ours, exact in zip(velocities(ranks, BF16), velocities(ranks), strict=True):
        assert ours.dtype == torch.float32
        error = float((ours - exact).norm() / exact.norm())
        assert 1e-4 < error < 2e-2  # 2^-9 a rounding; exactly float32 would mean it is not on


def test_base_and_pages_are_bfloat16_and_what_trains_is_float32(ranks):
    tiny = small.build(ranks, BF16)
    for name, parameter in tiny.model.named_parameters():
        wanted = torch.float32 if ".adapter." in name else torch.bfloat16
        assert parameter.dtype == wanted, name
    assert tiny.world.pool.key.dtype == tiny.world.pool.value.dtype == torch.bfloat16


@pytest.mark.parametrize("more", [(), ("model.recompute=true",), ("memory.bank_frames=2",)])
def test_the_anchors_energy_is_zero_and_a_replay_repeats_its_bits(ranks, more):
    tiny = small.build(ranks, BF16, *more)
    tiny.stir("old", size=0.05)
    groups = tiny.stages.explore(0)
    first, again = (tiny.stages.energies(0, groups, "old") for _ in range(2))
    assert not first.anchor_P.any()
    assert (first.branch_PG > 0).all()
    assert torch.equal(first.branch_PG, again.branch_PG)
    energy = tiny.energies(groups[0], "current", grad=True)
    with tiny.policy.acting("current"):  # recomputation runs under the policy that is on
        energy.sum().backward()
    gradients = [p.main_grad for p in tiny.policy.trained().values()]
    assert all(g.dtype == torch.float32 for g in gradients)
    assert any(g.any() for g in gradients)
    tiny.policy.optimizer.zero_grad()
    for sampled in groups:
        sampled.release()


def test_weights_that_train_may_not_be_bfloat16(ranks):
    with pytest.raises(ValueError, match=r"model.dtype is bfloat16 and policy.mode full"):
        small.config(BF16, "policy.mode=full")
