"""Who replays what, when some branch ranks have rolled out more than others."""

from __future__ import annotations

import pytest
import torch

from megatron_kvpo.parallel.collect import shares
from megatron_kvpo.parallel.groups import start_ranks, stop_ranks
from megatron_kvpo.training.replays import Ask, Replays, share_replays
from tests.ranks import on_ranks
from tests.unit import small

ROLLOUT, REPLAY = (
    149,
    24,
)  # passes of a row: 30 blocks of 5, 5 blocks of 4, each but the last filled


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("count", [8, 9])
def test_all_sequences_are_replayed_once_by_ranks_that_end_together(size, count):
    parts = shares(9, size)
    loads = [len(part) * (ROLLOUT + REPLAY) for part in parts]
    for given in (None, loads):
        duty = share_replays(parts, count, given, REPLAY)
        assert sorted(duty.order) == list(range(count))
        assert sum(duty.sizes) == count
        for part, stay, come in zip(parts, duty.stay, duty.come, strict=True):
            assert set(stay) <= set(part)
            assert not set(come) & set(part)
            assert not (come and len(stay) < len([n for n in part if n < count]))
        if given is None:
            assert not any(duty.come)
    done = [load + REPLAY * n for load, n in zip(loads, duty.sizes, strict=True)]
    working = [end for end, n in zip(done, duty.sizes, strict=True) if n]
    assert max(working) - min(done) <= REPLAY


def test_two_ranks_share_as_the_recipe_counts_on():
    """Five and four rollouts and replays: the second rank makes the reference's eight."""
    duty = share_replays(shares(9, 2), 8, [5 * (ROLLOUT + REPLAY), 4 * (ROLLOUT + REPLAY)], REPLAY)
    assert duty.stay == ((), (5, 6, 7))
    assert duty.come == ((), (0, 1, 2, 3, 4))
    assert duty.order == [5, 6, 7, 0, 1, 2, 3, 4]


def replayed(rank: int, overrides: list[str]) -> dict[str, torch.Tensor]:
    """One update's energies and kept velocities, and which sequences this rank replayed."""
    config, made, batch = small.config(*overrides), [], Replays._batch
    ranks = start_ranks(config.parallel, "cpu")
    try:
        tiny = small.build(ranks, *overrides)
        tiny.stir("current", "old", "reference", size=0.05)
        asks = [Ask(slot="current"), Ask(slot="old"),
                Ask(slot="reference", keep=True, anchor=False, moves=True)]  # fmt: skip
        groups = tiny.stages.explore(0)
        Replays._batch = lambda *a: (made.append((a[3].slot, len(a[4]))), batch(*a))[1]
        current, old, reference = tiny.stages.replays(0, groups, asks)
        latent = groups[0].group.latent_NFCHW
        for sampled in groups:
            sampled.release()
        return {
            "current": current.branch_PG, "old": old.branch_PG, "anchor": old.anchor_P,
            "reference": reference.branch_PG, "velocities": reference.velocities[0],
            "latent": latent, "free": torch.tensor(tiny.world.pool.num_free - tiny.num_pages),
            "made": torch.tensor(sum(n for slot, n in made if slot == "reference")),
        }  # fmt: skip
    finally:
        Replays._batch = batch
        stop_ranks()


@pytest.mark.gloo
@pytest.mark.parametrize("exploration", ["chr", "noise"])
def test_moved_replays_change_no_energy(exploration, tmp_path):
    """3 branches and the anchor on 3 ranks: one has rolled out two, another the anchor only."""
    base = ["policy.groups_per_update=2", f"routing.exploration={exploration}"]
    (alone,) = on_ranks(1, replayed, base, folder=tmp_path)
    shared = on_ranks(3, replayed, [*base, "parallel.branch=3"], folder=tmp_path)
    for found in shared:
        assert found["free"] == 0
        for name in ("current", "old", "reference", "velocities", "latent"):
            scale = float(alone[name].abs().max())
            assert float((found[name] - alone[name]).abs().max()) <= 1e-4 * scale, name
        assert not found["anchor"].any() or exploration == "noise"
    made = [int(found["made"]) for found in shared]
    assert int(alone["made"]) == sum(made) == 6
    assert made[0] < 4, "the rank with two rollouts a group kept their replays"
