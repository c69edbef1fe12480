"""The report shows what the run left, leaves out what it did not, and draws frames unchanged."""

import base64
import io
import re
import types

import av
import numpy as np
import pytest
import torch
from PIL import Image

from megatron_kvpo.config import RunConfig
from megatron_kvpo.records import Prompt
from megatron_kvpo.training import report
from megatron_kvpo.training.evaluate import SMALL, Evaluator
from megatron_kvpo.training.filmstrips import (
    DPI,
    Filmstrips,
    comparison_figure,
    grid_video,
    write_video,
)
from tests.unit._synthetic_run import CAPTIONS, moving_square, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = RunConfig(name="<demo>", folder=tmp_path_factory.mktemp("runs"))
    write_run(config.run_folder, config)
    report.write_report(config.run_folder)
    return config.run_folder


def embedded(page):
    return [base64.b64decode(d) for d in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]


def test_the_page_holds_all_pictures_and_needs_no_other_file(folder):
    page = (folder / "report.html").read_text()
    names = ["rewards", "components", "filmstrips", "branches", "policy"]
    assert embedded(page) == [(folder / f"report_{name}.png").read_bytes() for name in names]
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "<script" not in page
    assert "&lt;demo&gt;" in page
    assert "consistency (held out)" in page
    assert "num_updates: 1500" in page


def test_the_pictures_are_no_blank_paper(folder):
    for path in folder.glob("report_*.png"):
        picture = np.asarray(Image.open(path).convert("RGB"))
        assert min(picture.shape[:2]) > 100
        assert len({tuple(colour) for colour in picture[::3, ::3].reshape(-1, 3)}) > 20, path.name


@pytest.mark.parametrize(
    ("gone", "picture"),
    [
        ("metrics.jsonl", "rewards"),
        ("evaluation_after.npz", "components"),
        ("filmstrips/branches.npz", "branches"),
        ("summary.json", None),
        ("config.yaml", None),
    ],
)
def test_a_missing_piece_is_left_out(tmp_path, gone, picture):
    config = RunConfig(name="demo", folder=tmp_path)
    write_run(config.run_folder, config, updates=3)
    (config.run_folder / gone).unlink()
    page = report.write_report(config.run_folder).read_text()
    if picture is not None:
        assert not (config.run_folder / f"report_{picture}.png").exists()
    assert len(embedded(page)) == {"metrics.jsonl": 3}.get(gone, 5 if picture is None else 4)


def test_an_empty_folder_still_gives_a_page(tmp_path):
    page = report.write_report(tmp_path, title="nothing yet").read_text()
    assert "nothing yet" in page
    assert "no summary yet" in page


def test_smoothing_and_its_error_match_the_hand_computed_ones():
    value = np.array([1.0, 2.0, 6.0, 3.0])
    mean, error = report.smooth(value, 3)
    assert mean == pytest.approx([1.5, 3.0, 11 / 3, 4.5])
    # [1, 2]: sd .7071 over sqrt 2; [1, 2, 6]: sd sqrt(7) over sqrt 3.
    assert error[:2] == pytest.approx([0.5, np.sqrt(7 / 3)])
    _, given = report.smooth(value, 3, np.full(4, 0.3))
    assert given == pytest.approx([0.3 / 2**0.5, 0.3 / 3**0.5, 0.3 / 3**0.5, 0.3 / 2**0.5])


def test_filmstrips_draw_every_shown_frame_with_its_own_pixels(tmp_path):
    """Each source pixel must come out as a k x k square of exactly its colour."""
    rng = np.random.default_rng(3)
    frames = rng.integers(0, 256, size=(1, 4, 8, 8, 3), dtype=np.uint8)
    strips = Filmstrips(frames_RFHWC=frames, labels=("noise",))
    figure = comparison_figure([{"before": strips}], num_shown=4)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI)
    picture = np.asarray(Image.open(buffer).convert("RGB"))
    corner = frames[0, 0, 0, 0]
    hits = np.argwhere((picture == corner).all(axis=-1))
    scale = round(len(hits) ** 0.5)
    assert scale > 4
    y, x = hits.min(axis=0)
    shown = picture[y : y + 8 * scale, x : x + 8 * scale]
    assert np.array_equal(shown, frames[0, 0].repeat(scale, axis=0).repeat(scale, axis=1))


def test_filmstrips_survive_disk(tmp_path):
    frames = np.stack([moving_square(np.random.default_rng(0), frames=3) for _ in CAPTIONS])
    one = Filmstrips(frames_RFHWC=frames, labels=CAPTIONS, window=(1, 2), caption="a prompt")
    one.save(tmp_path / "filmstrips" / "branches.npz")
    two = Filmstrips.load(tmp_path / "filmstrips" / "branches.npz")
    assert two is not None
    assert np.array_equal(one.frames_RFHWC, two.frames_RFHWC)
    assert (two.labels, two.window, two.caption) == (CAPTIONS, (1, 2), "a prompt")
    assert Filmstrips.load(tmp_path / "none.npz") is None


def test_filmstrips_of_other_shapes_or_prompts_are_refused():
    frames = np.zeros((2, 3, 4, 4, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="float32"):
        Filmstrips(frames_RFHWC=frames.astype(np.float32), labels=("a", "b"))
    with pytest.raises(ValueError, match="1 labels"):
        Filmstrips(frames_RFHWC=frames, labels=("a",))
    one = Filmstrips(frames_RFHWC=frames, labels=("a", "b"))
    other = Filmstrips(frames_RFHWC=frames, labels=("a", "c"))
    with pytest.raises(ValueError, match="different prompts"):
        comparison_figure([{"before": one, "after": other}])


def test_videos_come_back_with_their_frames_size_and_speed(tmp_path):
    frames = moving_square(np.random.default_rng(5), frames=10, side=16)
    write_video(tmp_path / "v.gif", frames, fps=10, scale=2)
    with Image.open(tmp_path / "v.gif") as picture:
        assert picture.size == (32, 32)
        shown_ms = 0
        for i in range(picture.n_frames):  # equal frames in a row are stored once, shown longer
            picture.seek(i)
            shown_ms += picture.info["duration"]
        assert shown_ms == 10 * 100
    write_video(tmp_path / "v.mp4", frames[:, :15, :13], fps=8, scale=3)  # 45 x 39: both odd
    with av.open(str(tmp_path / "v.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 8
        decoded = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)])
    assert decoded.shape == (10, 46, 40, 3)
    shown = frames[:, :15, :13].repeat(3, axis=1).repeat(3, axis=2)
    assert np.abs(decoded[:, :45, :39].astype(int) - shown).mean() < 6
    with pytest.raises(ValueError, match=r"no way to write a \.avi"):
        write_video(tmp_path / "v.avi", frames)
    with pytest.raises(ValueError, match="a video is uint8"):
        write_video(tmp_path / "v.gif", frames[0])


def test_a_grid_places_each_video_in_reading_order():
    frames = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1, 1) * np.ones(
        (3, 2, 4, 5, 3), np.uint8
    )
    page = grid_video(frames, columns=2, gap=1)
    assert page.shape == (2, 9, 11, 3)
    assert page[0, 0, 0, 0] == 0
    assert page[0, 0, 6, 0] == 1
    assert page[1, 5, 0, 0] == 2
    assert page[0, 4, 0, 0] == page[0, 0, 5, 0] == page[0, 8, 10, 0] == 255


def test_large_videos_of_an_evaluation_are_an_mp4_in_rows_as_they_are(tmp_path):
    config = RunConfig(folder=tmp_path)
    codec = types.SimpleNamespace(spatial_stride=8)
    prompts = [Prompt(segments=(f"a red square {n}",), index=n) for n in range(4)]
    evaluator = Evaluator(config, None, None, None, None, None, codec, prompts)
    height, width = config.model.pixel_size(8)
    assert width > SMALL
    evaluator._save_strips(torch.rand(4, 2, 3, height, width), "before")
    assert evaluator.video_path("before").suffix == ".mp4"
    with av.open(str(evaluator.video_path("before"))) as container:
        (video,) = container.streams.video
        assert (video.height, video.width) == (2 * height, 3 * width)
