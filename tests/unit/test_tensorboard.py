"""TensorBoard has the names and updates of metrics.jsonl, one value a step, and the pictures."""

import importlib.util
import math
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from megatron_kvpo.config import LogConfig
from megatron_kvpo.training import trackers
from megatron_kvpo.training.filmstrips import write_video
from megatron_kvpo.training.metrics import Metrics
from megatron_kvpo.training.trackers import TensorBoard, check_installed, markdown, strip_of
from tests.unit.test_trackers import FRAMES, LINE, PROMPTS, lines_of, make_config

pytest.importorskip("tensorboard")


def test_tensorboard_that_is_asked_for_and_not_installed_is_refused(tmp_path, monkeypatch):
    check_installed(LogConfig(tensorboard=True))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_installed(LogConfig())
    with pytest.raises(ValueError, match="tensorboard is not installed: pip install tensorboard"):
        check_installed(LogConfig(tensorboard=True))


def events_of(folder):
    """All that TensorBoard shows of a run's folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    everything = {"scalars": 0, "images": 0, "tensors": 0}
    found = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance=everything)
    return found.Reload()


def curve(events, name):
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_has_the_names_and_updates_of_the_jsonl_and_one_value_a_step(tmp_path):
    config = make_config(tmp_path, tensorboard=True)
    with Metrics(config, first=True) as run:
        for update in range(6):
            run.log(update, {"loss/total": float(update), "time/update_s": 2})
            run.log(update + 1, eval={"composite": 0.5 + update})
    with Metrics(config, first=True, resume_at=4) as run:  # it was killed after its sixth update
        for update in range(4, 8):
            run.log(update, {"loss/total": 10.0 + update, "time/update_s": 2})
    events = events_of(config.run_folder)
    names = {name for line in lines_of(config) for name in line if "/" in name}
    assert set(events.Tags()["scalars"]) == names
    for name in names:
        written = [(line["update"], line[name]) for line in lines_of(config) if name in line]
        assert curve(events, name) == written
    # The evaluation of the weights that it resumed with is not made again, and stays.
    assert curve(events, "eval/composite")[-1] == (4, 3.5)
    with Metrics(config, first=True) as run:  # anew in the old folder
        run.log(0, {"loss/total": 1.0})
    assert curve(events_of(config.run_folder), "loss/total") == [(0, 1.0)]


def test_what_tensorboard_was_told_is_on_disk_while_the_run_goes_on(tmp_path):
    config = make_config(tmp_path, tensorboard=True)
    with Metrics(config, first=True) as run:
        run.log(0, {"loss/total": 1.0})
        run.log(1, {"loss/total": math.nan, "policy/last": 1.0})
        for attempt in range(100):
            time.sleep(0.1)
            copy = tmp_path / f"copy_{attempt}"  # what a kill -9 now would leave
            if (config.run_folder / "tensorboard").is_dir():
                shutil.copytree(config.run_folder, copy)
                events = events_of(copy)
                if (
                    "loss/total" in events.Tags()["scalars"]
                    and len(events.Scalars("loss/total")) > 1
                ):
                    break
        (_, one), (step, other) = curve(events, "loss/total")
    assert one == 1.0
    assert step == 1
    assert math.isnan(other)


def test_tensorboard_shows_gifs_strips_and_tables(tmp_path, monkeypatch):
    for suffix in (".gif", ".mp4"):
        write_video(tmp_path / f"clip{suffix}", FRAMES)
    Image.fromarray(FRAMES[0]).save(tmp_path / "samples.png")
    config = make_config(tmp_path, tensorboard=True)
    with Metrics(config, first=True) as run:
        run.log_picture("eval/videos", tmp_path / "clip.gif", 2)
        run.log_picture("sample/best", tmp_path / "clip.mp4", 3, "best, branch 1")
        run.log_picture("eval/samples", tmp_path / "samples.png", 3)
        run.log_rewards(3, [LINE], PROMPTS)
    events = events_of(config.run_folder)
    (gif,) = events.Images("eval/videos")
    assert gif.encoded_image_string == (tmp_path / "clip.gif").read_bytes()
    assert (gif.step, gif.width, gif.height) == (2, 16, 16)
    (strip,) = events.Images("sample/best")
    assert (strip.step, strip.width, strip.height) == (3, 160, 16)
    assert events.Images("eval/samples")[0].width == 16
    (table,) = events.Tensors("sample/groups/text_summary")
    text = table.tensor_proto.string_val[0].decode()
    assert text.splitlines()[0].startswith("| prompt | caption | fork | sequence |")
    assert "| 3 | a red \\| square; then it falls | 6 | anchor | 3 |  | 0 |" in text
    (caption,) = events.Tensors("sample/best_caption/text_summary")
    assert caption.tensor_proto.string_val == [b"best, branch 1"]
    monkeypatch.setattr(trackers, "_LARGEST_GIF", 10)
    board = TensorBoard(tmp_path / "large" / "tensorboard", 0)
    board.picture(0, "eval/videos", tmp_path / "clip.gif", "")
    board.close(False)
    (large,) = events_of(tmp_path / "large").Images("eval/videos")
    assert large.width == 160


def test_a_tensorboard_that_cannot_write_is_a_warning(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(trackers.logger, "warning", lambda *a: warned.append(a[0] % a[1:]))
    config = make_config(tmp_path, tensorboard=True)
    config.run_folder.mkdir(parents=True)
    (config.run_folder / "tensorboard").write_text("a file where the folder should be")
    with Metrics(config, first=True) as run:
        run.log(0, {"loss/total": 1.0})
    assert len(lines_of(config)) == 1
    (warning,) = warned
    assert "TensorBoard stopped" in warning


def test_tables_and_strips():
    assert markdown([{"a": 1.23456, "b": None}]) == "| a | b |\n| --- | --- |\n| 1.235 |  |"


def test_a_strip_spreads_over_the_video(tmp_path):
    frames = np.repeat(np.arange(0, 240, 20, dtype=np.uint8), 16 * 16 * 3).reshape(12, 16, 16, 3)
    write_video(tmp_path / "clip.gif", frames)
    strip = strip_of(tmp_path / "clip.gif")
    assert strip.shape == (16, 160, 3)
    np.testing.assert_allclose([strip[0, 0, 0], strip[0, -1, 0]], [0, 220], atol=2)
