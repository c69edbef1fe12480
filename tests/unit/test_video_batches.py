"""The endless stream and its order: layouts of ranks, resuming, buckets, captions, the thread."""

import itertools
import threading

import pytest
import torch

from megatron_kvpo.data.shapes import write_dataset
from megatron_kvpo.data.video import ClipSpec, VideoPipeline, VideoSource, load_videos
from tests.unit.video_files import manifest, number_of, picture, write

pytest.importorskip("nvidia.dali")

SIZES = [(96, 128), (96, 128), (128, 96), (96, 96), (96, 128), (128, 96), (64, 64)]
BUCKETS = ((48, 64), (64, 48), (48, 48))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven files of three proportions and two codecs, each with two texts."""
    root = tmp_path_factory.mktemp("mixed")
    rows = []
    for number, (height, width) in enumerate(SIZES):
        suffix, codec = ("webm", "libvpx-vp9") if number % 2 else ("mp4", "libx264")
        pixels = [picture(n, height, width) for n in range(20)]
        write(root / f"{number}.{suffix}", codec, pixels=pixels)
        rows.append({"file": f"{number}.{suffix}", "segments": [f"{number} a", f"{number} b"],
                     "switch_s": [0.4]})  # fmt: skip
    return manifest(root, rows)


def spec(**values) -> ClipSpec:
    return ClipSpec(**{"num_pixel_frames": 8, "buckets": BUCKETS, "start": "random",
                       "dtype": torch.uint8, **values})  # fmt: skip


def take(pipeline: VideoPipeline, count: int, step: int = 0):
    stream = pipeline.batches(step)
    found = list(itertools.islice(stream, count))
    stream.close()
    return found


def rows(batch):
    """What each row is, to the pixel."""
    return [
        (int(index), float(start), texts, int(video.long().sum()))
        for index, start, texts, video in zip(
            batch.index_B, batch.start_s_B, batch.segments, batch.video_BCFHW, strict=True
        )
    ]


def test_a_step_is_the_same_for_every_number_of_ranks_and_from_any_place(folder):
    one = take(VideoPipeline(folder, spec(), batch_size=4, seed=3), 9)
    flat = [rows(batch) for batch in one]
    for world_size in (2, 4):
        shares = [
            take(VideoPipeline(folder, spec(), batch_size=4 // world_size, seed=3, rank=rank,
                               world_size=world_size), 9)
            for rank in range(world_size)
        ]  # fmt: skip
        joined = [
            [row for batch in step for row in rows(batch)] for step in zip(*shares, strict=True)
        ]
        assert joined == flat
    resumed = take(VideoPipeline(folder, spec(), batch_size=4, seed=3), 4, step=5)
    assert [rows(batch) for batch in resumed] == flat[5:]
    other = take(VideoPipeline(folder, spec(), batch_size=4, seed=4), 9)
    assert [rows(batch) for batch in other] != flat


def test_a_batch_holds_one_bucket_and_every_file_comes(folder):
    found = take(VideoPipeline(folder, spec(), batch_size=2, seed=0), 14)
    expected = {0: (48, 64), 1: (48, 64), 2: (64, 48), 3: (48, 48), 4: (48, 64), 5: (64, 48),
                6: (48, 48)}  # fmt: skip
    counts = dict.fromkeys(range(7), 0)
    for batch in found:
        sizes = {expected[index] for index in batch.index_B.tolist()}
        assert sizes == {tuple(batch.video_BCFHW.shape[-2:])}
        for index in batch.index_B.tolist():
            counts[index] += 1
    assert set(counts.values()) == {4}, "28 rows of 7 files"


def test_clips_move_from_epoch_to_epoch_and_show_what_they_say(folder):
    clip = spec(buckets=(), size=(96, 128), num_pixel_frames=4)
    found = take(VideoPipeline(folder, clip, batch_size=7, seed=1, shuffle=False), 6)
    starts = [batch.start_s_B[0].item() for batch in found]
    assert len(set(starts)) > 2
    for batch, start in zip(found, starts, strict=True):
        first = round(start * 25)
        video = batch.video_BCFHW[0].permute(1, 2, 3, 0).numpy()
        assert [number_of(image) for image in video] == list(range(first, first + 4))
        texts = batch.segments[0]
        switch = 10 - first
        wanted = {(0, "0 a")} if switch >= 4 else {(0, "0 a"), (switch, "0 b")}
        assert set(texts) == (wanted if switch > 0 else {(0, "0 b")})


def test_a_saved_epoch_continues_within_buckets(folder):
    def steps(pipeline):
        return [rows(batch) for batch in pipeline.epoch()]

    one = VideoPipeline(folder, spec(), batch_size=2, seed=1)
    reference = steps(one) + steps(one)
    assert sorted(row[0] for step in reference[: len(reference) // 2] for row in step) == list(
        range(7)
    )
    two = VideoPipeline(folder, spec(), batch_size=2, seed=1)
    stream = two.epoch()
    seen = [rows(next(stream)) for _ in range(2)]
    three = VideoPipeline(folder, spec(), batch_size=2, seed=1)
    three.load_state_dict(two.state_dict())
    assert seen + steps(three) + steps(three) == reference
    ranks = []
    for rank in (0, 1):
        half = VideoPipeline(folder, spec(), batch_size=1, seed=1, rank=rank, world_size=2)
        half.load_state_dict(two.state_dict())
        ranks.append(steps(half))
    pairs = [step for step in reference[2 : len(reference) // 2] if len(step) == 2]
    assert [a + b for a, b in zip(*ranks, strict=True)] == pairs


def test_another_global_batch_within_buckets_is_refused(folder):
    two = VideoPipeline(folder, spec(), batch_size=2, seed=1)
    next(two.epoch())
    other = VideoPipeline(folder, spec(), batch_size=7, seed=1)
    with pytest.raises(ValueError, match="batches of 2 over all ranks, now they hold 7"):
        other.load_state_dict(two.state_dict())


def test_the_shapes_world_brings_its_texts_along(tmp_path):
    write_dataset(tmp_path / "shapes", 12, seed=0, num_latent_frames=12)
    clip = ClipSpec(num_pixel_frames=45, size=(32, 32), dtype=torch.uint8)
    pipeline = VideoPipeline(tmp_path / "shapes", clip, batch_size=12, shuffle=False)
    (batch,) = pipeline.epoch()
    from megatron_kvpo.data.shapes import draw_scene

    switched = 0
    for index, texts in enumerate(batch.segments):
        scene, switches = draw_scene(0, index, 12)
        starts = [0, *(4 * s - 3 for s in switches)]
        assert texts == tuple(zip(starts, scene.captions, strict=True))
        switched += bool(switches)
    assert switched > 2


def test_decoding_goes_ahead_and_the_thread_ends_with_the_stream(folder):
    pipeline = VideoPipeline(folder, spec(), batch_size=2)
    before = {thread.name for thread in threading.enumerate()}
    stream = pipeline.batches()
    next(stream)
    names = {thread.name for thread in threading.enumerate()} - before
    assert any(name.startswith("videos-ahead") for name in names)
    stream.close()
    left = {thread.name for thread in threading.enumerate()} - before
    assert not any(name.startswith("videos-ahead") for name in left)


def test_an_error_of_the_thread_is_raised_where_the_batch_is_asked_for(folder, monkeypatch):
    pipeline = VideoPipeline(folder, spec(), batch_size=2)
    decode, calls = pipeline.decoder.decode, []

    def failing(clips):
        calls.append(clips)
        if len(calls) == 3:
            raise KeyError("third")
        return decode(clips)

    monkeypatch.setattr(pipeline.decoder, "decode", failing)
    stream = pipeline.batches()
    next(stream), next(stream)
    with pytest.raises(KeyError, match="third"):
        next(stream)


def test_out_of_range_arguments_are_refused(folder):
    with pytest.raises(ValueError, match="step -1 must be at least 0"):
        VideoPipeline(folder, spec(), batch_size=2).batches(-1)
    with pytest.raises(ValueError, match="one tensor has one size, not 3 buckets"):
        load_videos(VideoPipeline(folder, spec(), batch_size=2))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            VideoPipeline(VideoSource(path=folder), spec(), batch_size=2, backend="gpu")
