"""A group whose rows go in turns."""

from __future__ import annotations

import pytest
import torch

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
