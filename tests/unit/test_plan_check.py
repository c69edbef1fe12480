"""Predictions against every committed record; each constant matters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import plan, plan_check, plan_memory, plan_rates

RECORDS = [*sorted(plan_check.UPDATES.rglob("*.json")), *sorted(plan_check.PASSES.rglob("*.json"))]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: "/".join(path.parts[-3:]))
def test_a_prediction_is_within_15_percent_of_the_time_and_5_of_the_memory(path):
    found = plan_check.check_files([path])
    assert found
    for checked in found:
        assert checked.holds, plan_check.table([checked])
        assert checked.measured_s > 0
        assert checked.measured_gib > 0 or checked.name.endswith(": one video")


def test_an_update_is_predicted_from_passes_alone(monkeypatch, tmp_path):
    """Another measured time changes the verdict, not the prediction."""
    path = plan_check.UPDATES / "h100/1.3b_fp8_merged.json"
    (before,) = plan_check.check_files([path])
    record = json.loads(path.read_text())
    record["update"]["median_s"] *= 1.3
    for stage in record["stages"].values():
        stage["median_s"] *= 1.3
    other = tmp_path / path.name
    other.write_text(json.dumps(record))
    (after,) = plan_check.check_files([other])
    assert after.predicted_s == before.predicted_s
    assert before.holds
    assert not after.holds


def test_a_pass_is_predicted_without_its_own_record():
    path = plan_check.PASSES / "h100/1.3b_merged.json"
    for checked in plan_check.check_files([path]):
        assert checked.as_then_s != checked.measured_s


def failures() -> set[str]:
    return {c.name for c in plan_check.check_all() if not c.holds}


@pytest.mark.parametrize("factor", [0.7, 1.3])
@pytest.mark.parametrize("what", ["_GRAPH_WIDTH", "page_bytes", "static_bytes"])
def test_a_wrong_size_fails_the_check(monkeypatch, what, factor):
    held = getattr(plan_memory, what)
    if isinstance(held, float):
        changed = held * factor
    elif what == "page_bytes":
        changed = lambda *a: held(*a) * factor  # noqa: E731
    else:
        changed = lambda *a: {k: v * factor for k, v in held(*a).items()}  # noqa: E731
    for module in (plan_memory, plan_check):
        monkeypatch.setattr(module, what, changed, raising=False)
    assert failures()


@pytest.mark.parametrize("factor", [0.7, 1.3])
@pytest.mark.parametrize("what", ["rest_ms", "attention_ms"])
def test_a_wrong_rate_fails_the_check(monkeypatch, what, factor):
    measured = plan_rates._measured

    def changed(record):
        import dataclasses

        return [
            dataclasses.replace(m, **{what: getattr(m, what) * factor}) for m in measured(record)
        ]

    monkeypatch.setattr(plan_rates, "_measured", changed)
    assert failures() - {"update/1.3b_scored"}


def test_a_wrong_backward_fails_the_check(monkeypatch):
    add = plan_rates._add_graphs

    def changed(rates, own, other):
        add(rates, own, other)
        rates.graphs = {rows: 1.3 * slower for rows, slower in rates.graphs.items()}

    monkeypatch.setattr(plan_rates, "_add_graphs", changed)
    assert any("backward" in name for name in failures())


def test_the_command_says_what_does_not_hold(monkeypatch, tmp_path):
    out = tmp_path / "check.json"
    path = plan_check.UPDATES / "h100/1.3b_fp8_merged.json"
    assert plan.main(["--check", str(path), "--json", str(out)]) == 0
    (checked,) = json.loads(out.read_text())["checks"]
    assert checked["holds"]
    record = json.loads(path.read_text())
    assert checked["measured_s"] == record["update"]["median_s"]
    monkeypatch.setattr(plan_check, "TIME_BAR", 0.001)
    assert plan.main(["--check", str(path)]) == 1


def test_a_file_that_is_no_record_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"rewards": []}')
    with pytest.raises(ValueError, match="is no record of an update or of passes"):
        plan_check.check_files([path])


def test_a_gpu_without_passes_is_refused():
    with pytest.raises(ValueError, match="no pass was measured on 'NVIDIA B200'"):
        plan_rates.kind_of("NVIDIA B200")
    with pytest.raises(ValueError, match="holds no pass of H200"):
        plan_rates.load_rates("H200", Path("docs/benchmarks/passes/h100"))
