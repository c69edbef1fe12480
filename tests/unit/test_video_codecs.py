"""Pixels are right in every codec, colour matrix, range and turn, and for clips made elsewhere."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from megatron_kvpo.data.clips import ClipSpec, cut
from megatron_kvpo.data.graph import NATIVE_CODECS, Decoder, to_bt601_inverse
from megatron_kvpo.data.video import VideoPipeline, decode_file, probe_file
from tests.unit.video_files import (
    FRAMES,
    HEIGHT,
    WIDTH,
    by_pyav,
    picture,
    psnr,
    real_clips,
    write,
)

pytest.importorskip("nvidia.dali")

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one CUDA device"),
]
BACKENDS = ["cpu", pytest.param("gpu", marks=gpu)]

COMMON = [
    ("libx264", "mp4", "yuv420p", "h264"), ("libx264", "ts", "yuv420p", "h264"),
    ("libx265", "mp4", "yuv420p", "hevc"), ("libvpx", "webm", "yuv420p", "vp8"),
    ("libvpx-vp9", "webm", "yuv420p", "vp9"), ("libvpx-vp9", "mp4", "yuv420p", "vp9"),
    ("libsvtav1", "mp4", "yuv420p", "av1"), ("libsvtav1", "mkv", "yuv420p10le", "av1"),
    ("mpeg4", "mp4", "yuv420p", "mpeg4"), ("mpeg4", "avi", "yuv420p", "mpeg4"),
    ("mjpeg", "avi", "yuvj420p", "mjpeg"), ("mjpeg", "mov", "yuvj422p", "mjpeg"),
    ("ffv1", "mkv", "yuv420p", "ffv1"), ("prores_ks", "mov", "yuv422p10le", "prores"),
    ("mpeg2video", "mpg", "yuv420p", "mpeg2video"), ("wmv2", "wmv", "yuv420p", "wmv2"),
    ("flv", "flv", "yuv420p", "flv1"), ("libx264", "mkv", "yuv444p", "h264"),
    ("libvpx-vp9", "webm", "yuv444p", "vp9"), ("libx264rgb", "mkv", "rgb24", "h264"),
    ("libx264", "mp4", "yuv420p10le", "h264"), ("libx265", "mkv", "yuv422p10le", "hevc"),
    ("libvpx-vp9", "webm", "yuv420p10le", "vp9"),
]  # fmt: skip


def decoded(path: Path, num: int, height: int, width: int, backend: str = "cpu") -> np.ndarray:
    """[F, H, W, 3] at native size through the pipeline's graph."""
    clip = ClipSpec(num_pixel_frames=num, size=(height, width), dtype=torch.uint8)
    return decode_file(path, clip, backend).permute(1, 2, 3, 0).cpu().numpy()


def written_or_skipped(path: Path, encoder: str, **options) -> Path:
    if encoder not in av.codecs_available:
        pytest.skip(f"this PyAV has no {encoder}")
    offered = [pixel_format.name for pixel_format in av.Codec(encoder, "w").video_formats]
    if options["pix_fmt"] not in offered:
        pytest.skip(f"the {encoder} of this PyAV does not write {options['pix_fmt']}")
    return write(path, encoder, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("encoder", "suffix", "pix_fmt", "codec"), COMMON)
def test_every_common_codec_is_what_pyav_decodes(
    tmp_path, encoder, suffix, pix_fmt, codec, backend
):
    path = written_or_skipped(tmp_path / f"a.{suffix}", encoder, pix_fmt=pix_fmt)
    video = decoded(path, FRAMES, HEIGHT, WIDTH, backend)
    clip = ClipSpec(num_pixel_frames=FRAMES, size=(HEIGHT, WIDTH))
    assert probe_file(path, clip).codec == codec
    assert psnr(video, by_pyav(path)) >= 40
    for number, image in enumerate(video):
        near = [psnr(image, picture(n)) for n in (number - 1, number, number + 1)]
        assert near[1] >= 33
        assert near[1] == max(near), "a pixel frame of another place"


def test_every_other_encoder_of_pyav_is_decoded_or_named_as_unfit(tmp_path):
    hardware = ("_amf", "_nvenc", "_qsv", "_v4l2m2m")
    tried, right, unfit = [], [], {}
    for name in sorted(av.codecs_available):
        if name.endswith(hardware) or name in {row[0] for row in COMMON}:
            continue
        try:
            codec = av.Codec(name, "w")
        except av.codec.codec.UnknownCodecError:
            continue
        if codec.type == "video" and (path := first_that_writes(tmp_path, codec)):
            if name in ("h263", "h263p", "flv"):  # a format of oblong pixels
                continue
            reference = by_pyav(path)
            tried.append(name)
            try:
                if psnr(decoded(path, 4, *reference.shape[1:3]), reference) >= 40:
                    right.append(name)
            except ValueError as error:
                unfit[name] = str(error)
    assert len(tried) > 25, "PyAV's FFmpeg writes more than these"
    assert sorted([*right, *unfit]) == tried
    assert set(unfit) <= {"tiff"}, "its decoder finds faults in what its encoder writes"


def first_that_writes(folder: Path, codec: av.Codec) -> Path | None:
    """A file of four pixel frames in the first container and format that take the codec."""
    offered = [pixel_format.name for pixel_format in codec.video_formats or []]
    formats = [f for f in ("yuv420p", "yuvj420p", "yuv422p10le") if f in offered] or offered[:1]
    for suffix in ("nut", "mkv", "mov"):
        for pix_fmt in formats[:1]:
            path = folder / f"{codec.name}.{suffix}"
            try:
                write(path, codec.name, pix_fmt=pix_fmt, num=4)
                if len(by_pyav(path)) == 4:
                    return path
            except (av.FFmpegError, ValueError):
                continue
    return None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["bikes.mp4", "bigbuckbunny.mp4"])
def test_real_clips_are_what_pyav_decodes(name, backend):
    path = real_clips() / name
    reference = by_pyav(path)[:20]
    video = decoded(path, 20, *reference.shape[1:3], backend)
    assert psnr(video, reference) >= 40


def test_a_real_clip_of_oblong_pixels_is_shown_in_its_proportions():
    path = real_clips() / "carphone_pristine.mp4"
    clip = ClipSpec(num_pixel_frames=5, size=(144, 176), dtype=torch.uint8)
    assert probe_file(path, clip).sample_aspect == pytest.approx(128 / 117)
    video = decode_file(path, clip).permute(1, 2, 3, 0).numpy()
    keep = 176 / (128 / 117)  # columns of 176 that fill the width when each is 128/117 wide
    shown = torch.nn.functional.grid_sample(
        torch.from_numpy(by_pyav(path)[:5]).permute(0, 3, 1, 2).float(),
        torch.nn.functional.affine_grid(
            torch.tensor([[[keep / 176, 0, 0], [0, 1.0, 0]]]).repeat(5, 1, 1), (5, 3, 144, 176)
        ),
        padding_mode="border",
    )
    assert psnr(video, shown.permute(0, 2, 3, 1).numpy()) > 40


def test_a_real_clip_recoded_to_vp9_agrees_between_the_front_ends(tmp_path, monkeypatch):
    pixels = list(by_pyav(real_clips() / "bikes.mp4")[:10])
    path = write(tmp_path / "bikes.webm", "libvpx-vp9", pixels=pixels)
    native = decoded(path, 10, 272, 640)
    monkeypatch.setattr("megatron_kvpo.data.graph.NATIVE_CODECS", {"cpu": frozenset()})
    through_pyav = decoded(path, 10, 272, 640)
    assert psnr(native, through_pyav) >= 40
    assert (native != through_pyav).any(), "these are two decoders' conversions"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("colour_range", [1, 2], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", [1, 5, 9], ids=["bt709", "bt601", "bt2020"])
@pytest.mark.parametrize(("encoder", "suffix"), [("libvpx-vp9", "webm"), ("libx264", "mp4")])
def test_matrix_and_range_are_those_of_the_file(
    tmp_path, encoder, suffix, matrix, colour_range, backend
):
    path = write(tmp_path / f"a.{suffix}", encoder, matrix=matrix, colour_range=colour_range)
    video = decoded(path, FRAMES, HEIGHT, WIDTH, backend)
    file = probe_file(path, ClipSpec(num_pixel_frames=FRAMES, size=(HEIGHT, WIDTH)))
    assert (file.matrix, file.full_range) == (matrix, colour_range == 2)
    assert psnr(video, by_pyav(path)) >= 40
    truth = np.stack([picture(n) for n in range(FRAMES)])
    assert psnr(video, truth) >= 35
    other = {1: 5, 5: 1, 9: 5}[matrix]
    wrong = misread(path, other)
    assert psnr(wrong, truth) < psnr(video, truth) - 4, "the test would not see a wrong matrix"


def misread(path: Path, matrix: int) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([
            f.reformat(format="rgb24", src_colorspace=matrix).to_ndarray()
            for f in container.decode(video=0)
        ])  # fmt: skip


@pytest.mark.parametrize("matrix", [1, 4, 7, 9])
def test_correcting_a_reading_as_bt601_is_a_reading_with_the_right_matrix(matrix):
    red, blue = {1: (0.2126, 0.0722), 4: (0.3, 0.11), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}[
        matrix
    ]
    rgb_3 = torch.tensor([0.3, 0.6, 0.45], dtype=torch.float64)
    luma = red * rgb_3[0] + (1 - red - blue) * rgb_3[1] + blue * rgb_3[2]
    cb, cr = (rgb_3[2] - luma) / (2 * (1 - blue)), (rgb_3[0] - luma) / (2 * (1 - red))
    as_601 = torch.stack([
        luma + 1.402 * cr,
        luma - (0.114 * 1.772 * cb + 0.299 * 1.402 * cr) / 0.587,
        luma + 1.772 * cb,
    ])  # fmt: skip
    torch.testing.assert_close(to_bt601_inverse(matrix) @ as_601, rgb_3)


def test_what_dali_would_read_wrong_does_not_reach_it(tmp_path):
    good = write(tmp_path / "good.webm", "libvpx-vp9")
    files = {
        "bt709": write(tmp_path / "709.webm", "libvpx-vp9", matrix=1, colour_range=1),
        "planar RGB": write(tmp_path / "rgb.webm", "libvpx-vp9", pix_fmt="gbrp"),
        "h264": write(tmp_path / "h264.mp4"),
    }
    clip = ClipSpec(num_pixel_frames=4, size=(HEIGHT, WIDTH))
    decoder = Decoder(torch.float32, "cpu", 4, 1)
    decoder.decode([cut(probe_file(good, clip), clip, 0, 0)])
    assert decoder.decoded == {"native": 1, "frames": 0}
    for path in files.values():
        decoder.decode([cut(probe_file(path, clip), clip, 0, 0)])
    assert decoder.decoded == {"native": 1, "frames": 3}


@pytest.mark.parametrize("rotation", [90, -90, 180, 0])
def test_a_turned_file_is_shown_upright(tmp_path, rotation):
    path = write(tmp_path / "a.mp4", rotation=rotation)
    reference = np.rot90(by_pyav(path), rotation // 90, axes=(1, 2))
    file = probe_file(path, ClipSpec(num_pixel_frames=1, size=(8, 8)))
    assert (file.height, file.width) == reference.shape[1:3]
    assert psnr(decoded(path, FRAMES, *reference.shape[1:3]), reference) >= 40


def test_a_mirrored_turn_is_shown_as_the_display_matrix_says():
    from megatron_kvpo.data.decode import turned

    image = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    assert turned(image, (True, False, False))[..., 0].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert turned(image, (True, True, False))[..., 0].tolist() == [[2, 5], [1, 4], [0, 3]]
    assert turned(image, (False, True, True))[..., 0].tolist() == [[5, 4, 3], [2, 1, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("encoder", "suffix"), [("libvpx-vp9", "webm"), ("mjpeg", "avi"), ("ffv1", "mkv")]
)
@pytest.mark.parametrize(("height", "width"), [(97, 129), (95, 126), (31, 33)])
def test_odd_sizes_are_whole(tmp_path, encoder, suffix, height, width, backend):
    pixels = [picture(n, height, width) for n in range(4)]
    pix_fmt = "yuvj420p" if encoder == "mjpeg" else "yuv420p"
    path = write(tmp_path / f"a.{suffix}", encoder, pixels=pixels, pix_fmt=pix_fmt)
    video = decoded(path, 4, height, width, backend)
    assert psnr(video, by_pyav(path)) >= 40
    assert psnr(video, np.stack(pixels)) >= 33


@pytest.mark.parametrize(("encoder", "suffix"), [("libvpx-vp9", "webm"), ("libx264", "mp4")])
def test_a_clip_covers_its_size_and_is_cut_in_the_middle(tmp_path, encoder, suffix):
    flat = np.zeros((96, 192, 3), np.uint8)
    flat[:, :48], flat[:, 48:144], flat[:, 144:] = (200, 30, 30), (30, 200, 30), (30, 30, 200)
    path = write(tmp_path / f"a.{suffix}", encoder, pixels=[flat] * 4)
    square = decoded(path, 4, 48, 48)
    assert np.abs(square[:, 4:-4, 4:-4].astype(int) - flat[0, 100]).max() < 25, "green alone"
    wide = decoded(path, 4, 32, 96)  # 3:1 cuts 16 rows above and below
    assert psnr(wide[0], wide[0, 16:17]) > 40
    colours = np.array([(200, 30, 30), (30, 200, 30), (30, 30, 200)])
    assert psnr(wide[0, 0, [4, 40, 90]], colours) > 25


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one CUDA device")
def test_nvdec_decodes_what_it_is_said_to_and_batches_stay_as_they_are(tmp_path):
    for number, (encoder, suffix) in enumerate(
        [("libx264", "mp4"), ("libx265", "mp4"), ("libvpx-vp9", "webm")]
    ):
        big = [picture(n, 288, 352) for n in range(20)]
        write(tmp_path / f"{number}.{suffix}", encoder, pixels=big)
    clip = ClipSpec(num_pixel_frames=9, size=(288, 352))
    pipeline = VideoPipeline(tmp_path, clip, batch_size=3, shuffle=False, backend="gpu")
    (first,) = pipeline.epoch()
    copy = first.video_BCFHW.clone()
    (second,) = pipeline.epoch()
    assert pipeline.decoder.decoded == {"native": 6, "frames": 0}
    assert first.video_BCFHW.is_cuda
    torch.testing.assert_close(first.video_BCFHW, copy, rtol=0, atol=0)
    torch.testing.assert_close(second.video_BCFHW, copy, rtol=0, atol=0)
    assert {"h264", "hevc", "vp9"} <= NATIVE_CODECS["gpu"]
