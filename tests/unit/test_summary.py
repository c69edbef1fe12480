"""Gains and contrasts against arithmetic done by hand."""

import json
import math

import numpy as np
import pytest

from megatron_kvpo.training.summary import (
    EvaluationTable,
    contrast,
    paired_gain,
    summarise,
    to_json,
)

WEIGHTS = {"vq": 3.0, "ta": 1.0}  # the composite is 3/4 vq + 1/4 ta


def table(vq, ta=None, consistency=None, prompts=None):
    vq = np.asarray(vq, dtype=float)
    zeros = np.zeros_like(vq)
    return EvaluationTable.build(
        {
            "vq": vq,
            "ta": zeros if ta is None else ta,
            "consistency": zeros if consistency is None else consistency,
        },
        WEIGHTS,
        prompts,
    )


BEFORE = [[0.0, 8.0], [16.0, 24.0]]
AFTER = [[4.0, 12.0], [28.0, 36.0]]
# Composite, 3/4 of vq. Base: 0, 6, 12, 18, mean 9, squared deviations 81 + 9 + 9 + 81 = 180 over
# n - 1 = 3.
BASE_SD = math.sqrt(180 / 3)
# Differences per prompt: 3 and 9, mean 6, standard deviation sqrt(18), over sqrt(R) = sqrt(2): 3.
GAIN, ERROR = 6 / BASE_SD, 3 / BASE_SD


def test_composite_is_the_weighted_mean_and_ignores_held_out_rewards():
    one = table(BEFORE, ta=[[4.0, 4.0], [4.0, 8.0]], consistency=[[9.0, 9.0], [9.0, 9.0]])
    assert one.composite_RM.tolist() == [[1.0, 7.0], [13.0, 20.0]]
    assert one.composite_RM.dtype == np.float32
    assert one.score_KRM.shape == (3, 2, 2)


def test_gain_and_its_clustered_error_match_the_hand_computed_ones():
    gain = paired_gain(table(BEFORE), table(AFTER))
    assert gain.before == 9.0
    assert gain.after == 15.0
    assert gain.standard_deviation == pytest.approx(BASE_SD)
    assert gain.gain_sd == pytest.approx(GAIN)
    assert gain.standard_error == pytest.approx(ERROR)


def test_more_noises_of_the_same_outcome_do_not_shrink_the_error():
    """The error counts prompts, not videos: repeating the noises leaves it (the SD aside)."""
    one = paired_gain(table(BEFORE), table(AFTER))
    many = paired_gain(table(np.tile(BEFORE, 50)), table(np.tile(AFTER, 50)))
    ratio = one.standard_deviation / many.standard_deviation
    assert many.standard_error == pytest.approx(one.standard_error * ratio)


def test_identical_evaluations_gain_exactly_zero():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(5, 3)).astype(np.float32)
    gain = paired_gain(table(scores), table(scores))
    assert gain.gain_sd == 0.0
    assert gain.standard_error == 0.0


def test_a_constant_base_gives_finite_figures():
    gain = paired_gain(table(np.ones((2, 2))), table(np.ones((2, 2))))
    assert (gain.gain_sd, gain.standard_error) == (0.0, 0.0)
    moved = paired_gain(table(np.ones((2, 2))), table(np.zeros((2, 2))))
    assert math.isfinite(moved.gain_sd)
    assert moved.gain_sd < 0


def test_contrast_of_two_seeds_matches_the_hand_computed_one():
    # Same base twice. Per prompt, real - control: seed a 3, 9; seed b 9, 9; mean 6, 9.
    base = table(BEFORE)
    real = [table(AFTER), table([[12.0, 20.0], [28.0, 36.0]])]
    result = contrast(real, [base, base], [base, base])
    mean, error = 7.5 / BASE_SD, math.sqrt(4.5) / math.sqrt(2) / BASE_SD  # variance of (6, 9)
    assert result.mean_sd == pytest.approx(mean)
    assert result.standard_error == pytest.approx(error)
    assert result.z == pytest.approx(5.0)  # 7.5 / 1.5
    assert (result.num_prompts, result.num_seeds) == (2, 2)


def test_contrast_against_the_base_of_one_seed_is_its_gain():
    base, after = table(BEFORE), table(AFTER)
    gain, pooled = paired_gain(base, after), contrast([after], [base], [base])
    assert pooled.mean_sd == pytest.approx(gain.gain_sd)
    assert pooled.standard_error == pytest.approx(gain.standard_error)


def test_contrast_of_equal_arms_has_z_zero_and_of_a_constant_shift_infinite():
    base, up = table(BEFORE), table(np.asarray(BEFORE) + 4)
    assert contrast([base], [base], [base]).z == 0.0
    assert contrast([base], [up], [base]).z == -math.inf


def test_summary_has_the_promised_keys_and_is_json():
    before = table(BEFORE, consistency=[[1.0, 1.0], [1.0, 0.0]])
    after = table(AFTER, consistency=[[1.0, 1.0], [0.0, 0.0]])
    result = summarise(
        before,
        after,
        held_out=("consistency",),
        updates=40,
        seconds_per_update=1.5,
        ranks=2,
        seed=3,
    )
    promised = [
        "reward_before", "reward_after", "gain_sd", "standard_error", "components",
        "held_out_before", "held_out_after", "updates", "seconds_per_update", "ranks",
    ]  # fmt: skip
    assert list(result)[: len(promised)] == promised
    assert result["reward_before"] == 9.0
    assert result["gain_sd"] == pytest.approx(GAIN)
    assert (result["held_out_before"], result["held_out_after"]) == (0.75, 0.5)
    assert result["components"]["vq"]["gain_sd"] == pytest.approx(GAIN)
    assert set(result["components"]["ta"]) >= {"before", "after", "gain_sd", "standard_error"}
    assert [c["held_out"] for c in result["components"].values()] == [False, False, True]
    assert (result["updates"], result["ranks"], result["seed"]) == (40, 2, 3)
    line = to_json(result)
    assert "\n" not in line
    assert json.loads(line) == result
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"gain_sd": math.nan})


def test_a_summary_without_held_out_rewards_says_null():
    result = summarise(table(BEFORE), table(AFTER), updates=1, seconds_per_update=1.0, ranks=1)
    assert result["held_out_before"] is None


def test_table_survives_disk_bit_for_bit(tmp_path):
    rng = np.random.default_rng(1)
    one = table(rng.normal(size=(4, 3)), rng.normal(size=(4, 3)), prompts=[3, 1, 7, 9])
    one.save(tmp_path / "evaluation_before.npz")
    two = EvaluationTable.load(tmp_path / "evaluation_before.npz")
    assert two.components == ("vq", "ta", "consistency")
    for name in ("score_KRM", "composite_RM", "prompt_R"):
        assert getattr(one, name).dtype == getattr(two, name).dtype
        assert np.array_equal(getattr(one, name), getattr(two, name))


def test_loading_says_what_is_wrong_with_a_file(tmp_path):
    with pytest.raises(ValueError, match="no evaluation table at"):
        EvaluationTable.load(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="not an evaluation table"):
        EvaluationTable.load(tmp_path / "other.npz")


def test_bad_tables_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="at least 2 prompts"):
        table([[1.0, 2.0]])
    with pytest.raises(ValueError, match="2 scores of the evaluation are not finite"):
        table([[1.0, math.nan], [1.0, 1.0]])
    with pytest.raises(ValueError, match=r"\['mq'\] have a weight and no scores"):
        EvaluationTable.build({"vq": np.zeros((2, 2))}, {"mq": 1.0})
    with pytest.raises(ValueError, match="must all be"):
        EvaluationTable.build({"vq": np.zeros((2, 2)), "ta": np.zeros((2, 3))}, {"vq": 1.0})


def test_tables_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="do not pair"):
        paired_gain(table(BEFORE), table(np.zeros((2, 3))))
    with pytest.raises(ValueError, match="do not pair"):
        paired_gain(table(BEFORE, prompts=[0, 1]), table(AFTER, prompts=[0, 2]))
    with pytest.raises(ValueError, match="pair them seed by seed"):
        contrast([table(AFTER)], [], [table(BEFORE)])
    with pytest.raises(ValueError, match="no reward 'hps'"):
        paired_gain(table(BEFORE), table(AFTER), "hps")
