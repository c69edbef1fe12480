"""Video files to clips: what decodes, what is refused, in which order."""

import json
import logging
import subprocess
import sys
import textwrap
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from megatron_kvpo.data.video import (
    ClipSpec,
    VideoPipeline,
    VideoSource,
    decode_file,
    load_videos,
    probe_file,
)

pytest.importorskip("nvidia.dali")

FRAMES = 9
CLIP = ClipSpec(num_pixel_frames=FRAMES, size=(16, 16))
BACKGROUND, COLOURS = 20, [(220, 40, 40), (40, 200, 40), (40, 60, 220), (230, 220, 40)]


def picture(colour: tuple[int, int, int], frame: int, size: int = 32) -> np.ndarray:
    """A 12-pixel square on a dark ground that moves right two pixels a frame."""
    image = np.full((size, size, 3), BACKGROUND, np.uint8)
    image[8:20, 2 * frame : 2 * frame + 12] = colour
    return image


def write(path: Path, codec: str = "libvpx-vp9", colour=COLOURS[0], num: int = FRAMES) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "4", "b": "0"} if "vpx" in codec else {"crf": "4"}
        for frame in range(num):
            image = av.VideoFrame.from_ndarray(picture(colour, frame), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    return path


def folder_of(folder: Path, names: list[str]) -> Path:
    lines = [json.dumps({"file": name, "segments": ["x"]}) for name in names]
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Seven good files: five VP9, two H.264."""
    root = tmp_path_factory.mktemp("videos")
    names = []
    for i in range(7):
        codec, suffix = ("libx264", "mp4") if i in (2, 5) else ("libvpx-vp9", "webm")
        write(root / f"{i}.{suffix}", codec, COLOURS[i % 4])
        names.append(f"{i}.{suffix}")
    return folder_of(root, names)


def expected(colour, frames, size: int = 16) -> torch.Tensor:
    """[3, F, size, size] in [-1, 1], by averaging pixels: the resize is a downscale by 2."""
    video = torch.tensor(np.stack([picture(colour, f) for f in frames])).permute(3, 0, 1, 2).float()
    pool = video.unflatten(2, (size, -1)).unflatten(4, (size, -1)).mean(dim=(3, 5))
    return pool / 127.5 - 1


@pytest.mark.parametrize("name", ["0.webm", "2.mp4"])
def test_pixels_are_those_that_were_written(folder, name):
    video = decode_file(folder / name, CLIP)
    assert video.shape == (3, FRAMES, 16, 16)
    assert video.dtype == torch.float32
    error = (video - expected(COLOURS[int(name[0]) % 4], range(FRAMES))).abs()
    assert error.mean() < 0.03, "chroma is subsampled, so edges differ, areas do not"


def test_both_front_ends_agree_on_the_same_pixels(tmp_path, monkeypatch):
    path = write(tmp_path / "a.webm")
    native = decode_file(path, CLIP)
    monkeypatch.setattr("megatron_kvpo.data.graph.NATIVE_CODECS", {"cpu": frozenset()})
    through_pyav = decode_file(path, CLIP)
    assert (native - through_pyav).abs().mean() < 0.02
    assert (native - through_pyav)[:, :, 0].abs().max() < 0.03, "flat ground"


def test_start_and_stride_choose_pixel_frames(folder):
    for name, colour in (("0.webm", COLOURS[0]), ("2.mp4", COLOURS[2])):
        clip = ClipSpec(num_pixel_frames=3, size=(32, 32), start=2, stride=3)
        video = decode_file(folder / name, clip)
        right, early, late = (
            (video - expected(colour, [first + 3 * i for i in range(3)], 32)).abs().mean()
            for first in (2, 1, 3)
        )
        assert right < 0.7 * min(early, late)


def test_uint8_holds_the_values_before_normalisation(folder):
    as_float = decode_file(folder / "0.webm", CLIP)
    clip = ClipSpec(num_pixel_frames=FRAMES, size=(16, 16), dtype=torch.uint8)
    as_uint8 = decode_file(folder / "0.webm", clip)
    torch.testing.assert_close(as_uint8.float() / 127.5 - 1, as_float)


def test_a_batch_mixes_codecs_and_keeps_its_order(folder):
    pipeline = VideoPipeline(folder, CLIP, batch_size=7, shuffle=False)
    (batch,) = pipeline.epoch()
    assert batch.index_B.tolist() == list(range(7))
    for row, index in enumerate(batch.index_B.tolist()):
        error = batch.video_BCFHW[row] - expected(COLOURS[index % 4], range(FRAMES))
        assert error.abs().mean() < 0.04


def test_batches_are_not_overwritten_by_the_next(folder):
    batches = list(VideoPipeline(folder, CLIP, batch_size=2).epoch())
    again = list(VideoPipeline(folder, CLIP, batch_size=2).epoch())
    copies = [batch.video_BCFHW.clone() for batch in again]
    for batch, copy in zip(batches, copies, strict=True):
        torch.testing.assert_close(batch.video_BCFHW, copy, rtol=0, atol=0)
    assert sorted(i for batch in batches for i in batch.index_B.tolist()) == list(range(7))


def test_load_videos_is_in_manifest_order_whatever_the_shuffle(folder):
    shuffled = load_videos(VideoPipeline(folder, CLIP, batch_size=3, seed=5))
    straight = load_videos(VideoPipeline(folder, CLIP, batch_size=4, shuffle=False))
    assert shuffled.shape == (7, 3, FRAMES, 16, 16)
    torch.testing.assert_close(shuffled, straight, rtol=0, atol=0)


def indices(pipeline: VideoPipeline) -> list[list[int]]:
    return [batch.index_B.tolist() for batch in pipeline.epoch()]


def test_order_depends_on_seed_and_epoch_only(folder):
    one = VideoPipeline(folder, CLIP, batch_size=3, seed=1)
    first, second = indices(one), indices(one)
    assert first != second
    assert indices(VideoPipeline(folder, CLIP, batch_size=3, seed=1)) == first
    assert indices(VideoPipeline(folder, CLIP, batch_size=3, seed=2)) != first


def test_ranks_share_the_same_steps_as_one_rank(folder):
    whole = indices(VideoPipeline(folder, CLIP, batch_size=4, seed=1))
    shares = [
        indices(VideoPipeline(folder, CLIP, batch_size=2, seed=1, rank=r, world_size=2))
        for r in (0, 1)
    ]
    joined = [a + b for a, b in zip(*shares, strict=True)]
    assert joined == [whole[0], whole[1][:2]], "the seventh video does not divide over two ranks"


@pytest.mark.parametrize("taken", [1, 3])
def test_a_saved_position_continues_where_it_stood(folder, taken):
    one = VideoPipeline(folder, CLIP, batch_size=3, seed=1)
    reference = indices(one) + indices(one)
    two = VideoPipeline(folder, CLIP, batch_size=3, seed=1)
    stream = two.epoch()
    seen = [next(stream).index_B.tolist() for _ in range(taken)]
    three = VideoPipeline(folder, CLIP, batch_size=3, seed=1)
    three.load_state_dict(two.state_dict())
    rest = indices(three) + ([] if taken == 3 else indices(three))
    assert seen + rest == reference


def test_a_position_of_another_folder_is_refused(folder):
    pipeline = VideoPipeline(folder, CLIP, batch_size=3)
    with pytest.raises(ValueError, match="counts 8 usable videos, the folder now has 7"):
        pipeline.load_state_dict({"epoch": 0, "position": 0, "videos": 8})


@pytest.fixture
def bad_folder(tmp_path) -> Path:
    good = write(tmp_path / "good.webm")
    data = good.read_bytes()
    (tmp_path / "empty.webm").touch()
    (tmp_path / "garbage.webm").write_bytes(b"not a video at all" * 40)
    (tmp_path / "cut.webm").write_bytes(data[: len(data) // 2])
    write(tmp_path / "short.webm", num=5)
    whole = write(tmp_path / "whole.mp4", "libx264").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    names = ["empty.webm", "garbage.webm", "good.webm", "cut.webm", "short.webm", "cut.mp4", "gone"]
    return folder_of(tmp_path, names)


def test_bad_files_are_skipped_counted_and_named(bad_folder, caplog):
    source = VideoSource(path=bad_folder, max_bad=1.0)
    with caplog.at_level(logging.WARNING):
        pipeline = VideoPipeline(source, CLIP, batch_size=4)
    assert [file.index for file in pipeline.report.good] == [2]
    reasons = dict(pipeline.report.rejected)
    assert set(reasons) == {
        "empty.webm", "garbage.webm", "cut.webm", "short.webm", "cut.mp4", "gone",
    }  # fmt: skip
    assert reasons["short.webm"] == "too short: 5 pixel frames, 9 needed"
    assert reasons["empty.webm"] == "the file is empty"
    assert reasons["gone"] == "no such file"
    assert "6 of 7 videos cannot be used: empty.webm: the file is empty" in caplog.text
    (batch,) = pipeline.epoch()
    assert batch.index_B.tolist() == [2]


def test_no_usable_file_is_an_error_with_count_and_reasons(bad_folder):
    folder_of(bad_folder, ["empty.webm", "short.webm"])
    with pytest.raises(ValueError, match=r"2 of 2 videos cannot be used: empty.webm: the file is"):
        VideoPipeline(bad_folder, CLIP, batch_size=4)


def test_a_file_that_only_dali_refuses_comes_through_pyav(folder, monkeypatch, caplog):
    monkeypatch.setattr(
        "megatron_kvpo.data.graph.NATIVE_CODECS", {"cpu": frozenset({"vp9", "h264"})}
    )
    pipeline = VideoPipeline(folder, CLIP, batch_size=7, shuffle=False)
    (batch,) = pipeline.epoch()
    assert batch.index_B.tolist() == list(range(7))
    for row in range(7):
        error = batch.video_BCFHW[row] - expected(COLOURS[row % 4], range(FRAMES))
        assert error.abs().mean() < 0.04
    assert [name in caplog.text for name in ("0.webm", "2.mp4", "5.mp4")] == [False, True, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no manifest at"),
        ('{"file": "a"}\n{"fil": "b"}', "line 2"),
        ('{"file": "a"\n', "line 1"),
        ("", "0 of 0 videos"),
    ],
)
def test_ill_formed_manifests_are_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "manifest.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        VideoPipeline(tmp_path, CLIP, batch_size=1)


def test_one_bad_file_asked_for_by_name_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"x\.webm: no such file"):
        decode_file(tmp_path / "x.webm", CLIP)


def test_probe_reads_no_further_than_the_clip(folder):
    file = probe_file(folder / "0.webm", ClipSpec(num_pixel_frames=2, size=(8, 8)))
    assert (file.codec, file.height, file.width) == ("vp9", 32, 32)


def test_without_dali_the_module_imports_and_the_pipeline_names_the_package(folder):
    code = f"""
        import sys
        sys.modules["nvidia.dali"] = None
        from megatron_kvpo.data.video import ClipSpec, VideoPipeline
        try:
            VideoPipeline({str(folder)!r}, ClipSpec(num_pixel_frames=9, size=(8, 8)), batch_size=1)
        except ImportError as error:
            assert "nvidia-dali-cuda130" in str(error), error
        else:
            raise AssertionError("no error")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
