"""The alarm of gamed rewards, and what is logged of how a group differs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from megatron_kvpo.records import (
    Energies,
    Prompt,
    RewardTable,
    RolloutGroup,
    RoutingPlan,
    Trajectory,
)
from megatron_kvpo.reward_config import GuardConfig
from megatron_kvpo.rollout.group import SampledGroup
from megatron_kvpo.routing import route_entropy
from megatron_kvpo.training import guard as guard_module
from megatron_kvpo.training.guard import Guard
from megatron_kvpo.training.reward_log import reward_lines, table_rows
from megatron_kvpo.training.stages import latent_distance
from megatron_kvpo.training.summary import EvaluationTable
from tests.unit import small

ranks = small.ranks

BASE = np.array([[0.2, 0.4], [0.6, 0.8]])
SD = float(BASE.std(ddof=1))


def table(trained: float, held: float, other: float = 0.0) -> EvaluationTable:
    """Scores moved by so many standard deviations of the base."""
    scores = {"trained": BASE + trained * SD, "held": BASE + held * SD, "other": BASE + other * SD}
    return EvaluationTable.build(scores, {"trained": 1.0})


@pytest.fixture
def heard(monkeypatch):
    said = []
    monkeypatch.setattr(guard_module.logger, "warning", lambda text, *a: said.append(text % a))
    return said


def test_gains_are_in_standard_deviations_of_the_base():
    seen = Guard(GuardConfig(), ("held",)).watch(table(0, 0), table(0.5, -0.25))
    assert seen["gain_sd"] == pytest.approx(0.5, rel=1e-5)
    assert seen["held_sd"] == pytest.approx(-0.25, rel=1e-5)


def test_the_alarm_sounds_when_held_out_rewards_fall_twice_in_a_row(heard):
    watch = Guard(GuardConfig(patience=2, tolerance_sd=0.1), ("held", "other"))
    seen = watch.watch(table(0, 0), table(0.3, -0.2))
    assert seen == pytest.approx(
        {"gain_sd": 0.3, "diverged": 1.0, "held_sd": -0.2, "other_sd": 0.0}, abs=1e-5
    )
    assert not heard
    assert not watch.sounds
    watch.watch(table(0, 0), table(0.4, 0.1, -0.3))
    assert watch.sounds
    assert not watch.stops
    assert "+0.40 SD" in heard[0]
    assert "other -0.30" in heard[0]
    assert "held" not in heard[0].split("(")[1]


@pytest.mark.parametrize(
    "now", [(0.3, -0.05), (-0.1, -0.5), (0.3, 0.2)], ids=["small", "both fall", "both rise"]
)
def test_what_is_no_parting_of_ways_starts_the_count_anew(heard, now):
    watch = Guard(GuardConfig(patience=2), ("held",))
    watch.watch(table(0, 0), table(0.3, -0.5))
    assert watch.strikes == 1
    watch.watch(table(0, 0), table(*now))
    assert watch.strikes == 0
    assert not heard


def test_with_stop_the_alarm_ends_the_run(heard):
    watch = Guard(GuardConfig(patience=1, stop=True), ("held",))
    watch.watch(table(0, 0), table(0.3, -0.5))
    assert watch.stops
    assert "the run ends here" in heard[0]


def test_without_held_out_rewards_there_is_nothing_to_hear(heard):
    watch = Guard(GuardConfig(patience=1, stop=True), ())
    assert watch.watch(table(0, 0), table(9.0, -9.0))["diverged"] == 0
    assert not heard


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"patience": 0}, "reward.guard.patience is 0"), ({"tolerance_sd": -1.0}, "tolerance_sd is")],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GuardConfig(**settings)


def group(latent_NFCHW, routes=((3, 4), (4, 5)), fork=2):
    empty = torch.zeros(len(latent_NFCHW), 1, 1, 1, 1, 1, 1)
    return RolloutGroup(
        prompt=Prompt(segments=("a",), index=7), latent_NFCHW=latent_NFCHW,
        plan=RoutingPlan(fork_frame=fork, num_blocks=1, routed_frames_G=routes),
        trajectory=Trajectory(state_NPTFCHW=empty, velocity_NPTFCHW=empty),
        sequences=tuple(range(len(latent_NFCHW))),
    )  # fmt: skip


def test_route_entropy_by_hand():
    plan = group(torch.zeros(3, 4, 1, 1, 1)).plan
    expected = 2 * 0.25 * math.log(4) + 0.5 * math.log(2)  # 3 and 5 once, 4 twice of four
    assert route_entropy(plan) == pytest.approx(expected)
    alike = group(torch.zeros(3, 4, 1, 1, 1), routes=((3, 4), (3, 4))).plan
    assert route_entropy(alike) == pytest.approx(math.log(2))
    assert route_entropy(group(torch.zeros(3, 4, 1, 1, 1), routes=((), ())).plan) == 0


def test_latent_distance_is_that_of_all_pairs_and_leaves_prefix_and_anchor_out():
    latent = torch.randn(4, 5, 2, 3, 3)  # 3 branches and the anchor
    pairs = [(0, 1), (0, 2), (1, 2)]
    squares = [(latent[a, 2:] - latent[b, 2:]).square().mean() for a, b in pairs]
    found = latent_distance(group(latent))
    torch.testing.assert_close(found, (sum(squares) / 3).sqrt())
    moved = latent.clone()
    moved[:, :2] += 5
    moved[3] += 5
    assert torch.equal(latent_distance(group(moved)), found)
    assert latent_distance(group(latent[:1].expand(4, -1, -1, -1, -1))) == 0


def test_every_score_of_a_group_is_a_line(ranks):
    rows = group(torch.zeros(3, 4, 1, 1, 1))
    local, whole = torch.rand(2, 3), torch.rand(2, 3)
    scores = RewardTable(components=("one", "two"), weights=(1.0, 1.0), local_KN=local,
                         global_KN=whole)  # fmt: skip
    advantage = torch.tensor([[0.5, -0.5]])
    (line,) = reward_lines([SampledGroup(rows, None)], [scores], advantage, ranks)
    assert json.loads(json.dumps(line)) == line
    assert (line["prompt"], line["fork"], line["advantage"]) == (7, 2, [0.5, -0.5])
    assert line["local"] == {"one": local[0].tolist(), "two": local[1].tolist()}
    assert line["global"] == {"one": whole[0].tolist(), "two": whole[1].tolist()}
    assert "energy" not in line
    energies = Energies(torch.tensor([[0.25, 0.5]]), torch.tensor([0.0]))
    (line,) = reward_lines([SampledGroup(rows, None)], [scores], advantage, ranks, energies)
    assert (line["advantage"], line["energy"]) == ([0.5, -0.5], [0.25, 0.5, 0.0])
    prompt = Prompt(segments=("a", "b"), switch_frames=(3,), index=7)
    first, _, anchor = table_rows([line], [prompt], {"one": 1.0, "two": 3.0})
    assert (first["prompt"], first["caption"], first["fork"]) == (7, "a; then b", 2)
    assert (first["sequence"], anchor["sequence"]) == ("branch 0", "anchor")
    assert (first["advantage"], anchor["advantage"]) == (0.5, None)
    assert (first["energy"], anchor["energy"]) == (0.25, 0.0)
    weighted = RewardTable(components=("one", "two"), weights=(1.0, 3.0), local_KN=local,
                           global_KN=whole)  # fmt: skip
    assert anchor["composite"] == pytest.approx(float(whole[0, 2] + 3 * whole[1, 2]) / 4)
    assert anchor["composite"] == pytest.approx(float(weighted.composite_N[2]))
    assert first["local/two"] == pytest.approx(float(local[1, 0]))
    assert first.keys() == anchor.keys()
