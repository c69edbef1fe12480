"""tools.benchmark on the shapes recipe: every stage is there, the table says what the JSON says."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from matplotlib.colors import to_rgba
from matplotlib.text import Text

from megatron_kvpo.stopwatch import Span
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
    assert found["timeline"]["lanes"].keys() == {"run"}
    assert "overlap" not in found
    assert not (Path("runs") / "demo" / "metrics.jsonl.tmp").exists()
    table = out.with_suffix(".md").read_text()
    assert f"| branches | {stages['branches']['median_s']:.3g} " in table
    assert out.with_suffix(".png").stat().st_size > 5000

    assert "kernels were compiled" not in table
    assert "Scoring: busy" not in table

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


SPANS = [
    Span("scorer http://a:1", "score", 0.0, 1.0),  # noted before the run's first
    Span("run", "prefix", 0.0, 4.0), Span("scorer http://a:1", "score", 3.0, 5.0),
    Span("scorer http://a:1", "score", 3.5, 4.5), Span("scorer http://b:2", "score", 4.0, 9.0),
    Span("run", "await scores", 4.0, 7.0), Span("run", "other", 7.0, 7.00004),
    Span("scorer http://a:1", "score", 4.5, 6.0), Span("run", "await scores", 7.00004, 8.0),
    Span("run", "backward", 8.0, 10.0),
]  # fmt: skip


def test_seconds_that_overlap_count_once():
    ends = [(4, 7), (1, 6), (2, 3), (8, 9), (8, 9)]
    assert benchmark.busy_seconds([Span("", "", *both) for both in ends]) == 7
    assert benchmark.busy_seconds([]) == 0


def test_an_update_is_compared_with_its_longer_half():
    found = benchmark.timeline(SPANS)
    assert list(found["timeline"]["lanes"]) == ["run", "scorer http://a:1", "scorer http://b:2"]
    assert found["timeline"]["lanes"]["run"] == [
        ["prefix", 0.0, 4.0], ["await scores", 4.0, 7.0], ["await scores", 7.0, 8.0],
        ["backward", 8.0, 10.0],
    ]  # fmt: skip
    overlap = found["overlap"]
    assert overlap == pytest.approx(
        {"run_s": 6.00004, "scoring_s": 5.0, "update_s": 10.0, "of_the_longer": 10 / 6.00004}
    )
    assert benchmark_report.overlap_line(overlap) == (
        "Scoring: busy 5 s of the update's 10 s, of which the run waited 4 s: the update is 1.667 "
        "times the longer half (run 6 s, scoring 5 s)."
    )
    alone = benchmark.timeline([span for span in SPANS if span.lane == "run"])
    assert alone == {"timeline": {"lanes": {"run": found["timeline"]["lanes"]["run"]}}}
    slow = benchmark.timeline([*SPANS, Span("scorer http://b:2", "score", 1.0, 9.0)])["overlap"]
    assert (slow["scoring_s"], slow["of_the_longer"]) == (8.0, 1.25)


def stages_of(*seconds: float) -> dict[str, dict[str, float]]:
    names = ("other", "prefix", "recache", "branches", "reward", "decode", "replay",
             "await scores", "backward", "step")  # fmt: skip
    return {name: {"median_s": s} for name, s in zip(names, seconds, strict=True)}


def test_lanes_are_drawn_below_the_bar_in_its_colours():
    found = {"name": "x", "stages": stages_of(*[1.0] * 10), **benchmark.timeline(SPANS)}
    bar, below = benchmark_report.stage_figure(found).axes
    colours = dict(zip(found["stages"], (p.get_facecolor() for p in bar.patches), strict=True))
    run, *scorers = (lane.get_facecolor().tolist() for lane in below.collections)
    wanted = [colours[name] for name in ("prefix", "await scores", "await scores", "backward")]
    assert run == [list(colour) for colour in wanted]
    dark = to_rgba(benchmark_report._SCORING)
    assert scorers == [[list(dark)] * 4, [list(dark)]]
    assert len({*colours.values(), dark}) == 11
    (path,) = below.collections[2].get_paths()
    assert path.get_extents().bounds == pytest.approx((4.0, 1.6, 5.0, 0.8))
    assert below.get_ylim() == (2.5, -0.5)  # the run on top
    lanes = found["timeline"]["lanes"]
    del lanes["scorer http://a:1"], lanes["scorer http://b:2"]
    assert len(benchmark_report.stage_figure(found).axes) == 1


@pytest.mark.parametrize("seconds", [
    (0.5, 14, 8, 33, 2.2, 7, 40, 11.5, 18, 0.4), [1.0] * 10, (0, 7, 7, 7, 7, 7, 7, 7, 51, 0),
])  # fmt: skip
def test_labels_do_not_overlap(seconds):
    spans = [*SPANS, Span("scorer http://scorer-one.cluster.local:8100", "score", 1.0, 2.0)]
    found = {"name": "x", "stages": stages_of(*seconds), **benchmark.timeline(spans)}
    figure = benchmark_report.stage_figure(found)
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    assert {"run", "scorer\na:1", "backward"} <= {text.get_text() for text in texts}
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        assert not a.overlaps(b), f"{one!r} and {other!r}"
    bar = figure.axes[0]
    for text in bar.texts:
        (own,) = (p for p in bar.patches if p.contains_point(bar.transData.transform(
            text.get_position())))  # fmt: skip
        assert own.get_window_extent().width > text.get_window_extent().width


def test_scoring_elsewhere_goes_on_while_the_run_works(tmp_path):
    out = tmp_path / "served.json"
    more = ("policy.groups_per_update=2", "reward.service.spawn=true", "--score", "--fork", "15")
    arguments = [str(RECIPE), *SMALL, *more, "--updates", "1", "--warmup", "0"]
    assert benchmark.main([*arguments, "--output", str(out)]) == 0
    found = json.loads(out.read_text())
    lanes, overlap = found["timeline"]["lanes"], found["overlap"]
    run = lanes.pop("run")
    ((lane, scored),) = lanes.items()
    assert lane.startswith("scorer http://127.0.0.1:")
    assert len(scored) == 2  # a request a group
    assert all(0 < start < stop < overlap["update_s"] for _, start, stop in scored)
    waits = [stop - start for name, start, stop in run if name == "await scores"]
    (replay, *_) = (start for name, start, _ in run if name == "replay")
    sent = min(start for name, start, _ in run if name == "reward")
    assert sent < replay  # while the second group rolls out the first is on its way
    assert sent < scored[0][1]
    assert overlap["update_s"] == pytest.approx(found["update"]["median_s"])
    assert overlap["run_s"] == pytest.approx(overlap["update_s"] - sum(waits), abs=1e-3)
    assert overlap["scoring_s"] == pytest.approx(
        benchmark.busy_seconds([Span(lane, *span) for span in scored]), abs=1e-3
    )
    longer = max(overlap["run_s"], overlap["scoring_s"])
    assert overlap["of_the_longer"] == pytest.approx(overlap["update_s"] / longer)
    assert benchmark_report.overlap_line(overlap) in out.with_suffix(".md").read_text()


def test_the_table_shows_what_each_rank_did():
    lines = benchmark_report.ranks_table([{"replay": 2.0, "other": 0.5}, {"replay": 1.234}])
    assert lines == ["| rank | replay | other |", "|---|---|---|", "| 0 | 2 | 0.5 |",
                     "| 1 | 1.23 |  |"]  # fmt: skip
