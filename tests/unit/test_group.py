"""A group: one prefix, branches that differ by their routes alone, and pages that all come back."""

from __future__ import annotations

import pytest
import torch

from megatron_kvpo.flow import add_noise, clean_from_velocity, sampler_sigmas
from megatron_kvpo.model.pages import PageTable
from megatron_kvpo.parallel.seeds import noise
from megatron_kvpo.records import RoutingPlan
from megatron_kvpo.rollout.group import GroupNoise, roll_out_group
from megatron_kvpo.rollout.sampler import generate_videos
from megatron_kvpo.routing import context_frames
from tests.unit import small

ranks = small.ranks


@pytest.fixture(scope="module")
def tiny(ranks):
    return small.build(ranks)


@pytest.fixture(autouse=True)
def no_leak(tiny):
    yield
    assert tiny.world.pool.num_free == tiny.num_pages, "pages leaked"


def rolled(tiny, *arguments, **more):
    """A group whose prefix is let go at once."""
    sampled = tiny.roll_out(*arguments, **more)
    sampled.release()
    return sampled.group


def test_a_whole_group_with_its_replays_gives_every_page_back(tiny):
    prompt = small.switching(12, 15)
    sampled = tiny.roll_out(prompt=prompt)
    held = len(sampled.prefix.tables[0].pages)
    assert tiny.world.pool.num_free == tiny.num_pages - held, "a group keeps its prefix alone"
    tiny.energies(sampled)
    tiny.energies(sampled, "current", [0, 1], grad=True).sum().backward()
    tiny.policy.optimizer.zero_grad()
    assert tiny.world.pool.num_free == tiny.num_pages - held, "a replay kept pages"
    sampled.release()
    assert tiny.world.pool.num_free == tiny.num_pages


def test_the_prefix_is_the_same_in_all_and_branches_differ_from_the_fork_on(tiny):
    group = rolled(tiny)
    latent = group.latent_NFCHW
    assert latent.shape == (4, 21, 4, 4, 4)
    assert torch.equal(latent[:, :12], latent[:1, :12].expand(4, -1, -1, -1, -1))
    for block in range(12, 21, 3):
        rows = latent[:, block : block + 3].flatten(1)
        assert len({tuple(row.tolist()) for row in rows}) == 4, f"rows agree at frame {block}"


def test_the_anchor_is_the_video_without_any_exploration(tiny, ranks):
    """Bit for bit: same prefix, same noises, same batch; its rows do not see each other."""
    plain = rolled(small.build(ranks, "routing.exploration=none"))
    anchor = rolled(tiny).latent_NFCHW[-1]
    assert all(torch.equal(row, anchor) for row in plain.latent_NFCHW)


def test_the_anchor_is_the_video_that_an_evaluation_makes_of_the_same_noises(tiny):
    """Through switches before, at and after the fork; (seed, a, b, block) names both noises."""
    prompt = small.switching(6, 12, 18, index=2)
    plan, sequences = tiny.plan(), tiny.stages.sequences
    noises = GroupNoise(tiny.world, 9, prompt.index, 4)
    sampled = roll_out_group(tiny.world, tiny.encode, prompt, plan, noises, sequences)
    sampled.release()
    video = generate_videos(tiny.world, tiny.encode, [prompt], [4], 9)[0]
    torch.testing.assert_close(sampled.group.latent_NFCHW[-1], video, rtol=1e-4, atol=1e-4)


def test_without_exploration_no_branch_leaves_the_anchor(ranks):
    tiny = small.build(ranks, "routing.exploration=none")
    group = rolled(tiny)
    trajectory = group.trajectory
    for held in (group.latent_NFCHW, trajectory.state_NPTFCHW, trajectory.velocity_NPTFCHW):
        assert torch.equal(held, held[-1:].expand_as(held))


def test_a_branch_routed_to_the_plain_window_repeats_the_anchor_to_the_end(tiny):
    plan = RoutingPlan(
        fork_frame=12, num_blocks=1,
        routed_frames_G=((6, 7, 8, 9, 10), (3, 4, 5, 6, 7), (3, 5, 7, 9, 10)),
    )  # fmt: skip
    latent = rolled(tiny, plan).latent_NFCHW
    assert torch.equal(latent[0], latent[3])
    assert not torch.equal(latent[1], latent[3])
    assert not torch.equal(latent[2], latent[3])


def test_every_pass_of_a_rollout_reads_the_frames_its_plan_names(tiny, monkeypatch):
    asked: list[tuple[int, ...]] = []
    lookup = PageTable.lookup

    def spy(self, frames):
        asked.append(tuple(frames))
        return lookup(self, frames)

    monkeypatch.setattr(PageTable, "lookup", spy)
    plan = tiny.plan(fork=12)
    rolled(tiny, plan)
    stream, routing = tiny.config.stream, tiny.config.routing
    expected = []
    for frame in range(0, stream.num_frames, stream.block_frames):
        rows = range(4) if frame >= plan.fork_frame else (3,)
        seen = [tuple(context_frames(frame, plan, row, stream, routing)) for row in rows]
        last = frame + stream.block_frames == stream.num_frames
        expected += seen * (4 if last else 5)  # denoising steps, and the pass that fills the cache
    assert asked == expected


def test_a_trajectory_leads_to_the_finished_blocks_through_the_shared_noises(tiny):
    group = rolled(tiny)
    stream = tiny.config.stream
    sigmas, noises = sampler_sigmas(stream.steps, stream.shift), tiny.noises()
    states, velocities = group.trajectory.state_NPTFCHW, group.trajectory.velocity_NPTFCHW
    assert states.shape == velocities.shape == (4, 2, 4, 3, 4, 4, 4)
    for block in range(2):
        start = 12 + 3 * block
        draw = noises.shared(start, 4)
        assert torch.equal(states[:, block, 0], draw(0))
        for step, sigma in enumerate(sigmas):
            clean = clean_from_velocity(states[:, block, step], velocities[:, block, step], sigma)
            if step + 1 < len(sigmas):
                following = add_noise(clean, draw(step + 1), sigmas[step + 1])
                assert torch.equal(states[:, block, step + 1], following)
        assert torch.equal(group.latent_NFCHW[:, start : start + 3], clean)


def test_euler_follows_the_ode_and_draws_one_noise(ranks):
    tiny = small.build(ranks, "stream.sampler=euler")
    group = rolled(tiny)
    sigmas = sampler_sigmas(tiny.config.stream.steps, tiny.config.stream.shift)
    states, velocities = group.trajectory.state_NPTFCHW, group.trajectory.velocity_NPTFCHW
    for step in range(3):
        following = states[:, :, step] + (sigmas[step + 1] - sigmas[step]) * velocities[:, :, step]
        assert torch.equal(states[:, :, step + 1], following)


def test_a_rank_with_some_branches_makes_them_as_the_whole_group_does(tiny):
    whole = rolled(tiny)
    part = rolled(tiny, sequences=(1, 3))
    assert part.sequences == (1, 3)
    torch.testing.assert_close(part.latent_NFCHW, whole.latent_NFCHW[[1, 3]], rtol=1e-4, atol=1e-4)


def test_context_noise_changes_what_the_cache_holds_alike_in_all_rows(ranks, tiny):
    noisy = small.build(ranks, "stream.context_noise=0.1")
    group, plain = rolled(noisy), rolled(tiny)
    assert torch.equal(group.latent_NFCHW[:, :3], plain.latent_NFCHW[:, :3])
    assert not torch.equal(group.latent_NFCHW[:, 3:6], plain.latent_NFCHW[:, 3:6])
    same = rolled(small.build(ranks, "stream.context_noise=0.1", "routing.exploration=none"))
    assert torch.equal(same.latent_NFCHW[0], same.latent_NFCHW[-1])
    assert torch.equal(same.latent_NFCHW[-1], group.latent_NFCHW[-1])


@pytest.mark.parametrize("frame", [6, 9, 12, 15, 18])
def test_a_switch_before_at_and_after_the_fork_changes_all_rows_from_there_on(tiny, frame):
    plain = rolled(tiny).latent_NFCHW
    switched = rolled(tiny, prompt=small.switching(frame)).latent_NFCHW
    assert torch.equal(switched[:, :frame], plain[:, :frame])
    moved = (switched != plain)[:, frame:].flatten(2).any(2)
    assert moved.all()


@pytest.mark.parametrize("frame", [12, 15])
def test_a_branch_routed_to_the_window_is_the_anchor_through_a_switch(tiny, frame):
    """At the fork and inside the policy window; the second block's window is frames 9 to 14."""
    plan = RoutingPlan(
        fork_frame=12, num_blocks=1 + (frame == 15),
        routed_frames_G=((6, 7, 8, 9, 10), (3, 4, 5, 6, 7), (3, 5, 7, 9, 10)),
    )  # fmt: skip
    latent = rolled(tiny, plan, small.switching(frame)).latent_NFCHW
    assert torch.equal(latent[0, :15], latent[3, :15])
    assert torch.equal(latent[0], latent[3]) == (frame == 12)


def test_all_sequences_share_the_groups_noises_and_no_other_groups(tiny):
    noises = tiny.noises()
    for step in range(4):
        drawn = noises.shared(12, 3)(step)
        assert torch.equal(drawn, drawn[:1].expand_as(drawn))
    others = [
        tiny.noises(small.PROMPTS[1]).shared(12, 1)(0), tiny.noises(update=1).shared(12, 1)(0),
        noises.shared(15, 1)(0), noises.shared(12, 1)(1),
    ]  # fmt: skip
    assert not any(torch.equal(other, noises.shared(12, 1)(0)) for other in others)


def test_a_branchs_own_noise_is_mixed_in_by_strength_and_stays_normal(ranks):
    tiny = small.build(ranks, "routing.exploration=noise", "routing.noise_strength=0.25")
    noises = tiny.noises()
    shared, mixed = noises.shared(12, 4), noises.mixed(12, (0, 1, 2, 3))
    for step in range(4):
        base, rows = shared(step)[0], mixed(step)
        assert torch.equal(rows[3], base), "the anchor's noise is the shared one"
        for branch in range(3):
            own = noise(tuple(base.shape), *noises.key(12), step, "branch", branch)
            torch.testing.assert_close(rows[branch], 0.75**0.5 * base + 0.5 * own)
    alone = noises.mixed(12, (2, 3))(1)
    assert torch.equal(alone, mixed(1)[2:]), "a branch's noise depends on its rank's rows"


def test_exploration_by_noise_ends_with_the_policy_window(ranks, monkeypatch):
    tiny, mixed_at = small.build(ranks, "routing.exploration=noise"), []
    mixed = GroupNoise.mixed

    def spy(self, frame, sequences):
        mixed_at.append(frame)
        return mixed(self, frame, sequences)

    monkeypatch.setattr(GroupNoise, "mixed", spy)
    group = rolled(tiny)
    assert mixed_at == [12, 15]
    states = group.trajectory.state_NPTFCHW
    assert not any(torch.equal(states[n], states[3]) for n in range(3))
    anchor = rolled(small.build(ranks, "routing.exploration=none")).latent_NFCHW[-1]
    assert torch.equal(group.latent_NFCHW[-1], anchor)
