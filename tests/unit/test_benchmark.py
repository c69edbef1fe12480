"""tools.benchmark on the shapes recipe: every stage is there, the table says what the JSON says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import quiet
from tools import benchmark, benchmark_report

_quiet_afterwards = quiet.quiet_afterwards

RECIPE = Path(__file__).parents[2] / "examples" / "shapes" / "demo.yaml"
SMALL = ("device=cpu", "policy.groups_per_update=1", "routing.num_branches=3")


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(RECIPE.parents[2])


def test_an_update_is_cut_into_its_stages(tmp_path):
    out = tmp_path / "made" / "shapes.json"
    arguments = [str(RECIPE), *SMALL, "policy.rollouts_per_policy_sync=2", "--output", str(out)]
    assert benchmark.main([*arguments, "--fork", "15", "--decode", "--updates", "2"]) == 0
    found = json.loads(out.read_text())
    stages = found["stages"]
    assert stages.keys() >= {"prefix", "branches", "reward", "decode", "replay", "backward", "step"}
    blocks, steps = 7, 4
    assert stages["prefix"]["passes"] == 5 * (steps + 1)
    assert stages["branches"]["passes"] == 4 * ((blocks - 5) * (steps + 1) - 1)  # no last fill
    assert stages["replay"]["passes"] == (4 + 3) * steps  # current; reference, without the anchor
    assert stages["backward"]["passes"] == 3 * steps
    assert all(part["repeats"] == 2 for part in stages.values())
    whole = found["update"]
    assert whole["tflop"] == pytest.approx(sum(part["tflop"] for part in stages.values()))
    assert 0 < whole["share"] < 1.5
    assert found["fork"] == 15
    assert not (Path("runs") / "demo" / "metrics.jsonl.tmp").exists()
    table = out.with_suffix(".md").read_text()
    assert f"| branches | {stages['branches']['median_s']:.3g} " in table
    assert out.with_suffix(".png").stat().st_size > 5000

    assert "kernels were compiled" not in table

    stale = [*arguments, "--fork", "15", "--warm-fork", "18", "--stale", "--updates", "1",
             "--warmup", "0"]  # fmt: skip
    assert benchmark.main(stale) == 0
    found = json.loads(out.read_text())
    assert found["stages"]["prefix"]["passes"] == 5 * (steps + 1)  # of the fork that counts
    assert found["stages"]["replay"]["passes"] == (2 * 4 + 3) * steps  # the old policy too
    assert "decode" not in found["stages"]
    assert "kernels were compiled in it" in out.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fork", "4"], r"--fork 4 is no legal fork: \[12, 15, 18\]"),
        (["--warm-fork", "5"], r"--warm-fork 5 is no legal fork: \[12, 15, 18\]"),
        (["--stale"], r"rollouts_per_policy_sync 1 never samples by old weights"),
        (["--updates", "0"], r"--updates 0 must be at least 1 and --warmup 1 not negative"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark.main([str(RECIPE), *SMALL, "--output", str(tmp_path / "o.json"), *arguments])
    assert list(tmp_path.iterdir()) == []


def test_scaling_is_a_share_of_what_ideal_ranks_would_do():
    runs = [
        {"kind": kind, "ranks": ranks, "update": {"median_s": seconds}}
        for kind, ranks, seconds in (
            ("strong", 1, 8.0), ("strong", 2, 5.0), ("weak", 1, 8.0), ("weak", 4, 10.0),
        )
    ]  # fmt: skip
    assert benchmark_report.efficiencies({"runs": runs}) == [1.0, 0.8, 1.0, 0.8]
