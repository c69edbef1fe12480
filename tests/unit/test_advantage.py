import math
from dataclasses import replace

import pytest
import torch

from megatron_kvpo.algorithm.advantage import advantages, beats_anchor
from megatron_kvpo.method_config import AdvantageConfig
from megatron_kvpo.records import RewardTable

OURS = AdvantageConfig()
ANCHOR = AdvantageConfig(baseline="anchor")
REFERENCE = AdvantageConfig(baseline="anchor", fusion="std")
HERE = (42, 0, 0)


def table(
    local: list[list[float]], glob: list[list[float]] | None = None, weights: tuple[float, ...] = ()
) -> RewardTable:
    """One row per component, the anchor last in each; the global signal is flat by default."""
    glob = glob or [[0.0] * len(row) for row in local]
    return RewardTable(
        components=("vq", "mq")[: len(local)],
        weights=weights or (1.0,) * len(local),
        local_KN=torch.tensor(local),
        global_KN=torch.tensor(glob),
    )


def close(actual: torch.Tensor, expected: list[float]) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.tensor(expected))


def test_one_component_by_hand():
    """Branches 1, 3, anchor 1. Population std of (1, 3) is 1: a = (0, 2); local only."""
    advantage, _ = advantages(table([[1.0, 3.0, 1.0]]), ANCHOR, HERE)
    close(advantage, [0.0, 2.0])
    advantage, _ = advantages(table([[1.0, 3.0, 1.0]]), OURS, HERE)
    close(advantage, [-1.0, 1.0])  # less the mean, 1


def test_two_components_and_both_signals_by_hand():
    """Weights 3 and 1 count 3/4 and 1/4.

    local vq: (0, 2) - anchor 1, std 1: (-1, 1).  local mq: (4, 0) - anchor 0, std 2: (2, 0).
    local  = 3/4 (-1, 1) + 1/4 (2, 0) = (-.25, .75)
    global vq: (.01, 0) - 0, std .005 below the floor .02: (.5, 0).  global mq: all equal: (0, 0).
    global = 3/4 (.5, 0) = (.375, 0)
    A = local + .5 global = (-.0625, .75); the mean is .34375
    """
    rewards = table(
        [[0.0, 2.0, 1.0], [4.0, 0.0, 0.0]], [[0.01, 0.0, 0.0], [7.0, 7.0, 7.0]], (3.0, 1.0)
    )
    advantage, metrics = advantages(rewards, ANCHOR, HERE)
    close(advantage, [-0.0625, 0.75])
    assert metrics["policy/advantage_floored_fraction"] == 0.5
    advantage, metrics = advantages(rewards, OURS, HERE)
    close(advantage, [-0.40625, 0.40625])
    assert metrics["policy/advantage_over_anchor"].item() == pytest.approx(0.34375)
    assert metrics["reward/local_vq"] == 1
    assert metrics["reward/local_over_anchor"] == 3 * (1 - 1) + 1 * (2 - 0)
    assert metrics["reward/local_best_over_anchor"] == 3 * (2 - 1) + 1 * (0 - 0)


def test_weights_count_by_their_share_only():
    rows = [[0.0, 2.0, 5.0, 1.0], [4.0, 0.0, 1.0, 0.0]]
    one, _ = advantages(table(rows, weights=(0.5, 1.0)), OURS, HERE)
    ten, _ = advantages(table(rows, weights=(5.0, 10.0)), OURS, HERE)
    torch.testing.assert_close(one, ten)


def test_floor_keeps_small_differences_small():
    # std of (1e-4, -1e-4) is 1e-4, the floor .02: a = +-.005
    advantage, metrics = advantages(table([[1e-4, -1e-4, 0.0]]), OURS, HERE)
    close(advantage, [0.005, -0.005])
    assert metrics["policy/advantage_floored_fraction"] == 1


def test_reference_fusion_blows_small_differences_up():
    """Same rewards, deviation 1e-4: a = +-1 after the first division and after the second."""
    advantage, _ = advantages(table([[1e-4, -1e-4, 0.0]]), REFERENCE, HERE)
    torch.testing.assert_close(advantage, torch.tensor([1.0, -1.0]), rtol=1e-3, atol=0)


def test_reference_fusion_by_hand():
    """Divisor: sample deviation of branches and anchor together.

    local vq (0, 2 | 0): mean 2/3, variance (4 + 16 + 4)/9 / 2 = 4/3, a = (0, 2) / 1.1547005
    local mq (1, 3 | 2): variance (1 + 1 + 0) / 2 = 1, a = (-1, 1)
    mean of the two = (-.5, 1.3660254); its std is .9330127: (-.5358984, 1.4641016)
    global vq (0, 4 | 4): variance (64 + 16 + 16)/9 / 2 = 16/3, a = (-4, 0) / 2.3094011; mq flat: 0
    mean of the two = (-.8660254, 0); its std is .4330127: (-2, 0)
    A = local + .5 global = (-1.5358984, 1.4641016)
    """
    rewards = table([[0.0, 2.0, 0.0], [1.0, 3.0, 2.0]], [[0.0, 4.0, 4.0], [5.0, 5.0, 5.0]])
    advantage, _ = advantages(rewards, REFERENCE, HERE)
    close(advantage, [-1.5358984, 1.4641016])


def test_advantages_are_clamped_before_they_are_centred():
    # std of (0, 0, 0, 10) is 4.33; from an anchor at -100 all lie 23 or more of them ahead
    far, metrics = advantages(table([[0.0, 0.0, 0.0, 10.0, -100.0]]), ANCHOR, HERE)
    close(far, [2.5] * 4)
    assert metrics["policy/advantage_clamped_fraction"] == 1
    # one of 16 branches at 16, the rest 0: std sqrt(15), so it leads by 16 / 3.873 = 4.13
    row = [16.0] + [0.0] * 15 + [0.0]
    close(advantages(table([row]), ANCHOR, HERE)[0], [2.5] + [0.0] * 15)
    close(advantages(table([row]), OURS, HERE)[0], [2.5 * 15 / 16] + [-2.5 / 16] * 15)


@pytest.mark.parametrize("num_branches", [2, 3, 7, 8])
@pytest.mark.parametrize("config", [OURS, ANCHOR, REFERENCE])
def test_sequences_that_score_alike_have_exactly_no_advantage(
    config: AdvantageConfig, num_branches: int
):
    rewards = table(
        [[0.1] * (num_branches + 1), [-1.7] * (num_branches + 1)],
        [[1 / 3] * (num_branches + 1), [0.7] * (num_branches + 1)],
        (0.3, 0.9),
    )
    for control in ("none", "shuffled", "negated"):
        advantage, metrics = advantages(rewards, replace(config, control=control), HERE)
        assert advantage.eq(0).all()
        assert metrics["policy/advantage_std"] == 0


def test_branches_alike_but_not_the_anchor_have_exactly_no_advantage_within_the_group():
    for n in (3, 5, 7, 8):
        advantage, _ = advantages(table([[0.1] * n + [0.33]]), OURS, HERE)
        assert advantage.eq(0).all()


def test_group_baseline_does_not_see_the_anchor_unless_the_clamp_acts():
    row = [0.3, 0.9, 0.5, 0.8]
    one, _ = advantages(table([[*row, 0.6]]), OURS, HERE)
    other, _ = advantages(table([[*row, 0.5]]), OURS, HERE)
    torch.testing.assert_close(one, other)
    assert abs(one.sum().item()) < 1e-6


def test_negative_weight_scales_what_is_below_zero_and_nothing_else():
    """(-1, 1) of the first test by hand, with a quarter of the weight below 0."""
    quarter = replace(OURS, negative_weight=0.25)
    advantage, _ = advantages(table([[1.0, 3.0, 1.0]]), quarter, HERE)
    close(advantage, [-0.25, 1.0])
    negated, _ = advantages(table([[1.0, 3.0, 1.0]]), replace(quarter, control="negated"), HERE)
    close(negated, [0.25, -1.0])


def test_negated_control_is_minus_the_real_one():
    rewards = table([[0.3, 0.9, 0.5, 0.8, 0.6]])
    real, _ = advantages(rewards, OURS, HERE)
    negated, _ = advantages(rewards, replace(OURS, control="negated"), HERE)
    assert torch.equal(negated, -real)


def test_shuffled_control_moves_advantages_and_never_keeps_the_order():
    shuffled = replace(OURS, control="shuffled")
    for num_branches in (2, 3, 8):
        row = [float(i) for i in range(num_branches)] + [0.0]
        real, _ = advantages(table([row]), OURS, HERE)
        seen = set()
        for update in range(40):
            other, _ = advantages(table([row]), shuffled, (42, update, 0))
            again, _ = advantages(table([row]), shuffled, (42, update, 0))
            assert torch.equal(other, again)
            assert not torch.equal(other, real)
            assert torch.equal(other.sort().values, real.sort().values)
            seen.add(tuple(other.tolist()))
        assert len(seen) == {2: 1, 3: 5, 8: 40}[num_branches]


def test_the_anchor_is_beaten_on_either_signal_by_the_weighted_reward():
    assert not beats_anchor(table([[0.1, 0.2, 0.2]]))
    assert beats_anchor(table([[0.1, 0.3, 0.2]]))
    assert beats_anchor(table([[0.1, 0.2, 0.2]], [[0.0, 0.1, 0.0]]))
    # vq +1 but mq -1 at weight 2: worse than the anchor in sum
    assert not beats_anchor(table([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]], weights=(1.0, 2.0)))


def test_a_reward_that_is_not_finite_is_named():
    rewards = table([[0.0, 1.0, 0.0], [0.0, math.nan, 0.0]])
    with pytest.raises(ValueError, match="local reward mq of branch 1 is nan"):
        advantages(rewards, OURS, HERE)
    rewards = table([[0.0, 1.0, 0.0]], [[0.0, 0.0, math.inf]])
    with pytest.raises(ValueError, match="global reward vq of the anchor is inf"):
        beats_anchor(rewards)


def test_weights_without_weight_are_refused():
    with pytest.raises(ValueError, match="sum above 0"):
        advantages(table([[0.0, 1.0, 0.0]], weights=(0.0,)), OURS, HERE)
    with pytest.raises(ValueError, match="at least 2 branches"):
        advantages(table([[0.0, 1.0]]), OURS, HERE)
