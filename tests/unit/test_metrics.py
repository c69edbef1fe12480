"""metrics.jsonl survives resumes and odd numbers, and tells what updates cost."""

import json
import math
import time

import numpy as np
import pytest
import torch

from megatron_kvpo import stopwatch
from megatron_kvpo.config import LogConfig, RunConfig, load_config
from megatron_kvpo.model.flops import peak_of
from megatron_kvpo.stopwatch import Stage, Stopwatch, stage
from megatron_kvpo.training.metrics import Meter, Metrics, read_jsonl, truncate
from tests.unit import small

ranks = small.ranks


def make_config(tmp_path, wandb="disabled", **more):
    return RunConfig(name="demo", folder=tmp_path / "runs", log=LogConfig(wandb=wandb), **more)


def lines_of(config):
    return read_jsonl(config.run_folder / "metrics.jsonl")


def test_one_object_per_call_with_plain_numbers_of_every_kind(tmp_path):
    config = make_config(tmp_path)
    with Metrics(config, first=True) as run:
        run.log(0, {"reward/vq": torch.tensor(0.5), "time/update_s": 2})
        run.log(1, loss={"total": np.float32(0.25), "kl": torch.tensor([1e-6])}, policy={"n": 3})
    first, second = lines_of(config)
    assert first == {"update": 0, "reward/vq": 0.5, "time/update_s": 2}
    assert second == {
        "update": 1, "loss/total": 0.25, "loss/kl": pytest.approx(1e-6), "policy/n": 3
    }  # fmt: skip


def test_lines_are_on_disk_before_the_run_ends(tmp_path):
    config = make_config(tmp_path)
    with Metrics(config, first=True) as run:
        run.log(0, {"loss/total": 1.0})
        assert len(lines_of(config)) == 1


def test_the_resolved_config_reads_back_as_the_same_run(tmp_path):
    config = make_config(tmp_path, seed=7)
    with Metrics(config, first=True):
        pass
    assert load_config(config.run_folder / "config.yaml") == config


def test_numbers_that_are_not_finite_are_null_and_named(tmp_path):
    config = make_config(tmp_path)
    with Metrics(config, first=True) as run:
        run.log(2, {"loss/total": math.nan, "loss/kl": math.inf, "policy/entropy": 2.0})
    text = (config.run_folder / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert line["loss/total"] is None
    assert line["policy/entropy"] == 2.0
    assert line["non_finite"] == ["loss/kl", "loss/total"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reward_vq": 1.0}, "belongs to no group"),
        ({"rewards/vq": 1.0}, "belongs to no group"),
        ({"reward/": 1.0}, "belongs to no group"),
        ({"reward/vq": torch.zeros(3)}, "has 3 values"),
        ({"reward/vq": np.zeros(2)}, "has 2 values"),
    ],
)
def test_bad_metrics_are_refused(tmp_path, values, message):
    with (
        Metrics(make_config(tmp_path), first=True) as run,
        pytest.raises(ValueError, match=message),
    ):
        run.log(0, values)


def test_logging_outside_the_with_is_refused(tmp_path):
    with pytest.raises(ValueError, match="enter it first"):
        Metrics(make_config(tmp_path), first=True).log(0, {"loss/total": 1.0})


def test_resume_drops_what_came_after_the_checkpoint_and_repeats_nothing(tmp_path):
    config = make_config(tmp_path)
    with Metrics(config, first=True) as run:
        for update in range(6):
            run.log(update, {"loss/total": float(update)})
    with Metrics(config, first=True, resume_at=4) as run:
        for update in range(4, 8):
            run.log(update, {"loss/total": 10.0 + update})
    assert [line["update"] for line in lines_of(config)] == list(range(8))
    assert [line["loss/total"] for line in lines_of(config)] == [0, 1, 2, 3, 14, 15, 16, 17]


def test_resume_keeps_the_evaluation_of_the_weights_it_resumes_with_unless_it_comes_again(tmp_path):
    config = make_config(tmp_path)
    with Metrics(config, first=True) as run:
        run.log(1, {"loss/total": 1.0})
        run.log(2, {"eval/composite": 0.5})
        run.log(2, {"loss/total": 2.0})
        run.log(3, {"eval/composite": 0.6})
    path = config.run_folder / "metrics.jsonl"
    truncate(path, resume_at=2, keep_evaluation=True)
    assert [(line["update"], "eval/composite" in line) for line in lines_of(config)] == [
        (1, False), (2, True),
    ]  # fmt: skip
    truncate(path, resume_at=2)
    assert [line["update"] for line in lines_of(config)] == [1]


def test_a_fresh_run_in_an_old_folder_starts_an_empty_file(tmp_path):
    config = make_config(tmp_path)
    for _ in range(2):
        with Metrics(config, first=True) as run:
            run.log(0, {"loss/total": 1.0})
    assert len(lines_of(config)) == 1


def test_a_line_cut_off_by_a_crash_is_dropped_but_a_broken_one_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 0, "loss/total": 1.0}\n{"update": 1, "loss/tot')
    truncate(path, resume_at=5)
    assert path.read_text() == '{"update": 0, "loss/total": 1.0}\n'
    path.write_text('{"update": 0}\nnonsense\n{"update": 1}\n')
    with pytest.raises(ValueError, match="line 2 is no metrics line"):
        read_jsonl(path)


def test_other_ranks_write_nothing(tmp_path):
    config = make_config(tmp_path, wandb="offline")
    with Metrics(config, first=False) as run:
        run.log(0, {"whatever": 1.0})
        run.log_picture("eval/videos", tmp_path / "none.gif")
    assert not config.folder.exists()


def test_a_picture_that_is_none_is_refused(tmp_path):
    (tmp_path / "clip.avi").write_text("")
    with Metrics(make_config(tmp_path), first=True) as run:
        for name in ("none.mp4", "clip.avi"):
            with pytest.raises(ValueError, match="no picture at"):
                run.log_picture("eval/videos", tmp_path / name)


def test_a_meter_tells_seconds_rates_and_memory_of_each_stage_since_it_was_read(ranks):
    meter = Meter(LogConfig(peak_tflops=2e-6), ranks)
    assert meter.read() == {}
    with meter.running():
        with stage("await scores"):
            time.sleep(0.02)
        with stage("replay"):
            time.sleep(0.05)
            stopwatch.count(9e6, 3, needed_flops=6e4, tokens=100)
        with stage("save"):
            time.sleep(0.03)
        found = meter.read()
        with stage("step"):
            time.sleep(0.01)
        second = meter.read("step", count=2)
    replay_s = found["time/replay_s"]
    assert 0.05 <= replay_s < 0.07
    assert 0.02 <= found["time/await_scores_s"] < 0.04
    assert found["speed/replay_tokens_per_s"] == pytest.approx(100 / replay_s)
    assert found["speed/replay_tflops"] == pytest.approx(6e4 / replay_s / 1e12)
    assert found["speed/replay_mfu"] == pytest.approx(6e4 / replay_s / 2e6)  # of needed work
    assert not [name for name in found if name.startswith("speed/await")], "it computes nothing"
    parts = [found[f"time/{name}_s"] for name in ("other", "await_scores", "replay")]
    assert found["time/update_s"] == pytest.approx(sum(parts))  # saving is no part of it
    assert found["time/save_s"] >= 0.03
    assert found["speed/update_tokens_per_s"] == pytest.approx(100 / found["time/update_s"])
    assert 0.01 < found["memory/host_peak_gib"] < 64
    assert "memory/peak_gib" not in found, "there is no GPU"
    assert second.keys() == {"time/other_s", "time/step_s", "memory/host_peak_gib"}
    assert 0.005 <= second["time/step_s"] < 0.02  # of one of two steps
    assert meter.read() == {}


def test_without_a_known_peak_there_is_no_mfu_and_without_costs_nothing(ranks):
    assert peak_of("NVIDIA H100 80GB HBM3") == peak_of("NVIDIA H200") == 989
    assert peak_of("NVIDIA H100 PCIe") == 756
    assert peak_of("some other card") is None
    meter = Meter(LogConfig(), ranks)
    with meter.running(), stage("replay"):
        stopwatch.count(1.0, 1, needed_flops=1.0, tokens=1.0)
        found = meter.read()
    assert "speed/replay_tflops" in found
    assert not [name for name in found if name.endswith("mfu")]
    silent = Meter(LogConfig(costs=False), ranks)
    with silent.running():
        assert not stopwatch.running()
        assert silent.read() == {}


def test_a_meter_gives_way_to_a_stopwatch(ranks):
    meter = Meter(LogConfig(), ranks)
    with Stopwatch() as watch, meter.running(), stage("step"):
        assert meter.read() == {}
    assert "step" in watch.stages


def test_figures_of_ranks_are_the_slowest_ones_seconds_and_all_ones_work(ranks):
    meter = Meter(LogConfig(peak_tflops=1e-11), ranks)  # 10 operations a second
    parts = [Stage(seconds=2.0, tokens=30, needed_flops=10), Stage(),
             Stage(seconds=8.0, tokens=50, needed_flops=40)]  # fmt: skip
    found = meter._figures("replay", parts, 1)
    assert found == {
        "time/replay_s": 8.0, "speed/replay_tokens_per_s": 10.0, "speed/replay_tflops": 5e-12,
        "speed/replay_mfu": 0.5,
    }  # fmt: skip
