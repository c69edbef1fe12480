"""Random reward models in the released layout, and what scoring a group by them is said to cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import quiet
from tools import benchmark, benchmark_rewards, random_rewards

pytest.importorskip("transformers")

_quiet_afterwards = quiet.quiet_afterwards

RECIPE = Path(__file__).parents[2] / "examples" / "shapes" / "demo.yaml"
LARGER = ("model.latent_height=16", "model.latent_width=16", "device=cpu")


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(RECIPE.parents[2])


def test_both_models_are_timed_on_the_clips_of_a_group(tmp_path):
    out = tmp_path / "rewards.json"
    overrides = [
        *random_rewards.write("videoreward", tmp_path / "v", tiny=True),
        *random_rewards.write("hpsv3", tmp_path / "h", tiny=True),
    ]
    wanted = "reward.weights={videoreward_vq: 1.0, videoreward_ta: 1.0}"
    options = [str(RECIPE), *overrides, *LARGER, wanted, "reward.held_out=[hpsv3]",
               "reward.global_clip_pixel_frames=8", "routing.num_branches=2"]  # fmt: skip
    assert benchmark_rewards.main([*options, "--repeats", "1", "--output", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [part["components"] for part in found["rewards"]] == [
        ["videoreward_vq", "videoreward_mq", "videoreward_ta"], ["hpsv3"]
    ]  # fmt: skip
    assert all(0 < part["min_s"] <= part["median_s"] for part in found["rewards"])
    config = found["config"]
    rows, (local, whole) = 3, (21, 8)
    own = found["clips"] % rows  # clips before the fork, once
    assert found["clips"] > rows
    assert found["pixel_frames"] >= rows * local
    assert (found["pixel_frames"] - own * whole) % rows == 0
    assert config["reward"]["held_out"] == ["hpsv3"]
    table = out.with_suffix(".md").read_text()
    assert "| videoreward_vq, videoreward_mq, videoreward_ta |" in table
    assert f"{found['clips']} clips of {found['pixel_frames']} pixel frames" in table


def test_an_update_may_be_timed_with_its_own_rewards(tmp_path):
    out = tmp_path / "scored.json"
    small = ("device=cpu", "policy.groups_per_update=1", "routing.num_branches=3")
    options = [str(RECIPE), *small, "--fork", "15", "--updates", "1", "--warmup", "0", "--score"]
    assert benchmark.main([*options, "--output", str(out)]) == 0
    stages = json.loads(out.read_text())["stages"]
    assert stages["reward"]["median_s"] > 0.01
    assert stages["decode"]["median_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--output", "x.txt"], "x.txt must end in .json"),
     (["--output", "x.json", "--repeats", "0"], "--repeats 0 and --warmup 1 must be at least 1")],
)  # fmt: skip
def test_bad_options_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark_rewards.main([str(RECIPE), *arguments])
