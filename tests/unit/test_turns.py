"""A group whose rows go in turns, or without the anchor."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_kvpo.parallel.groups import Axis
from megatron_kvpo.training import replays as replays_module
from megatron_kvpo.training.stages import Stages
from tests.unit import small

ranks = small.ranks


@pytest.mark.parametrize("rows", [1, 3])
def test_a_group_in_turns_is_the_group_at_once(ranks, rows):
    """3 branches and the anchor: the same rows, an anchor's energy of 0, and fewer pages."""
    found = []
    for more in ((), (f"policy.rollout_rows={rows}",)):
        tiny = small.build(ranks, *more)
        tiny.stir("current", "old")
        pool, lowest = tiny.world.pool, [tiny.num_pages]
        take = pool.take
        pool.take = lambda take=take, pool=pool, lowest=lowest: (
            lowest.append(pool.num_free - 1), take())[1]  # fmt: skip
        groups = tiny.stages.explore(0)
        used = tiny.num_pages - min(lowest)
        old = tiny.stages.energies(0, groups, "old", keep=True)
        current = tiny.stages.energies(0, groups, "current")
        assert not old.anchor_P.any()
        found.append((used, groups[0].group, old, current.branch_PG))
        for sampled in groups:
            sampled.release()
        assert pool.num_free == tiny.num_pages
    (more, whole, old, energies), (fewer, turns, *others) = found
    assert fewer < more
    assert turns.sequences == whole.sequences
    torch.testing.assert_close(turns.latent_NFCHW, whole.latent_NFCHW, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(others[0].velocities[0], old.velocities[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(others[1], energies, rtol=1e-3, atol=1e-5)


def test_a_replay_may_leave_the_anchor_out_even_where_a_rank_has_nothing_else(ranks, monkeypatch):
    monkeypatch.setattr(replays_module, "gather_rows", lambda rows, *_: rows)
    tiny = small.build(ranks)
    groups = tiny.stages.explore(0)
    tiny.stir("reference")
    whole = tiny.stages.energies(0, groups, "reference")
    found = tiny.stages.energies(0, groups, "reference", keep=True, anchor=False)
    torch.testing.assert_close(found.branch_PG, whole.branch_PG, rtol=1e-5, atol=1e-7)
    assert found.anchor_P.isnan().all()
    assert not whole.anchor_P.isnan().any()
    branches = tiny.config.routing.num_branches
    assert found.velocities[0].shape == groups[0].group.trajectory.velocity_NPTFCHW[1:].shape
    axis = Axis(size=branches, rank=branches - 1, group=ranks.branch.group)
    stages = Stages(
        tiny.config, dataclasses.replace(ranks, branch=axis), tiny.policy, tiny.world, tiny.encode,
        tiny.stages.scorer, tiny.stages.prompts,
    )  # fmt: skip
    assert stages.sequences == (branches,)
    alone = stages.energies(0, groups, "reference", keep=True, anchor=False)
    assert alone.branch_PG.shape == (len(groups), 0)
    assert alone.velocities[0].shape[0] == 0
    for sampled in groups:
        sampled.release()


def test_every_rank_sends_as_many_batches_backward(ranks):
    """8 branches, by one rank of several; a GPU takes as long for one as for a pair."""
    cases = ((2, "cpu", [4, 4]), (3, "cpu", [2, 3, 3]), (4, "cuda", [2, 2, 2, 2]))
    for size, device, counts in cases:
        axis = Axis(size=size, rank=0, group=ranks.branch.group)
        tiny = small.build(ranks, "routing.num_branches=8", "policy.max_rows=2")
        place = dataclasses.replace(ranks, branch=axis, device=torch.device(device))
        stages = Stages(
            tiny.config, place, tiny.policy, tiny.world, tiny.encode, tiny.stages.scorer,
            tiny.stages.prompts,
        )  # fmt: skip
        parts = stages._backward_parts()
        assert [n for part in parts for n in part] == list(range(8))
        assert sorted(map(len, parts)) == sorted(counts)
