"""One update's stages and its policies: gradients exact, weights where they belong."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from megatron_kvpo.algorithm.energy import branch_log_probs
from megatron_kvpo.algorithm.loss import energy_weights, kvpo_loss
from megatron_kvpo.parallel.groups import Axis
from megatron_kvpo.records import RewardTable
from megatron_kvpo.rollout.replay import replay
from megatron_kvpo.routing import draw_plan
from megatron_kvpo.stopwatch import Stopwatch
from megatron_kvpo.training import replays as replays_module
from megatron_kvpo.training import stages as stages_module
from megatron_kvpo.training.stages import Stages
from tests.unit import small

ranks = small.ranks


class Update(NamedTuple):
    """What one pass through the loop left."""

    ratio_PG: torch.Tensor
    advantage_PG: torch.Tensor
    norm: float
    loss: float


def run_update(tiny: small.Small, update: int) -> Update:
    """The loop of train.py, once."""
    policy, stages, config = tiny.policy, tiny.stages, tiny.config
    policy.sync_old(update)
    groups = stages.explore(update)
    advantage_PG, scale_P, _ = stages.advantages(update, groups, stages.score(groups))
    current, old, reference = (
        stages.energies(update, groups, slot)[0] for slot in ("current", "old", "reference")
    )
    temperature = config.energy.temperature
    loss, weight_PG = energy_weights(
        current, old, reference, advantage_PG, scale_P, temperature, config.loss
    )
    policy.optimizer.zero_grad()
    stages.backward(update, groups, weight_PG)
    policy.optimizer.finalize()
    norm = policy.step(update)
    for sampled in groups:
        sampled.release()
    ratio = branch_log_probs(current, temperature) - branch_log_probs(old, temperature)
    return Update(ratio.exp(), advantage_PG, norm, float(loss.loss))


def weights_of(tiny: small.Small, slot: str) -> list[torch.Tensor]:
    if tiny.config.policy.mode == "full":
        return [value.detach().clone() for value in tiny.policy.bank._values(slot).values()]
    adapters = tiny.policy.bank.adapters.values()
    return [t[slot].detach().clone() for a in adapters for t in (a.lora_A, a.lora_B)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def apart(tiny: small.Small) -> small.Small:
    """Three policies that all differ, as in mid-run."""
    tiny.stir("current", "old", "reference", size=0.05)
    return tiny


def whole_gradient(tiny: small.Small, groups, advantage_PG, scale_P) -> dict[str, torch.Tensor]:
    """One graph: all branches' energies, log-probabilities, loss; then autograd."""
    stages, temperature = tiny.stages, tiny.config.energy.temperature
    value_PG, old_PG, reference_PG = (
        stages.energies(0, groups, slot)[0] for slot in ("current", "old", "reference")
    )
    with tiny.policy.acting("current"):
        rows = range(tiny.config.routing.num_branches)
        graph_PG = torch.stack([tiny.energies(g, "current", rows, grad=True) for g in groups])
        energy_PG = graph_PG + (value_PG - graph_PG).detach()  # later steps count in the value
        log_probs = [branch_log_probs(e, temperature) for e in (energy_PG, old_PG, reference_PG)]
        loss = kvpo_loss(*log_probs, advantage_PG, scale_P, tiny.config.loss).loss
        if weight := tiny.config.loss.drift_coefficient:
            loss = loss + weight * whole_drift(tiny, groups)
        trained = tiny.policy.trained()
        return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def whole_drift(tiny: small.Small, groups) -> torch.Tensor:
    """Mean over branches of the squared distance to the reference's velocities, with its graph."""
    kept = tiny.stages.energies(0, groups, "reference", keep=True).velocities
    rows = range(tiny.config.routing.num_branches)
    drifts = []
    with tiny.policy.acting("current"):
        for sampled, velocity in zip(groups, kept, strict=True):
            noises = tiny.noises(sampled.group.prompt)
            found = replay(sampled, tiny.encode, noises, tiny.config.energy, rows, grad=True,
                           reference_BPTFCHW=velocity[: len(rows)])  # fmt: skip
            drifts.append(found.drift_B)
    return torch.stack(drifts).mean()


def sent_backward(tiny: small.Small, *shares: Stages) -> dict[str, torch.Tensor]:
    """Sum of the gradients of Stages.backward of each share, with weights from numbers alone."""
    found = {name: torch.zeros_like(p.main_grad) for name, p in tiny.policy.trained().items()}
    for stages, groups, weight_PG in shares:
        tiny.policy.optimizer.zero_grad()
        drifts = stages.config.loss.drift_coefficient > 0
        reference = stages.energies(0, groups, "reference", keep=drifts)
        stages.backward(0, groups, weight_PG, reference)
        tiny.policy.optimizer.finalize()
        for name, p in tiny.policy.trained().items():
            found[name] += p.main_grad
    tiny.policy.optimizer.zero_grad()
    return found


def assert_close(ours, theirs, limit: float = 1e-5) -> None:
    """Each tensor's error, relative to its size, is below the limit."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert expected.any(), name
        error = float((ours[name] - expected).norm() / expected.norm())
        assert error < limit, f"{name}: {error:.2g}"


def numbers(tiny: small.Small, groups):
    """Advantages, scales and the slopes c_g of one update."""
    stages = tiny.stages
    advantage_PG, scale_P, _ = stages.advantages(0, groups, stages.score(groups))
    energies = [stages.energies(0, groups, s)[0] for s in ("current", "old", "reference")]
    _, weight_PG = energy_weights(
        *energies, advantage_PG, scale_P, tiny.config.energy.temperature, tiny.config.loss
    )
    return advantage_PG, scale_P, weight_PG


TWO_PASS = [
    ("policy.groups_per_update=1",),
    ("routing.num_routed_blocks=1",),
    ("energy.grad_steps=2", "energy.temperature=0.2"),
    ("routing.exploration=noise",),
    ("loss.drift_coefficient=0.5", "energy.grad_steps=3"),
    ("policy.mode=full", "policy.groups_per_update=1"),
]


@pytest.mark.parametrize("overrides", TWO_PASS)
@pytest.mark.parametrize("how", ["policy.max_rows=96", "policy.max_rows=2", "model.recompute=true"])
def test_branches_sent_backward_by_themselves_give_the_gradient_of_the_whole_loss(
    ranks, overrides, how
):
    """c_g from numbers alone, then parts of a group at a time; against a single graph."""
    found = []
    for more in ((how,), ()):
        tiny = small.build(ranks, *overrides, *more)
        if tiny.config.policy.mode == "lora":
            apart(tiny)
        groups = tiny.stages.explore(0)
        advantage_PG, scale_P, weight_PG = numbers(tiny, groups)
        if more:
            found.append(sent_backward(tiny, (tiny.stages, groups, weight_PG)))
        else:
            found.append(whole_gradient(tiny, groups, advantage_PG, scale_P))
        for sampled in groups:
            sampled.release()
        assert tiny.world.pool.num_free == tiny.num_pages
    assert_close(*found, limit=1e-4 if "max_rows=2" in how else 1e-5)  # batches round apart


def test_branches_shared_over_ranks_add_up_to_the_same_gradient(ranks, monkeypatch):
    """Two branch ranks, one after the other in this process, send all branches backward."""
    for module in (stages_module, replays_module):  # they never meet
        monkeypatch.setattr(module, "gather_rows", lambda rows, *_: rows)
    tiny = apart(small.build(ranks))
    whole = tiny.stages.explore(0)
    *_, weight_PG = numbers(tiny, whole)
    shares = []
    for rank in range(2):
        axis = Axis(size=2, rank=rank, group=ranks.branch.group)
        stages = Stages(
            tiny.config, dataclasses.replace(ranks, branch=axis), tiny.policy, tiny.world,
            tiny.encode, tiny.stages.scorer, tiny.stages.prompts,
        )  # fmt: skip
        shares.append((stages, whole, weight_PG))
    assert [stages.sequences for stages, *_ in shares] == [(0, 1), (2, 3)]
    ours = sent_backward(tiny, *shares)
    theirs = sent_backward(tiny, (tiny.stages, whole, weight_PG))
    assert_close(ours, theirs, limit=1e-4)  # their passes had batches of other sizes
    for sampled in whole:
        sampled.release()


def test_groups_come_from_their_coordinates(ranks):
    tiny = small.build(ranks)
    groups = tiny.stages.explore(4)
    assert [g.group.prompt for g in groups] == tiny.stages.prompts.groups_of(4)
    for sampled in groups:
        prompt = sampled.group.prompt
        plan = draw_plan(
            tiny.config.stream, tiny.config.routing, (tiny.config.seed, 4, prompt.index)
        )
        assert sampled.group.plan == plan
        first = tiny.stages.noises(4, prompt.index).shared(plan.fork_frame, 4)(0)
        assert torch.equal(sampled.group.trajectory.state_NPTFCHW[:, 0, 0], first)
        sampled.release()


def test_the_old_policy_samples_and_no_other(ranks):
    tiny = small.build(ranks)
    videos = []
    for slots in ((), ("current", "reference", "ema"), ("old",)):
        tiny.stir(*slots)
        groups = tiny.stages.explore(0)
        videos.append(groups[0].group.latent_NFCHW)
        for sampled in groups:
            sampled.release()
    assert torch.equal(videos[0], videos[1])
    assert not torch.equal(videos[0], videos[2])


def test_energies_are_of_branches_and_anchors_apart(ranks):
    tiny = apart(small.build(ranks))
    groups = tiny.stages.explore(0)
    energy_PG, anchor_P, _ = tiny.stages.energies(0, groups, "old")
    assert energy_PG.shape == (2, 3)
    assert torch.equal(anchor_P, torch.zeros(2))
    assert (energy_PG > 0).all()
    again = tiny.stages.energies(0, groups, "old")
    assert torch.equal(again[0], energy_PG)
    for sampled in groups:
        sampled.release()


def test_waiting_for_scores_is_charged_apart_from_scoring_here(ranks):
    tiny, seen = small.build(ranks), []

    def send(group):
        seen.append(("send", watch._inside[-1]))
        return SimpleNamespace(collect=lambda: seen.append(("collect", watch._inside[-1])) or table)

    score = torch.zeros(1, 4)
    table = RewardTable(components=("one",), weights=(1.0,), local_KN=score, global_KN=score)
    tiny.stages.scorer = SimpleNamespace(send_group=send)
    with Stopwatch() as watch:
        tiny.stages.score([*tiny.stages.explore(0, send=True), *tiny.stages.explore(0)])
    assert seen == [("send", "reward")] * 4 + [("collect", "await scores")] * 4


def test_a_group_that_never_beats_its_anchor_is_scaled(ranks):
    tiny = small.build(ranks, "loss.unsafe_scale=0.25")
    groups = tiny.stages.explore(0)
    tables = []
    for lead in (1.0, -1.0):
        score = torch.tensor([[lead, -2.0, -3.0, 0.0]])
        tables.append(
            RewardTable(components=("one",), weights=(2.0,), local_KN=score, global_KN=score)
        )
    advantage_PG, scale_P, seen = tiny.stages.advantages(0, groups, tables)
    assert scale_P.tolist() == [1.0, 0.25]
    assert advantage_PG.shape == (2, 3)
    assert seen["reward/composite"] == pytest.approx((-4 / 3 - 6 / 3) / 2)
    for sampled in groups:
        sampled.release()


def test_the_old_policy_follows_at_every_second_update(ranks):
    """In between it lags, and the ratios leave 1."""
    tiny = small.build(ranks, "policy.rollouts_per_policy_sync=2")
    for update in range(4):
        before = weights_of(tiny, "current"), weights_of(tiny, "old")
        done = run_update(tiny, update)
        after = weights_of(tiny, "current"), weights_of(tiny, "old")
        assert not same(before[0], after[0])
        if update % 2 == 0:
            assert same(after[1], before[0]), "old is not what current was"
            assert (done.ratio_PG == 1).all()
        else:
            assert same(after[1], before[1]), "old moved between syncs"
            assert not (done.ratio_PG == 1).any()
            assert (done.ratio_PG - 1).abs().max() < 0.5


def test_the_reference_never_moves_and_the_average_follows_its_formula(ranks):
    tiny = small.build(ranks, "optimizer.ema_decay=0.8")
    reference, ema = weights_of(tiny, "reference"), weights_of(tiny, "ema")
    for update in range(3):
        done = run_update(tiny, update)
        assert done.norm > 0
        current = weights_of(tiny, "current")
        ema = [0.8 * mean + 0.2 * now for mean, now in zip(ema, current, strict=True)]
        for ours, expected in zip(weights_of(tiny, "ema"), ema, strict=True):
            torch.testing.assert_close(ours, expected)
    assert same(weights_of(tiny, "reference"), reference)
    assert not same(weights_of(tiny, "ema"), reference)


def test_a_linear_decay_shortens_each_step_by_its_share(ranks):
    """Adam's first step from equal gradients is the rate, up to its sign: 1, 3/4, ... of it."""
    moved = []
    for update in (0, 1, 3):
        tiny = small.build(ranks, "optimizer.decay=linear", "num_updates=4", "optimizer.eps=1e-12",
                           "optimizer.weight_decay=0")  # fmt: skip
        before = weights_of(tiny, "current")
        run_update(tiny, update)
        after = weights_of(tiny, "current")
        moved.append(max((a - b).abs().max() for a, b in zip(after, before, strict=True)).item())
    assert moved == pytest.approx([1e-2, 0.75e-2, 0.25e-2], rel=1e-3)


def test_an_update_moves_the_adapters_and_not_the_base(ranks):
    tiny = small.build(ranks, "optimizer.weight_decay=0.0")
    before = {name: p.detach().clone() for name, p in tiny.model.named_parameters()}
    for update in range(3):  # A moves from the second update on, and old follows at the third
        run_update(tiny, update)
    for name, p in tiny.model.named_parameters():
        moves = ".adapter." in name and not name.endswith(".reference")
        assert torch.equal(p, before[name]) == (not moves), name


def test_full_training_moves_every_weight_and_keeps_the_reference(ranks):
    tiny = small.build(ranks, "policy.mode=full", "optimizer.weight_decay=0.0",
                       "policy.rollouts_per_policy_sync=2")  # fmt: skip
    names = list(dict(tiny.model.named_parameters()))
    before, reference = weights_of(tiny, "current"), weights_of(tiny, "reference")
    first = run_update(tiny, 0)
    assert (first.ratio_PG == 1).all()
    assert same(weights_of(tiny, "old"), before)
    second = run_update(tiny, 1)
    assert not (second.ratio_PG == 1).any()
    after = weights_of(tiny, "current")
    stuck = [n for n, a, b in zip(names, before, after, strict=True) if torch.equal(a, b)]
    assert not stuck
    assert same(weights_of(tiny, "reference"), reference)


def test_updates_move_probability_towards_branches_with_advantage(ranks):
    """One small step on one group: the log-ratio goes with the advantage."""
    tiny = small.build(ranks, "optimizer.lr=1e-3", "policy.groups_per_update=1",
                       "loss.kl_coefficient=0.0", "optimizer.weight_decay=0.0")  # fmt: skip
    groups = tiny.stages.explore(0)
    before = tiny.stages.energies(0, groups, "current")
    advantage_PG, _, weight_PG = numbers(tiny, groups)
    tiny.policy.optimizer.zero_grad()
    tiny.stages.backward(0, groups, weight_PG)
    tiny.policy.optimizer.finalize()
    tiny.policy.step(0)
    after = tiny.stages.energies(0, groups, "current")
    moved = branch_log_probs(after[0], 1.0) - branch_log_probs(before[0], 1.0)
    assert float((moved * advantage_PG).sum()) > 0
    groups[0].release()


def test_without_exploration_an_update_moves_nothing(ranks):
    tiny = small.build(ranks, "routing.exploration=none", "optimizer.weight_decay=0.0")
    before = weights_of(tiny, "current")
    done = run_update(tiny, 0)
    assert not done.advantage_PG.any()
    assert done.norm < 1e-10
    for now, then in zip(weights_of(tiny, "current"), before, strict=True):
        assert (now - then).abs().max() < 1e-6


def test_exploration_by_noise_trains(ranks):
    tiny = small.build(ranks, "routing.exploration=noise")
    before = weights_of(tiny, "current")
    done = run_update(tiny, 0)
    assert (done.ratio_PG == 1).all()
    assert done.norm > 0
    assert not same(weights_of(tiny, "current"), before)


def test_with_a_bank_the_two_passes_still_give_the_gradient_of_the_whole_loss(ranks):
    """MemFlow's bank is read in rollout, in every replay and in the backward replay alike."""
    tiny = apart(small.build(ranks, "memory.bank_frames=2", "memory.stage_blocks=2"))
    groups = tiny.stages.explore(0)
    assert not tiny.stages.energies(0, groups, "old").anchor_P.any()
    advantage_PG, scale_P, weight_PG = numbers(tiny, groups)
    ours = sent_backward(tiny, (tiny.stages, groups, weight_PG))
    assert_close(ours, whole_gradient(tiny, groups, advantage_PG, scale_P))
    for sampled in groups:
        sampled.release()
    assert tiny.world.pool.num_free == tiny.num_pages
