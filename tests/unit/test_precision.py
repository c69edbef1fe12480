"""tools.precision on the shapes recipe: what is 0, what lies between, what grows."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch

from megatron_kvpo.algorithm.energy import trajectory_velocity_energy
from megatron_kvpo.config import load_config
from megatron_kvpo.flow import sampler_sigmas
from megatron_kvpo.records import Prompt, RolloutGroup, RoutingPlan, Trajectory
from tests import quiet
from tests.unit import small
from tools import precision, precision_report, precision_statistics
from tools.precision_statistics import GroupTrace, Move, Replayed

_quiet_afterwards = quiet.quiet_afterwards

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "shapes" / "demo.yaml"
MODES = ("float32", "bfloat16", "fp8_all", "merged")
SHORT = ("device=cpu", "routing.num_branches=3", "stream.num_frames=15",
         "stream.resident_frames=15", "--updates", "1")  # fmt: skip
"""One legal fork, at 12: a video ends with its policy window."""

PROMPTS = (
    {"segments": ["a red square moves right", "it turns blue", "it moves left"],
     "switch_frames": [6, 12]},
    {"segments": ["a green circle falls"]},
)  # fmt: skip
"""Texts change before the fork and at it."""


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
    return f"data.prompts={path}"


@pytest.fixture(scope="module")
def out(tmp_path_factory, prompts):
    path = tmp_path_factory.mktemp("precision") / "made" / "bits.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the recipe's paths count from there
        patch.setattr(precision.Run, "start", one_at_a_time())
        arguments = [*SHORT, prompts, "--groups", "2", "--modes", ",".join(MODES),
                     "--steps", "1,100"]  # fmt: skip
        assert precision.main([str(RECIPE), *arguments, "--output", str(path)]) == 0
    return path


def one_at_a_time():
    """Run.start, which finds that no earlier run's model is left."""
    start, models = precision.Run.start, []

    def checked(config, *, on_device=False):
        assert not [model for model in models if model() is not None]
        run = start(config, on_device=on_device)
        models.append(weakref.ref(run.policy.model))
        return run

    return staticmethod(checked)


@pytest.fixture
def found(out):
    return json.loads(out.read_text())


def value(figure: dict) -> float:
    return figure["value"]


def test_float32_against_itself_is_exactly_0(found):
    mode = found["modes"]["float32"]
    for part in ("self", "common", "own_prefix"):
        for figures in (*mode[part]["levels"], mode[part]["all_levels"]):
            for name in ("bias", "relative_difference", "contrast_error"):
                assert value(figures[name]) == figures[name]["standard_error"] == 0
            assert figures["anchor_energy_max"] == 0
            assert value(figures["energy"]) > 0
            assert value(figures["rank_correlation"]) == 1
            assert value(figures["correlation"]) == pytest.approx(1)
    # A prefix that is filled with its own latents, switches included, repeats the rollout's bits.
    for level in mode["common"]["levels"]:
        assert value(level["velocity_error"]) == value(level["velocity_error_own_prefix"]) == 0
    assert mode["common"]["policy_difference_max"] == value(mode["self"]["prefix_difference"]) == 0
    assert value(mode["common"]["loss_slope_error"]) == mode["gradient"]["error_of_sum"] == 0
    assert value(mode["gradient"]["cosine"]) == pytest.approx(1)
    for move in mode["moves"]:
        assert value(move["difference"]) == value(move["loss_slope_error"]) == 0
        assert value(move["slope"]) == pytest.approx(1)


def test_fewer_bits_are_further_away_and_every_mode_repeats_its_own_rollout(found):
    def errors(name: str) -> list[float]:
        mode = found["modes"][name]
        return [
            mode["gradient"]["error_of_sum"],
            value(mode["common"]["all_levels"]["anchor_share"]),
            value(mode["self"]["prefix_difference"]),
            *(value(level["velocity_error"]) for level in mode["common"]["levels"]),
        ]

    for near, far in zip(errors("bfloat16"), errors("fp8_all"), strict=True):
        assert 0 < near < far < 1
    assert 2e-3 < value(found["modes"]["bfloat16"]["common"]["levels"][0]["velocity_error"]) < 0.03
    assert errors("merged") != errors("bfloat16")
    for mode in found["modes"].values():
        assert mode["self"]["all_levels"]["anchor_energy_max"] == 0
        assert all(level["anchor_energy_max"] == 0 for level in mode["self"]["levels"])


def test_longer_steps_move_ratios_further_and_are_better_seen(found):
    for name in ("bfloat16", "merged"):
        moves = found["modes"][name]["moves"]
        assert [(m["along"], m["rate"], m["steps"]) for m in moves] == [
            ("gradient", 1e-5, 1), ("gradient", 1e-3, 1), ("gradient", 1e-3, 100),
            ("chance", 1e-5, 1), ("chance", 1e-3, 1), ("chance", 1e-3, 100),
        ]  # fmt: skip
        for way in (moves[:3], moves[3:]):
            cosines = [value(move["velocity"]["cosine"]) for move in way]
            assert cosines == sorted(cosines)
            assert cosines[-1] > 0.99
            assert value(way[-1]["velocity"]["slope"]) == pytest.approx(1, abs=0.02)
            assert way[0]["log_ratio_size"] < way[1]["log_ratio_size"]
        assert moves[3]["log_ratio_size"] < 0.1 * moves[4]["log_ratio_size"]
        assert moves[1]["log_ratio_size"] > moves[4]["log_ratio_size"]  # the gradient's adds up


def test_the_record_and_its_tables_say_what_was_measured(found, out):
    assert found.keys() >= {"date", "commit", "command", "versions", "machine", "config"}
    assert (found["name"], found["yardstick"], found["stir"]) == ("bits", "float32", 0.01)
    assert (found["groups"], found["branches"]) == (2, 3)
    assert tuple(found["modes"]) == MODES
    assert found["modes"]["fp8_all"]["fp8"] == ["ffn", "attention", "text"]
    assert found["modes"]["merged"]["merge"]
    for mode in found["modes"].values():
        for part in (mode["self"], mode["common"], mode["own_prefix"], *mode["moves"]):
            sigmas = [level["sigma"] for level in part["levels"]]
            assert sigmas == found["sigmas"] == pytest.approx([1, 0.9375, 5 / 6, 0.625])
        assert mode["common"]["all_levels"]["energy"]["standard_error"] > 0
    table = out.with_suffix(".md").read_text()
    assert table.count("\n| merged | ") == 1 + 1 + 4
    assert table.count(" | merged | ") == 6
    error = found["modes"]["fp8_all"]["common"]["levels"][0]["velocity_error"]
    assert f"| fp8_all | 1 | {precision_report._percent(error)} |" in table
    assert "\n| float32 | 0 | " in table
    assert out.with_suffix(".png").stat().st_size > 5000
    assert sorted(p.suffix for p in out.parent.iterdir()) == [".json", ".md", ".png"]


def test_merging_a_fresh_adapter_leaves_bfloat16s_bits(tmp_path, prompts, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "fresh.json"
    modes = ["--modes", "bfloat16,merged", "--groups", "1", "--stir", "0", "--steps", "1"]
    precision.main([str(RECIPE), *SHORT, prompts, *modes, "--output", str(path)])
    found = json.loads(path.read_text())
    assert (found["yardstick"], found["stir"]) == ("bfloat16", 0)
    mode = found["modes"]["merged"]
    for figures in (*mode["common"]["levels"], mode["self"]["all_levels"]):
        assert figures["bias"] == {"value": 0, "standard_error": None}
    assert all(value(level["velocity_error"]) == 0 for level in mode["common"]["levels"])
    assert value(mode["moves"][1]["difference"]) > 0
    assert "±" in path.with_suffix(".md").read_text()  # the head's; one group has no errors


def test_a_trace_is_of_the_energies_and_gradients_of_training(prompts, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = precision._parse(
        [str(RECIPE), *SHORT, prompts, "--groups", "1", "--steps", "1", "--rates", "1e-3",
         "--output", "o.json"]
    )  # fmt: skip
    config = load_config(options.recipe, options.overrides)
    (one,) = precision.trace(config, precision.MODES["float32"], options, [])
    sigma_T = torch.tensor(sampler_sigmas(config.stream.steps, config.stream.shift))
    taken = one.group.trajectory.velocity_NPTFCHW
    whole = trajectory_velocity_energy(one.common.velocity_NPTFCHW, taken, sigma_T, config.energy)
    torch.testing.assert_close(one.own_NT.sum(dim=1), whole)
    assert torch.equal(one.common.branch_G, one.own_NT[:-1].sum(dim=1))

    slope_G = precision_statistics.slopes(
        one.common.branch_G, one.common.branch_G, one.advantage_G, config
    )
    assert slope_G.sum().abs() < 1e-6
    changes = [(slope_G @ (moved.branch_G - one.common.branch_G)).item() for moved in one.moved]
    assert changes[0] < -5 * abs(changes[1])  # down the gradient, where chance goes nowhere


def synthetic(kept: float, *, branches: int = 4, groups: int = 3) -> list[GroupTrace]:
    """Groups in which a move changes velocities and energies by `kept` of what it should."""
    rng = torch.Generator().manual_seed(1)
    prompt, plan = Prompt(segments=("a",)), RoutingPlan(fork_frame=3, num_blocks=1,
                                                        routed_frames_G=())  # fmt: skip
    found = []
    for _ in range(groups):
        velocity, change, latent = (torch.randn(branches + 1, 1, 4, 3, 1, 2, 2, generator=rng)
                                    for _ in range(3))  # fmt: skip
        energy, step = (torch.rand(branches + 1, 4, generator=rng) for _ in range(2))
        step *= 1e-3  # log ratios are then in proportion
        common = Replayed(energy, velocity)
        found.append(GroupTrace(
            group=RolloutGroup(
                prompt=prompt, plan=plan, latent_NFCHW=latent.flatten(1, 3),
                trajectory=Trajectory(state_NPTFCHW=velocity, velocity_NPTFCHW=velocity),
                sequences=tuple(range(branches + 1)),
            ),
            own_NT=energy, drifted=common, common=common,
            advantage_G=torch.arange(branches) - (branches - 1) / 2,
            gradient=torch.randn(10, generator=rng),
            moved=(Replayed(energy + kept * step, velocity + kept * change),),
        ))  # fmt: skip
    return found


def test_a_change_that_is_half_lost_has_slope_one_half():
    config, sigmas = small.config(), [1.0, 0.9, 0.8, 0.6]
    moves = [Move("chance", 1e-3, 1)]
    found = precision_statistics.compare(synthetic(0.5), synthetic(1.0), sigmas, moves, config)
    (move,) = found["moves"]
    for figures in (move["velocity"], *move["levels"]):
        assert [value(figures[name]) for name in ("slope", "size")] == pytest.approx([0.5, 0.5])
        assert value(figures["cosine"]) == pytest.approx(1)
    assert value(move["slope"]) == pytest.approx(0.5, rel=1e-3)
    assert value(move["correlation"]) == pytest.approx(1, rel=1e-3)
    assert value(move["difference"]) == pytest.approx(move["log_ratio_size"] / 2, rel=1e-3)
    assert value(move["loss_slope_error"]) > 0


def test_figures_of_known_numbers():
    theirs = torch.tensor([[1.0, 2.0, 3.0, 0.0], [2.0, 4.0, 6.0, 0.0]]).double()
    mine = torch.tensor([[1.5, 2.5, 3.5, 0.5], [3.0, 2.0, 1.0, 0.0]]).double()
    figures = precision_statistics.energy_figures(mine, theirs)
    assert value(figures["energy"]) == pytest.approx((2.5 + 2) / 2)
    assert value(figures["bias"]) == pytest.approx((0.25 - 0.5) / 2)
    assert figures["bias"]["standard_error"] == pytest.approx(0.375)
    assert value(figures["relative_difference"]) == pytest.approx((0.25 + 8 / 12) / 2)
    assert value(figures["contrast_error"]) == pytest.approx((0 + 1.5) / 2)  # a shift is not seen
    assert value(figures["rank_correlation"]) == 0  # 1 and -1
    assert figures["anchor_energy_max"] == 0.5
    assert value(figures["anchor_share"]) == pytest.approx(0.1)

    x = torch.tensor([1.0, 4.0, 7.0, 2.0])
    expected = precision_statistics.mean(x)
    left_out = precision_statistics.jackknife(lambda rows: x[rows].mean(), 4)
    assert left_out == pytest.approx(expected)
    alike = precision_statistics.jackknife(
        lambda r: precision_statistics.correlation(x[r], 0 * x[r]), 4
    )
    assert alike == {"value": None, "standard_error": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modes", "float32,float16"], r"--modes 'float32,float16': name each once, .*'merged'"),
        (["--modes", "float32,float32"], r"name each once"),
        (["--modes", ""], r"--modes ''"),
        (["--groups", "0"], r"--groups 0 and --updates 2 must be at least 1"),
        (["--updates", "0"], r"--groups 8 and --updates 0 must be at least 1"),
        (["--steps", "10,0"], r"--steps \[10, 0\]: name numbers of steps from 1 up"),
        (["--steps", ""], r"--steps \[\]"),
        (["--rates", "1e-3,0"], r"--rates \[0.001, 0.0\]: a learning rate is above 0"),
        (["--stir", "-0.1"], r"--stir -0.1 must not be negative"),
        (["optimizer.lr=0"], r"optimizer.lr is 0"),
        (["policy.mode=full"], r"policy.mode is full"),
        (["routing.exploration=none"], r"routing.exploration is none: its branches are alike"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message):
        precision.main([str(RECIPE), "--output", str(tmp_path / "o.json"), *arguments])
    assert list(tmp_path.iterdir()) == []


def test_only_json_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"bits.csv must end in .json"):
        precision.main([str(RECIPE), "--output", str(tmp_path / "bits.csv")])
