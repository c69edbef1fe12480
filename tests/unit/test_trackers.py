"""Trackers show what the files hold, and can neither stop nor slow a run; wandb among them."""

import json
import math
import socket
import sys
import threading
import time
import types

import numpy as np
import pytest
from PIL import Image

from megatron_kvpo.config import LogConfig, RunConfig
from megatron_kvpo.records import Prompt
from megatron_kvpo.training import trackers
from megatron_kvpo.training.filmstrips import write_video
from megatron_kvpo.training.metrics import Metrics, read_jsonl
from megatron_kvpo.training.trackers import Guest

FRAMES = np.random.default_rng(0).integers(0, 256, size=(12, 16, 16, 3), dtype=np.uint8)
LINE = {"prompt": 3, "fork": 6, "local": {"temporal_consistency": [0.1, 0.2, 0.3]},
        "global": {"temporal_consistency": [1.0, 2.0, 3.0]}, "advantage": [0.5, -0.5],
        "energy": [0.25, 0.75, 0.0]}  # fmt: skip
PROMPTS = (Prompt(segments=("a red | square", "it falls"), switch_frames=(3,), index=3),)


@pytest.fixture(autouse=True)
def _no_login(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def warned(monkeypatch):
    said = []
    monkeypatch.setattr(trackers.logger, "warning", lambda *a: said.append(a[0] % a[1:]))
    return said


def make_config(tmp_path, wandb="disabled", **log):
    config = LogConfig(wandb=wandb, **log)
    reward = {"weights": {"temporal_consistency": 2.0}}
    return RunConfig(name="demo", folder=tmp_path / "runs", log=config,
                     reward=type(RunConfig().reward)(**reward))  # fmt: skip


def lines_of(config):
    return read_jsonl(config.run_folder / "metrics.jsonl")


class FakeRun:
    """A run of wandb that refuses steps that go back, as the real one does."""

    def __init__(self, module, options):
        self._module, self.options, self.id = module, options, options["id"]
        self.step = module.steps.get(self.id, 0)
        self.rows, self.exit_code = [], None

    def define_metric(self, *names, **options): ...

    def log(self, values, step):
        if self._module.failure is not None:
            raise self._module.failure
        self._module.gate.wait(30)
        assert step >= self.step, f"step {step} after {self.step}"
        self.step = step
        self.rows.append((step, values))

    def finish(self, exit_code):
        self._module.steps[self.id] = self.step + 1
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch):
    """In the place of the module: what `init` was given and what runs were told."""
    module = types.ModuleType("wandb")
    module.Error = type("Error", (Exception,), {})
    module.errors = types.SimpleNamespace(Error=module.Error)
    module.Settings = dict
    module.Video = lambda path, caption, format: ("video", path, caption, format)
    module.Image = lambda path, caption: ("image", path, caption)
    module.Table = lambda columns, data: ("table", columns, data)
    module.runs, module.steps, module.refuses = [], {}, []
    module.failure, module.gate = None, threading.Event()
    module.gate.set()

    def init(**options):
        if module.refuses:
            raise module.refuses.pop(0)
        module.runs.append(FakeRun(module, options))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_disabled_does_not_import_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it now raises ImportError
    with Metrics(make_config(tmp_path), first=True) as run:
        run.log(0, {"loss/total": 1.0})


def test_a_missing_wandb_is_a_warning_and_the_run_goes_on(tmp_path, monkeypatch, warned):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = make_config(tmp_path, wandb="offline")
    with Metrics(config, first=True) as run:
        run.log(0, {"loss/total": 1.0})
    assert len(lines_of(config)) == 1
    (warning,) = warned
    assert "wandb cannot be imported" in warning


@pytest.mark.parametrize(
    "failure", [OSError("disk full"), TimeoutError("slow"), "wandb", RuntimeError("broken")],
    ids=["os", "timeout", "wandb", "any"],
)  # fmt: skip
def test_a_wandb_that_fails_to_start_or_dies_later_is_a_warning(tmp_path, wandb, warned, failure):
    failure = wandb.Error("no server") if failure == "wandb" else failure
    if not isinstance(failure, RuntimeError):
        wandb.refuses.append(failure)
    wandb.failure = failure
    config = make_config(tmp_path, wandb="online")
    with Metrics(config, first=True) as run:
        for update in range(5):
            run.log(update, {"loss/total": 1.0})
    if not isinstance(failure, RuntimeError):
        assert "does not start online" in warned.pop(0)
        assert wandb.runs[0].options["mode"] == "offline"
    (warning,) = warned  # once, however often it is told
    assert "wandb stopped" in warning
    assert str(failure) in warning
    assert len(lines_of(config)) == 5


def test_a_slow_wandb_neither_slows_the_run_nor_keeps_it_from_ending(
    tmp_path, wandb, warned, monkeypatch
):
    monkeypatch.setattr(trackers, "_MOST_WAITING", 10)
    wandb.gate.clear()
    config, guest = make_config(tmp_path, wandb="online"), Guest.__init__
    monkeypatch.setattr(Guest, "__init__", lambda self, name, start: guest(self, name, start, 0.2))
    began = time.monotonic()
    with Metrics(config, first=True) as run:
        for update in range(30):
            run.log(update, {"loss/total": 1.0})
    assert time.monotonic() - began < 3
    wandb.gate.set()
    assert len(lines_of(config)) == 30
    behind, left = warned
    assert "wandb is behind by 10 entries" in behind
    assert "is left behind" in left


def test_entries_that_a_slow_guest_lacks_are_counted(monkeypatch, warned):
    monkeypatch.setattr(trackers, "_MOST_WAITING", 2)
    gate, done = threading.Event(), []
    tracker = types.SimpleNamespace(errors=(), flush=lambda: None, close=lambda failed: None)
    guest = Guest("it", lambda: gate.wait(10) and tracker)
    for number in range(5):
        guest.tell(lambda _, number=number: done.append(number))
    gate.set()
    guest.close(failed=False)
    assert done == [0, 1]
    assert "lacks 3 entries" in warned[-1]


def test_wandb_gets_the_group_the_videos_and_the_table_of_a_run(tmp_path, wandb):
    write_video(tmp_path / "best.mp4", FRAMES)
    Image.fromarray(FRAMES[0]).save(tmp_path / "samples.png")
    config = make_config(tmp_path, wandb="offline", group="seeds", tags=("a", "b"), project="p")
    with Metrics(config, first=True) as run:
        run.log_rewards(0, [LINE], PROMPTS)
        run.log_picture("sample/best", tmp_path / "best.mp4", 0, "best, branch 1")
        run.log(0, {"loss/total": 1.0, "reward/composite": math.nan})
        run.log_rewards(1, [LINE])  # no table without prompts
        run.log(1, {"loss/total": 2.0})
        run.log_picture("eval/samples", tmp_path / "samples.png", 2)
    (told,) = wandb.runs
    options = told.options
    assert (options["group"], options["tags"], options["project"]) == ("seeds", ["a", "b"], "p")
    assert (options["name"], options["mode"], options["resume"]) == ("demo", "offline", None)
    assert options["config"]["log"]["group"] == "seeds"
    assert told.exit_code == 0
    steps, rows = zip(*told.rows, strict=True)
    assert steps == (0, 0, 0, 1, 2)
    kind, columns, data = rows[0]["sample/groups"]
    assert kind == "table"
    assert len(data) == 3
    anchor = dict(zip(columns, data[-1], strict=True))
    assert anchor == {
        "prompt": 3, "caption": "a red | square; then it falls", "fork": 6, "sequence": "anchor",
        "composite": 3.0, "advantage": None, "energy": 0.0, "global/temporal_consistency": 3.0,
        "local/temporal_consistency": 0.3,
    }  # fmt: skip
    path = str(tmp_path / "best.mp4")
    assert rows[1] == {"update": 0, "sample/best": ("video", path, "best, branch 1", "mp4")}
    assert rows[2]["loss/total"] == 1.0
    assert math.isnan(rows[2]["reward/composite"])
    assert rows[3] == {"update": 1, "loss/total": 2.0}
    assert rows[4]["eval/samples"][0] == "image"
    assert [json.loads(line)["update"] for line in
            (config.run_folder / "rewards.jsonl").read_text().splitlines()] == [0, 1]  # fmt: skip


def test_a_resumed_run_is_the_same_run_in_wandb_and_its_steps_never_go_back(
    tmp_path, wandb, monkeypatch
):
    told = []
    monkeypatch.setattr(trackers.logger, "info", lambda *a: told.append(a[0] % a[1:]))
    config = make_config(tmp_path, wandb="online")
    with Metrics(config, first=True) as run:
        for update in range(6):
            run.log(update, {"loss/total": float(update)})
    with Metrics(config, first=True, resume_at=4) as run:  # the fake fails on a step behind 6
        for update in range(4, 8):
            run.log(update, {"loss/total": 10.0 + update})
    first, second = wandb.runs
    assert first.id == second.id == (config.run_folder / "wandb_id.txt").read_text().strip()
    assert (first.options["resume"], second.options["allow_val_change"]) == ("allow", True)
    assert [step for step, _ in second.rows] == [6, 7]
    assert [line for line in told if "up to update 5" in line] == [
        "wandb has this run up to update 5: what comes before is not sent again"
    ]
    with Metrics(config, first=True) as run:  # from the beginning: another run
        run.log(0, {"loss/total": 0.0})
    assert wandb.runs[2].id != first.id


def test_a_run_that_fails_is_told_as_failed(tmp_path, wandb):
    with pytest.raises(ValueError, match="x"), Metrics(make_config(tmp_path, "offline"), True):
        raise ValueError("x")
    assert wandb.runs[0].exit_code == 1


def test_auto_is_offline_without_a_key_and_online_with_one(tmp_path, monkeypatch):
    mode = trackers.wandb_mode
    assert mode("auto") == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert mode("auto") == "online"
    (tmp_path / "netrc").write_text("machine elsewhere.example login user password secret\n")
    assert mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert mode("auto") == "offline"
    assert mode("disabled") == "disabled"


def test_the_wandb_id_is_kept_over_a_resume_and_new_for_a_fresh_run(tmp_path):
    first = trackers.wandb_id(tmp_path, resumed=False)
    assert trackers.wandb_id(tmp_path, resumed=True) == first
    assert trackers.wandb_id(tmp_path, resumed=False) != first


def test_offline_wandb_takes_figures_videos_and_tables_inside_the_run_folder(
    tmp_path, capfd, monkeypatch, warned
):
    """The real thing, without a network: opening a connection to another machine fails the test."""
    connect, away = socket.socket.connect, []

    def local_only(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            away.append(address)
            raise OSError("no network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
    config = make_config(tmp_path, wandb="offline", group="seeds")
    for suffix in (".gif", ".mp4"):
        write_video(tmp_path / f"strip{suffix}", FRAMES, scale=2)
    with Metrics(config, first=True) as run:
        run.log(0, {"loss/total": 1.0})
        run.log_rewards(0, [LINE], PROMPTS)
        run.log_picture("eval/videos", tmp_path / "strip.gif", caption="a red square")
        run.log_picture("sample/best", tmp_path / "strip.mp4", update=1)
    assert not away
    assert not warned
    [folder] = (config.run_folder / "wandb").glob("offline-run-*")
    assert (config.run_folder / "wandb_id.txt").read_text().strip() in folder.name
    assert list(folder.glob("run-*.wandb"))
    kept = {path.suffix for path in folder.rglob("media/videos/**/*") if path.is_file()}
    assert kept == {".gif", ".mp4"}
    assert list(folder.rglob("media/table/**/*.json"))
    out, err = capfd.readouterr()
    assert "wandb:" not in out + err


def test_other_ranks_tell_no_tracker(tmp_path, wandb):
    config = make_config(tmp_path, "offline", tensorboard=True)
    before = threading.active_count()
    with Metrics(config, first=False) as run:
        run.log(0, {"loss/total": 1.0})
        assert threading.active_count() == before
    assert not wandb.runs
    assert not config.folder.exists()
