"""Counts, layouts, scaling and the command of tools.plan."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_kvpo import settings
from megatron_kvpo.config import ParallelConfig, RunConfig, load_config
from tools import plan
from tools.plan_count import count, pages_of, prompts_of
from tools.plan_layouts import (
    H100,
    H200,
    Layout,
    candidates,
    illegal,
    machines,
    place_of,
    read_topology,
    too_large,
)
from tools.plan_rates import load_rates
from tools.plan_time import expected_longest, group_seconds, travel_seconds, update_seconds

UPDATES = Path("docs/benchmarks/update")
SMALL = Path("examples/wan/benchmark_longlive_1.3b.yaml")
LARGE = Path("examples/wan/benchmark_longlive_14b.yaml")
FP8 = ["policy.merge=true", "model.fp8=[ffn,attention,text]", "parallel.memory_gib=null"]

FORK = 57


def record_of(name: str) -> tuple[dict, RunConfig]:
    record = json.loads((UPDATES / name).read_text())
    return record, settings.from_mapping(RunConfig, record["config"])


@pytest.fixture(scope="module")
def small() -> RunConfig:
    return load_config(SMALL, FP8)


@pytest.fixture(scope="module")
def large() -> RunConfig:
    return load_config(LARGE, [])


@pytest.mark.parametrize(
    "name",
    ["h100/1.3b_fp8_merged.json", "h100/1.3b_fp8_merged_9rows.json", "h100/1.3b_scored.json",
     "14b_fp8_merged_tp2.json", "1.3b_fp8_merged.json", "1.3b_fp8_merged_branch2.json"],
)  # fmt: skip
def test_counts_are_those_of_the_records(name):
    record, config = record_of(name)
    counted = count(config, prompts_of(config)[0], record["fork"], config.parallel.branch)
    measured = {stage: s["passes"] for stage, s in record["stages"].items() if s["passes"]}
    assert {stage: counted.rows_of(stage) for stage in counted.stages} == measured


def test_counts_of_older_commits_differ_where_these_did_more():
    """Two ranks share replays and backward passes otherwise since."""
    record, config = record_of("h100/1.3b_fp8_merged_branch2.json")
    counted = count(config, prompts_of(config)[0], record["fork"], 2)
    more = {s: record["stages"][s]["passes"] - counted.rows_of(s) for s in counted.stages}
    assert more == {"prefix": 0, "recache": 0, "branches": 0, "replay": 120, "backward": -42}


@pytest.mark.parametrize("branch", [2, 4, 8])
def test_branch_ranks_share_all_that_one_does_but_for_the_prefix(small, branch):
    (prompt,) = prompts_of(small)
    alone = count(small, prompt, FORK)
    ranks = [count(small, prompt, FORK, branch, rank) for rank in range(branch)]
    assert all(rank.rows_of("prefix") == alone.rows_of("prefix") for rank in ranks)
    for stage in ("branches", "replay", "backward"):
        assert sum(rank.rows_of(stage) for rank in ranks) == alone.rows_of(stage)


def test_a_stale_update_replays_the_sampling_policy_too(small):
    (prompt,) = prompts_of(small)
    synced, stale = (count(small, prompt, FORK, stale=s).rows_of("replay") for s in (False, True))
    assert (synced, stale) == (17 * 24, 26 * 24)  # nine and eight rows, then nine more


def test_what_is_not_there_cannot_be_counted(small):
    (prompt,) = prompts_of(small)
    with pytest.raises(ValueError, match="no group of this recipe forks at 58"):
        count(small, prompt, 58)
    policy = dataclasses.replace(small.policy, rollouts_per_policy_sync=1)
    with pytest.raises(ValueError, match="never samples by old weights"):
        count(dataclasses.replace(small, policy=policy), prompt, FORK, stale=True)


def layout(**axes: int) -> Layout:
    data = axes.pop("data", 1)
    return Layout(ParallelConfig(sequence_parallel=axes.get("tensor", 1) > 1, **axes), data)


@pytest.mark.parametrize(
    ("axes", "reason"),
    [
        ({"tensor": 8}, "num_heads 12 does not divide"),
        ({"data": 8}, "policy.groups_per_update"),
        ({"branch": 16}, "exceeds routing.num_branches 8"),
    ],
)
def test_layouts_are_refused_with_the_runs_own_reason(small, axes, reason):
    assert reason in (illegal(small, H200, layout(**axes)) or "")


def test_model_ranks_stay_in_a_machine(large):
    assert "crosses machines of 2" in (illegal(large, machines(H200, 2), layout(tensor=4)) or "")
    assert illegal(large, machines(H200, 4), layout(tensor=4)) is None


def test_candidates_use_every_gpu(small):
    for gpus in (1, 2, 8, 32):
        found = list(candidates(small, gpus))
        used = [c.model_ranks * c.parallel.branch * c.data for c in found]
        assert used == [gpus] * len(used)
        assert len({str(c) for c in found}) == len(found)


def test_more_memory_never_makes_a_layout_illegal(small, large):
    for config in (small, large):
        prompts, own = prompts_of(config), layout(tensor=2)
        before = True
        for gib in (20, 40, 60, 80, 100, 120, 140, 192):
            topology = dataclasses.replace(H200, gpu_memory_gib=float(gib))
            place = place_of(config, topology, own, lent=30)
            found, why = too_large(config, prompts, place)
            assert before or why is None or "at least" in why
            assert (why is not None) <= before, f"{gib} GiB are too few, less were enough"
            before = why is not None
            assert found.peak <= gib or why is not None
        assert not before


def test_a_group_of_prompts_needs_its_prefixes(small):
    """A run holds all prefixes of a data rank at once: 33 pages each."""
    prompts = prompts_of(small)
    sizes = [pages_of(small, prompts, 1, groups) for groups in (1, 2, 8)]
    assert sizes == [33 + 75, 66 + 75, 8 * 33 + 75]


def test_the_longest_of_several_ranks():
    coin = [(10.0, 0.5), (20.0, 0.5)]
    assert expected_longest(coin, 1, 1) == pytest.approx(15.0)
    assert expected_longest(coin, 1, 2) == pytest.approx(17.5)
    assert expected_longest(coin, 2, 1) == pytest.approx(30.0)
    assert expected_longest(coin, 2, 2) == pytest.approx((40 * 7 + 30 * 8 + 20 * 1) / 16)
    assert expected_longest([(3.0, 1.0)], 1, 32) == pytest.approx(3.0)


def test_gradients_travel_by_the_slowest_link(small):
    trained = 30 * 256 * (8 * 2 * 1536 + 2 * (1536 + 8960))
    groups = dataclasses.replace(small.policy, groups_per_update=32)
    config = dataclasses.replace(small, policy=groups)
    inside = travel_seconds(config, machines(H200, 8), layout(data=8))["all-reduce"]
    across = travel_seconds(config, machines(H200, 32), layout(data=32))["all-reduce"]
    assert inside == pytest.approx(2 * 7 / 8 * trained * 4 / (0.69 * 450e9))
    assert across == pytest.approx(2 * 31 / 32 * trained * 4 / (0.69 * 50e9))
    assert travel_seconds(config, machines(H200, 1), layout())["all-reduce"] == 0


def test_more_ranks_take_no_longer_and_less_than_even_shares(small):
    rates, prompts = load_rates("H200"), prompts_of(small)
    seconds = [
        update_seconds(
            rates, small, machines(H200, n), layout(branch=n), prompts, forks=[FORK]
        ).seconds
        for n in (1, 2, 4, 8)
    ]
    assert seconds == sorted(seconds, reverse=True)
    for n, taken in zip((2, 4, 8), seconds[1:], strict=True):
        assert taken > seconds[0] / n


def test_data_ranks_wait_for_no_fork_if_an_update_has_one(small):
    rates, prompts = load_rates("H200"), prompts_of(small)
    four = dataclasses.replace(small.policy, groups_per_update=4)
    own = dataclasses.replace(small, policy=four)
    routing = dataclasses.replace(own.routing, forks="per_update")
    one = dataclasses.replace(own, routing=routing)
    place = (machines(H200, 4), layout(data=4), prompts)
    apart, together = (update_seconds(rates, config, *place) for config in (own, one))
    assert together.lost["forks that differ"] == pytest.approx(0.0, abs=1e-9)
    assert apart.lost["forks that differ"] > 10
    waited = apart.lost["forks that differ"]
    assert apart.seconds - together.seconds == pytest.approx(waited, rel=1e-6)


def test_a_decoder_and_judges_take_their_time(small):
    scored = load_config(SMALL, [*FP8, "codec.vae=/nowhere", "reward.weights={hpsv3: 1}"])
    elsewhere = load_config(SMALL, [*FP8, "codec.vae=/nowhere", "reward.weights={hpsv3: 1}",
                                    "reward.service.urls=[http://127.0.0.1:8100]"])  # fmt: skip
    rates, one = load_rates("H100"), layout()
    (prompt,) = prompts_of(small)
    bare, here, there = (
        group_seconds(rates, c, one, prompt, FORK) for c in (small, scored, elsewhere)
    )
    latents = FORK + 9 * (147 - FORK)
    assert here.stages["decode"] == pytest.approx(latents / 3 * rates.decode_ms / 1e3)
    assert here.stages["reward"] == pytest.approx(4.596, abs=0.01)
    assert there.stages["await scores"] == 0  # behind the replays
    assert here.seconds > there.seconds > bare.seconds


def test_machines_are_read_from_yaml(tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text("nodes: 2\ngpus_per_node: 8\ngpu: NVIDIA H100 80GB HBM3\ngpu_memory_gib: 79.1\n"
                    "nvlink_gb_s: 450\nib_gb_s: 50\nparallel: {tensor: 2}\n")  # fmt: skip
    assert read_topology(str(path)) == dataclasses.replace(H100, nodes=2)
    path.write_text("nodes: 1\ngpus_per_node: 1\ngpu: H200\ngpu_memory_gib: 139\n")
    assert read_topology(str(path)).gpus == 1
    for links, missing in (("", "nvlink_gb_s"), ("nvlink_gb_s: 450\n", "ib_gb_s")):
        path.write_text(f"nodes: 2\ngpus_per_node: 8\ngpu: H200\ngpu_memory_gib: 139\n{links}")
        with pytest.raises(ValueError, match=missing):
            read_topology(str(path))
    path.write_text("nodes: 2\n")
    with pytest.raises(ValueError, match="gpu_memory_gib is 0"):
        read_topology(str(path))
    with pytest.raises(ValueError, match="12 GPUs are no whole machines of 8"):
        machines(H200, 12)


def test_the_command_plans_and_scales(tmp_path):
    out = tmp_path / "plan.json"
    arguments = [str(SMALL), *FP8, "--gpus", "2", "--forks", "57", "--json", str(out)]
    assert plan.main(arguments) == 0
    (found,) = json.loads(out.read_text())["plans"]
    assert found["best"][0]["layout"] == "branch 2"
    best = found["best"][0]
    assert sum(best["memory_gib"].values()) == pytest.approx(best["peak_gib"])
    assert sum(best["stages_s"].values()) == pytest.approx(best["seconds"], rel=0.02)
    assert "groups_per_update" in next(
        o["why"] for o in found["illegal"] if o["layout"] == "data 2"
    )
    assert (
        plan.main([str(SMALL), *FP8, "--scaling", "1,2", "--forks", "57", "--json", str(out)]) == 0
    )
    rows = json.loads(out.read_text())["plans"]
    assert [(r["gpus"], r["kind"]) for r in rows] == [
        (1, "weak"),
        (2, "weak"),
        (1, "strong"),
        (2, "strong"),
    ]
    assert rows[0]["efficiency"] == 1
    assert all(0.5 < row["efficiency"] <= 1 for row in rows)


def test_the_command_refuses_what_it_cannot_plan():
    with pytest.raises(ValueError, match="name a recipe"):
        plan.main([])
    with pytest.raises(ValueError, match="only runs with adapters are planned"):
        plan.main([str(SMALL), "policy.mode=full", "model.dtype=float32", "--gpus", "1"])
