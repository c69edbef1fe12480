"""Datasets and prompt files of the shapes world on disk."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest

from megatron_kvpo.data import shapes
from megatron_kvpo.data.shapes import (
    MIN_SEGMENT_FRAMES,
    Codec,
    draw_scene,
    prompt_text,
    write_dataset,
    write_prompts,
)
from megatron_kvpo.records import Prompt
from megatron_kvpo.world import parse_captions, render


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


@pytest.mark.parametrize("codec", ["vp9", "h264"])
def test_a_dataset_holds_what_its_manifest_says(tmp_path: Path, codec: Codec) -> None:
    manifest = write_dataset(tmp_path / "videos", 5, seed=3, codec=codec)
    assert manifest == tmp_path / "videos" / "manifest.jsonl"
    rows = lines(manifest)
    assert len(rows) == 5
    for index, row in enumerate(rows):
        scene, switches = draw_scene(3, index)
        assert row["segments"] == scene.captions
        assert row["switch_frames"] == list(switches)
        assert (row["fps"], row["num_pixel_frames"]) == (16, 81)
        video = decode(manifest.parent / str(row["file"]))
        assert video.shape == (81, 32, 32, 3)
        assert psnr(video, render(scene)) > 35
    assert sorted(p.name for p in tmp_path.iterdir()) == ["videos"]


def test_dali_decodes_vp9_on_the_cpu(tmp_path: Path) -> None:
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import pipeline_def, types

    manifest = write_dataset(tmp_path / "videos", 1, seed=1)
    data = np.fromfile(manifest.parent / "00000.mp4", dtype=np.uint8)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)  # type: ignore[untyped-decorator]
    def pipeline() -> object:
        encoded = fn.external_source(source=lambda: [data], batch=True, dtype=types.UINT8)
        return fn.decoders.video(encoded, device="cpu", sequence_length=81, pad_mode="none")

    video = np.asarray(pipeline().run()[0].at(0))
    assert video.shape == (81, 32, 32, 3)
    assert psnr(video, render(draw_scene(1, 0)[0])) > 35


def test_workers_write_the_same_dataset(tmp_path: Path) -> None:
    one = write_dataset(tmp_path / "one", 40, seed=2, num_latent_frames=6)
    two = write_dataset(tmp_path / "two", 40, seed=2, num_latent_frames=6, workers=2)
    assert one.read_text() == two.read_text()
    for row in lines(one)[::8]:
        name = str(row["file"])
        np.testing.assert_array_equal(decode(one.parent / name), decode(two.parent / name))


def test_a_dataset_that_fails_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    original = shapes.write_video

    def failing(path: Path, frames: np.ndarray, *, codec: Codec) -> None:
        if len(written) == 2:
            raise OSError("disk full")
        written.append(path)
        original(path, frames, codec=codec)

    monkeypatch.setattr(shapes, "write_video", failing)
    with pytest.raises(OSError, match="disk full"):
        write_dataset(tmp_path / "videos", 4, seed=3, num_latent_frames=6)
    assert len(written) == 2
    assert not list(tmp_path.iterdir())


def test_a_dataset_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        write_dataset(tmp_path / "videos", 1, seed=0)


@pytest.mark.parametrize("changes", [{"count": 0}, {"workers": 0}, {"codec": "av2"}])
def test_bad_arguments_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    arguments = {"count": 1, "seed": 0} | changes
    with pytest.raises(ValueError, match=next(iter(changes))):
        write_dataset(tmp_path / "videos", **arguments)  # type: ignore[arg-type]


def test_a_video_too_short_for_a_segment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_latent_frames 3"):
        write_prompts(tmp_path / "p.jsonl", 1, seed=0, num_latent_frames=3)


@pytest.mark.parametrize(("num_latent", "most"), [(6, 1), (21, 3), (24, 4), (48, 4)])
def test_prompts_have_legal_segments(tmp_path: Path, num_latent: int, most: int) -> None:
    write_prompts(tmp_path / "p.jsonl", 200, seed=1, num_latent_frames=num_latent)
    counts = set()
    for row in lines(tmp_path / "p.jsonl"):
        prompt = Prompt(segments=tuple(row["segments"]), switch_frames=tuple(row["switch_frames"]))
        counts.add(len(prompt.segments))
        assert all(frame % 3 == 0 for frame in prompt.switch_frames)
        assert all(b - a >= MIN_SEGMENT_FRAMES for a, b in prompt.spans(num_latent))
        parse_captions(prompt.segments)
    assert counts == set(range(1, most + 1))


def test_prompts_are_distinct_and_a_function_of_the_seed(tmp_path: Path) -> None:
    first = write_prompts(tmp_path / "a.jsonl", 300, seed=1)
    again = write_prompts(tmp_path / "b.jsonl", 300, seed=1)
    other = write_prompts(tmp_path / "c.jsonl", 300, seed=2)
    assert first == again
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert len(set(first)) == 300
    assert first != other
    assert first == [prompt_text(row["segments"]) for row in lines(tmp_path / "a.jsonl")]


def test_held_out_prompts_are_none_of_the_excluded_ones(tmp_path: Path) -> None:
    train = write_prompts(tmp_path / "train.jsonl", 1000, seed=1)
    plain = write_prompts(tmp_path / "plain.jsonl", 200, seed=2)
    assert set(plain) & set(train)  # so that there is something to exclude
    held_out = write_prompts(tmp_path / "held.jsonl", 200, seed=2, exclude=set(train))
    assert not set(held_out) & set(train)
    assert len(held_out) == 200


def test_seeds_never_share_a_scene() -> None:
    scenes = [draw_scene(seed, index, 6)[0] for seed in range(8) for index in range(8)]
    assert len(set(scenes)) == len(scenes)


def test_prompts_can_be_asked_for_that_switch(tmp_path: Path) -> None:
    write_prompts(tmp_path / "switching.jsonl", 40, seed=3, min_segments=2)
    switching = lines(tmp_path / "switching.jsonl")
    assert {len(row["segments"]) for row in switching} == {2, 3}
    assert all(len(row["switch_frames"]) == len(row["segments"]) - 1 for row in switching)
    write_prompts(tmp_path / "any.jsonl", 80, seed=3)
    expected = [row for row in lines(tmp_path / "any.jsonl") if len(row["segments"]) > 1]
    assert switching[: len(expected)] == expected[:40]
