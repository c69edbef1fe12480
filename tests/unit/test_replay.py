"""Replays: the anchor costs nothing, branches do, and the gradient is that of the energy."""

from __future__ import annotations

import pytest
import torch

from megatron_kvpo.algorithm.advantage import advantages
from megatron_kvpo.algorithm.energy import branch_log_probs, trajectory_velocity_energy
from megatron_kvpo.config import AdvantageConfig
from megatron_kvpo.flow import clean_from_velocity, sampler_sigmas
from megatron_kvpo.model.recompute import Recompute
from megatron_kvpo.parallel.seeds import noise
from megatron_kvpo.rollout.replay import replay, replay_targets
from tests.unit import small

ranks = small.ranks


@pytest.fixture(scope="module")
def tiny(ranks):
    """Four policies away from the base: current and old alike, the reference elsewhere."""
    tiny = small.build(ranks)
    tiny.stir("current", "reference", size=0.05)
    tiny.policy.bank.copy("current", "old")
    return tiny


@pytest.fixture
def group(tiny):
    sampled = tiny.roll_out()
    yield sampled
    sampled.release()


def energies_of(ranks, *overrides: str, slot: str = "old", prompt=small.ONE) -> torch.Tensor:
    tiny = small.build(ranks, *overrides)
    tiny.stir("old", "reference", size=0.05)
    sampled = tiny.roll_out(prompt=prompt)
    found = tiny.energies(sampled, slot)
    sampled.release()
    assert tiny.world.pool.num_free == tiny.num_pages
    return found


def test_the_anchor_has_energy_zero_and_branches_more(tiny, group):
    energy = tiny.energies(group)
    assert energy.dtype == torch.float32
    assert energy[-1] == 0
    assert (energy[:-1] > 1e-3).all()
    assert len(set(energy.tolist())) == 4


def test_a_replay_repeats_its_bits(tiny, group):
    assert torch.equal(tiny.energies(group), tiny.energies(group))


def test_the_ratio_before_the_first_update_is_one_bit_for_bit(tiny, group):
    old, current = tiny.energies(group, "old")[:-1], tiny.energies(group, "current")[:-1]
    ratio = (branch_log_probs(current, 0.01) - branch_log_probs(old, 0.01)).exp()
    assert (ratio == 1).all()


def test_another_policy_has_other_energies_and_the_anchor_none_of_zero(tiny, group):
    energy = tiny.energies(group, "reference")
    assert (energy > 0).all()
    assert not torch.equal(energy, tiny.energies(group))


def test_energies_do_not_depend_on_which_rows_go_together(tiny, group):
    whole = tiny.energies(group)
    for rows in ([0], [2, 1], [3]):
        torch.testing.assert_close(tiny.energies(group, rows=rows), whole[rows])


def test_energy_is_the_sum_over_blocks_and_steps_of_the_replayed_velocities(tiny, group):
    """Against the formula on a replay written out by hand: recorded latents, plain context."""
    stream_config, trajectory = tiny.config.stream, group.group.trajectory
    sigmas = sampler_sigmas(stream_config.steps, stream_config.shift)
    with tiny.policy.acting("reference"), torch.no_grad():
        stream = group.prefix.fork(4, tiny.text(*small.TEXTS[:1] * 4))
        blocks = []
        for block in range(2):
            states = trajectory.state_NPTFCHW[:, block]
            steps = [stream.velocity(states[:, i], s) for i, s in enumerate(sigmas)]
            blocks.append(torch.stack(steps, 1))
            stream.commit(group.group.latent_NFCHW[:, stream.frame : stream.frame + 3])
        stream.release()
    expected = trajectory_velocity_energy(
        torch.stack(blocks, 1), trajectory.velocity_NPTFCHW, torch.tensor(sigmas),
        tiny.config.energy,
    )  # fmt: skip
    torch.testing.assert_close(tiny.energies(group, "reference"), expected)


def test_drift_is_the_energy_with_the_references_velocities_as_targets(ranks):
    """0 against its own velocities; against another policy's, the formula; the energy as before."""
    tiny = small.build(ranks)
    group = tiny.roll_out()
    sigmas = sampler_sigmas(tiny.config.stream.steps, tiny.config.stream.shift)
    rows, noises = [0, 2], tiny.noises(group.group.prompt)

    def replayed(slot, reference=None):
        with tiny.policy.acting(slot), torch.no_grad():
            return replay(group, tiny.encode, noises, tiny.config.energy, rows, keep=True,
                          reference_BPTFCHW=reference)  # fmt: skip

    tiny.stir("current")
    reference, current = replayed("reference"), replayed("current")
    assert torch.equal(replayed("current", current.velocity_BPTFCHW).drift_B, torch.zeros(2))
    found = replayed("current", reference.velocity_BPTFCHW)
    expected = trajectory_velocity_energy(
        current.velocity_BPTFCHW, reference.velocity_BPTFCHW, torch.tensor(sigmas),
        tiny.config.energy,
    )  # fmt: skip
    assert (expected > 0).all()
    torch.testing.assert_close(found.drift_B, expected)
    assert torch.equal(found.energy_B, current.energy_B)
    assert torch.equal(found.energy_B, tiny.energies(group, "current", rows))
    group.release()


def test_the_replay_reads_the_plain_window_and_the_prefix_of_the_sampling_policy(
    tiny, group, monkeypatch
):
    """Whoever replays: the prefix's pages are read, never written."""
    pool, pages = tiny.world.pool, list(group.prefix.tables[0].pages.values())
    before = pool.key[:, pages].clone(), pool.value[:, pages].clone()
    tiny.energies(group, "reference")
    tiny.energies(group, "current", grad=True).sum().backward()
    tiny.policy.optimizer.zero_grad()
    assert torch.equal(pool.key[:, pages], before[0])
    assert torch.equal(pool.value[:, pages], before[1])


@pytest.mark.parametrize("frames", [(12,), (15,), (18,), (12, 15), (6,), (9,), (3, 6, 9)])
def test_the_anchor_has_energy_zero_through_any_switch(ranks, frames):
    """At the fork, inside the window (one block and two in), and before frame 15."""
    energy = energies_of(
        ranks, "routing.num_routed_blocks=3", prompt=small.switching(*frames)
    )  # fmt: skip
    assert energy[-1] == 0
    assert (energy[:-1] > 1e-3).all()


OTHER_SETTINGS = [
    "stream.sampler=euler", "stream.context_noise=0.1", "energy.replay_context=self",
    "energy.space=x0", "routing.num_recent_frames=3", "stream.window_frames=9",
    "energy.step_weight=1.0",
]  # fmt: skip


@pytest.mark.parametrize("setting", OTHER_SETTINGS)
def test_other_settings_change_the_energies_and_not_the_anchors(ranks, setting):
    overrides = [setting]
    if setting == "stream.window_frames=9":  # fewer frames to route
        overrides.append("routing.num_recent_frames=0")
    plain = energies_of(ranks)
    energy = energies_of_any_route(ranks, *overrides)
    assert energy[-1] == 0
    assert (energy[:-1] > 1e-4).all()
    assert not torch.equal(energy, plain)


def energies_of_any_route(ranks, *overrides: str) -> torch.Tensor:
    """As energies_of, with routes as long as the settings want them."""
    tiny = small.build(ranks, *overrides)
    tiny.stir("old", size=0.05)
    stream, routing = tiny.config.stream, tiny.config.routing
    past = stream.window_frames - stream.sink_frames - stream.block_frames
    count = past - routing.num_recent_frames
    plan = tiny.plan()
    routes = tuple(route[:count] for route in plan.routed_frames_G)
    plan = type(plan)(fork_frame=12, num_blocks=2, routed_frames_G=routes)
    sampled = tiny.roll_out(plan)
    found = tiny.energies(sampled)
    sampled.release()
    return found


def test_energy_on_clean_estimates_is_sigma_squared_times_that_on_velocities(ranks):
    """One denoising step: one sigma for the whole energy."""
    one = ("stream.steps=[0.5]", "energy.grad_steps=1")
    velocity = energies_of(ranks, *one)
    clean = energies_of(ranks, *one, "energy.space=x0")
    sigma = 5 * 0.5 / (1 + 4 * 0.5)
    torch.testing.assert_close(clean, sigma**2 * velocity)


def test_replaying_on_its_own_predictions_differs_from_the_second_block_on(ranks):
    for blocks, equal in ((1, True), (2, False)):
        setting = f"routing.num_routed_blocks={blocks}"
        recorded = energies_of(ranks, setting)
        own = energies_of(ranks, setting, "energy.replay_context=self")
        assert torch.equal(recorded, own) == equal
        assert own[-1] == 0


def test_without_exploration_energies_and_advantages_are_zero(ranks):
    tiny = small.build(ranks, "routing.exploration=none")
    tiny.stir("old")
    sampled = tiny.roll_out()
    assert not tiny.energies(sampled).any()
    (table,) = tiny.stages.score([sampled])
    advantage, _ = advantages(table, AdvantageConfig(), (0, 0, 0))
    assert not advantage.any()
    sampled.release()


@pytest.fixture
def by_noise(ranks):
    tiny = small.build(ranks, "routing.exploration=noise")
    tiny.stir("old", "current", size=0.05)
    tiny.policy.bank.copy("old", "current")
    sampled = tiny.roll_out()
    yield tiny, sampled
    sampled.release()


def test_branches_by_noise_are_measured_from_the_anchors_states(by_noise):
    tiny, sampled = by_noise
    energy = tiny.energies(sampled)
    assert energy[-1] == 0
    assert (energy[:-1] > 1e-3).all()
    targets, recorded = replay_targets(sampled), sampled.group.trajectory
    anchor = recorded.state_NPTFCHW[-1:].expand_as(recorded.state_NPTFCHW)
    assert torch.equal(targets.state_NPTFCHW, anchor)
    sigmas = torch.tensor(sampler_sigmas(tiny.config.stream.steps, 5.0)).view(1, 1, -1, 1, 1, 1, 1)
    aimed = clean_from_velocity(targets.state_NPTFCHW, targets.velocity_NPTFCHW, sigmas)
    reached = clean_from_velocity(recorded.state_NPTFCHW, recorded.velocity_NPTFCHW, sigmas)
    torch.testing.assert_close(aimed, reached, rtol=1e-4, atol=1e-4)


def test_branches_by_noise_have_a_gradient(by_noise):
    tiny, sampled = by_noise
    tiny.energies(sampled, "current", [0, 1, 2], grad=True).sum().backward()
    assert all(p.main_grad.any() for p in tiny.policy.trained().values())


def gradients(tiny, sampled, weights=(1.0, 1.0, 1.0, 0.0)) -> dict[str, torch.Tensor]:
    """Of the weighted sum of energies, by autograd through the whole batch."""
    trained = tiny.policy.trained()
    with tiny.policy.acting("current"):
        energy = tiny.energies(sampled, "current", grad=True)
        total = (energy * torch.tensor(weights)).sum()
        found = torch.autograd.grad(total, list(trained.values()))
    return dict(zip(trained, found, strict=True))


def test_every_adapter_gets_a_gradient_the_texts_too_and_the_base_none(tiny, group):
    tiny.energies(group, "current", [0, 1, 2], grad=True).sum().backward()
    trained = tiny.policy.trained()
    assert len(trained) == 2 * 10 * tiny.config.model.num_layers
    for name, p in trained.items():
        assert p.main_grad.any(), name
    assert {n for n in trained if "cross_attn.k" in n or "cross_attn.v" in n}
    for name, p in tiny.model.named_parameters():
        if name not in trained:
            assert not p.requires_grad, name
            assert p.grad is None, name
    tiny.policy.optimizer.zero_grad()


def test_the_first_update_reaches_every_up_projection(ranks):
    """B is zero at the start, so A waits one update; B of the text keys does not."""
    tiny = small.build(ranks)
    sampled = tiny.roll_out()
    for name, gradient in gradients(tiny, sampled).items():
        assert gradient.any() == (".lora_B." in name), name
    sampled.release()


def test_only_the_first_steps_carry_gradient_and_all_count_in_the_value(ranks):
    values, found = {}, {}
    for steps in (1, 2, 4):
        tiny = small.build(ranks, f"energy.grad_steps={steps}")
        tiny.stir("current", "old", size=0.05)
        sampled = tiny.roll_out()
        with_graph = tiny.energies(sampled, "current", grad=True)
        values[steps] = tiny.energies(sampled, "current"), with_graph.detach()
        found[steps] = gradients(tiny, sampled)
        sampled.release()
    assert torch.equal(values[1][0], values[4][0])
    torch.testing.assert_close(values[4][1], values[4][0])
    assert (values[1][1] < values[2][1]).all()
    assert (values[2][1] < values[4][1]).all()
    name = "blocks.0.cross_attn.k.adapter.lora_B.current"
    assert not torch.allclose(found[1][name], found[2][name])
    assert not torch.allclose(found[2][name], found[4][name])


@pytest.mark.parametrize("setting", ["energy.space=velocity", "energy.space=x0"])
def test_the_gradient_is_the_slope_of_the_energy(ranks, setting):
    """Central differences along random directions; one block, so that nothing is detached."""
    tiny = small.build(ranks, "routing.num_routed_blocks=1", setting)
    tiny.stir("current", "old", size=0.05)
    tiny.stir("current", size=0.05)
    sampled = tiny.roll_out()
    found = gradients(tiny, sampled)
    groups = ["lora_A", "lora_B", "blocks.0.cross_attn.k", "blocks.1.cross_attn.v",
              "blocks.0.self_attn.q", "blocks.1.ffn.2"]  # fmt: skip
    for part in groups:
        moved = {n: p for n, p in tiny.policy.trained().items() if part in n}
        way = {n: found[n] / found[n].norm() + 0.1 * noise(tuple(p.shape), "way", n)
               for n, p in moved.items()}  # fmt: skip
        slope, step = sum(float((found[n] * way[n]).sum()) for n in moved), 1e-3
        sides = []
        for sign in (step, -2 * step, step):  # there, to the other side, and back
            with torch.no_grad():
                for n, p in moved.items():
                    p.add_(sign * way[n])
            sides.append(float(tiny.energies(sampled, "current")[:3].double().sum()))
        assert slope > 0.01
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(slope, rel=1e-2), part
    sampled.release()


def test_the_anchors_energy_is_at_a_minimum(tiny, group):
    """Energy 0 is the least there is, so its gradient is 0 too."""
    assert not any(g.any() for g in gradients(tiny, group, (0.0, 0.0, 0.0, 1.0)).values())


@pytest.mark.parametrize("switch", [(), (18,)])
def test_recompute_gives_a_replays_gradients_too(ranks, switch):
    """Three blocks; with a switch before the third its window is rewritten in the cache."""
    found = []
    for recompute in ("false", "true"):
        tiny = small.build(ranks, f"model.recompute={recompute}", "routing.num_routed_blocks=3")
        tiny.stir("current", "old", size=0.05)
        sampled = tiny.roll_out(prompt=small.switching(*switch))
        found.append(gradients(tiny, sampled))
        sampled.release()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_a_replay_that_holds_results_has_the_bits_of_one_that_recomputes(ranks, monkeypatch):
    found = []
    for holds in (0, 2):
        monkeypatch.setattr(Recompute, "_kept", lambda *_, holds=holds: (0, 0, 0, holds))
        tiny = small.build(ranks, "policy.max_rows=2")
        tiny.stir("current", "old", size=0.05)
        sampled, products = tiny.roll_out(), []
        for block in tiny.model.blocks:
            narrow = block.ffn["2"]
            whole = narrow._held.times
            narrow._held.times = lambda *a, whole=whole, products=products, **how: (
                products.append(1) or whole(*a, **how)
            )
        found.append((gradients(tiny, sampled), len(products)))
        sampled.release()
    (here, twice), (there, once) = found
    assert twice > once > 0
    for name, gradient in here.items():
        assert torch.equal(there[name], gradient), name
