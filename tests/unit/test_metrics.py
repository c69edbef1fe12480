"""metrics.jsonl survives resumes and odd numbers; wandb is a guest that cannot hurt the run."""

import json
import math
import socket
import sys

import numpy as np
import pytest
import torch

from megatron_kvpo.config import LogConfig, RunConfig, load_config
from megatron_kvpo.training import metrics
from megatron_kvpo.training.filmstrips import write_video
from megatron_kvpo.training.metrics import Metrics, read_jsonl, truncate


@pytest.fixture(autouse=True)
def _no_login(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


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
        run.log_video("eval/before", tmp_path / "none.gif")
    assert not config.folder.exists()


def test_disabled_does_not_import_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it now raises ImportError
    with Metrics(make_config(tmp_path), first=True) as run:
        run.log(0, {"loss/total": 1.0})


def test_a_missing_wandb_is_a_warning_and_the_run_goes_on(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(metrics.logger, "warning", lambda *a: warned.append(a[0] % a[1:]))
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = make_config(tmp_path, wandb="offline")
    with Metrics(config, first=True) as run:
        run.log(0, {"loss/total": 1.0})
    assert len(lines_of(config)) == 1
    assert "wandb cannot be imported" in warned[0]


@pytest.mark.parametrize(
    "error", [OSError("disk full"), TimeoutError("slow"), "wandb"], ids=["os", "timeout", "wandb"]
)
def test_a_wandb_that_fails_to_start_or_dies_later_is_a_warning(tmp_path, monkeypatch, error):
    import wandb

    failure = wandb.errors.CommError("no server") if error == "wandb" else error

    class Dying:
        id = "x"

        def define_metric(self, *names, **options): ...

        def log(self, values):
            raise failure

    warned, answers = [], [failure, Dying()]
    monkeypatch.setattr(metrics.logger, "warning", lambda *a: warned.append(a[0] % a[1:]))

    def init(**options):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(wandb, "init", init)
    config = make_config(tmp_path, wandb="online")
    with Metrics(config, first=True) as run:
        run.log(0, {"loss/total": 1.0})
        run.log(1, {"loss/total": 2.0})
    assert "does not start online" in warned[0]
    assert "wandb stopped" in warned[1]
    assert len(warned) == 2
    assert len(lines_of(config)) == 2


def test_auto_is_offline_without_a_key_and_online_with_one(tmp_path, monkeypatch):
    assert metrics._wandb_mode("auto") == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert metrics._wandb_mode("auto") == "online"
    (tmp_path / "netrc").write_text("machine elsewhere.example login user password secret\n")
    assert metrics._wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert metrics._wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert metrics._wandb_mode("auto") == "offline"
    assert metrics._wandb_mode("disabled") == "disabled"


def test_the_wandb_id_is_kept_over_a_resume_and_new_for_a_fresh_run(tmp_path):
    first = metrics._wandb_id(tmp_path, resumed=False)
    assert metrics._wandb_id(tmp_path, resumed=True) == first
    assert metrics._wandb_id(tmp_path, resumed=False) != first


def test_offline_wandb_takes_scalars_and_videos_inside_the_run_folder(tmp_path, capfd, monkeypatch):
    """The real thing, without a network: opening a connection to another machine fails the test."""
    connect = socket.socket.connect

    def local_only(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            pytest.fail(f"connects to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
    config = make_config(tmp_path, wandb="offline")
    frames = np.random.default_rng(0).integers(0, 256, size=(5, 16, 16, 3), dtype=np.uint8)
    for suffix in (".gif", ".mp4"):
        write_video(tmp_path / f"strip{suffix}", frames, scale=2)
    with Metrics(config, first=True) as run:
        run.log(0, {"loss/total": 1.0})
        run.log_video("eval/before", tmp_path / "strip.gif", caption="a red square")
        run.log_video("eval/after", tmp_path / "strip.mp4", update=1)
        with pytest.raises(ValueError, match="no video at"):
            run.log_video("eval/after", tmp_path / "none.mp4")
    [folder] = (config.run_folder / "wandb").glob("offline-run-*")
    assert (config.run_folder / "wandb_id.txt").read_text().strip() in folder.name
    assert list(folder.glob("run-*.wandb"))
    kept = {path.suffix for path in folder.rglob("media/videos/**/*") if path.is_file()}
    assert kept == {".gif", ".mp4"}
    out, err = capfd.readouterr()
    assert "wandb:" not in out + err
