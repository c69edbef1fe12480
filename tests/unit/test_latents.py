"""Batches of latents, from a cache or from videos: the same ones, in an order of their own."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("nvidia.dali")

from megatron_kvpo.config import CodecConfig
from megatron_kvpo.data.encoded_videos import EncodedVideos
from megatron_kvpo.data.encoding import EncodingSpec, segments_of
from megatron_kvpo.data.latents import ClipOrder, LatentCache
from megatron_kvpo.data.shapes import write_dataset
from megatron_kvpo.data.sources import VideoSource
from megatron_kvpo.data.video import ClipSpec, decode_file, read_ahead
from megatron_kvpo.model.codec import load_codec
from megatron_kvpo.model.text_encoder import WordEncoder
from megatron_kvpo.records import LatentBatch
from tools import cache_latents

NUM_CLIPS = 7
RECIPE = """
model: {latent_channels: 4, latent_height: 8, latent_width: 8, text_dim: 16, text_length: 24}
codec: {width: 8}
stream: {num_frames: 21}
fitting: {steps: 3}
"""
"""As a recipe of pre-training, whose other sections are not of a run."""


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Seven files; the last is too short for 21 latent frames, one that the manifest names is no
    video."""
    folder = tmp_path_factory.mktemp("videos")
    write_dataset(folder / "long", NUM_CLIPS - 1, 3, size=32)
    write_dataset(folder / "short", 1, 4, num_latent_frames=12, size=32)
    shutil.copy(folder / "short" / "00000.mp4", folder / "long" / "short.mp4")
    (folder / "long" / "broken.mp4").write_bytes(b"no video")
    manifest = folder / "long" / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    short = json.loads((folder / "short" / "manifest.jsonl").read_text())
    lines[3:3] = [{"file": "broken.mp4", "segments": ["a red square"]}]
    lines.append({**short, "file": "short.mp4"})
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "long"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "pretrain.yaml"
    path.write_text(RECIPE)
    return path


def make(recipe: Path, videos: Path, output: Path, *more: str) -> Path:
    arguments = [str(recipe), "--videos", str(videos), "--output", str(output), "--device", "cpu"]
    more = ("--shard-clips", "3", "--max-bad", "0.2", *more)
    assert cache_latents.main([*arguments, *more]) == 0
    return output


@pytest.fixture(scope="module")
def cache(recipe, videos, tmp_path_factory) -> Path:
    return make(recipe, videos, tmp_path_factory.mktemp("cache") / "latents", "--frames", "21,9")


def direct(videos: Path, cache: LatentCache, **more: object) -> EncodedVideos:
    """The same data set without the cache."""
    codec = load_codec(CodecConfig(width=8), 4).eval()
    spec = EncodingSpec.of(codec, WordEncoder(16, 24), sizes=((32, 32),), num_frames=(21, 9),
                           dtype=cache.spec.dtype)  # fmt: skip
    assert spec == cache.spec
    source = VideoSource(path=videos, max_bad=0.2)
    return EncodedVideos(source, spec, codec, WordEncoder(16, 24), **more)  # type: ignore[arg-type]


def some(stream: LatentCache | EncodedVideos, count: int, step: int = 0) -> list[LatentBatch]:
    return list(itertools.islice(stream.batches(step), count))


def assert_same(ours: list[LatentBatch], theirs: list[LatentBatch]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        for field in dataclasses.fields(LatentBatch):
            assert torch.equal(getattr(a, field.name), getattr(b, field.name)), field.name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_and_the_videos_themselves_give_the_same_batches(recipe, videos, tmp_path, dtype):
    folder = make(recipe, videos, tmp_path / "latents", "--frames", "21,9", "--dtype", dtype)
    cache = LatentCache(folder, batch_size=2, seed=5)
    plain = direct(videos, cache, batch_size=2, seed=5)
    assert_same(some(cache, 9), some(plain, 9))
    assert_same(some(cache, 3, step=6), some(cache, 9)[6:])
    assert_same(some(plain, 2, step=4), some(cache, 6)[4:])
    assert cache.fingerprint() == plain.fingerprint()
    assert len(cache) == len(plain) == NUM_CLIPS
    assert {batch.latent_BFCHW.dtype for batch in some(cache, 9)} == {torch.float32}


def test_a_batch_holds_latents_of_one_shape_and_what_they_are_told_in(cache, videos):
    stream = LatentCache(cache, batch_size=2, seed=1)
    codec = load_codec(CodecConfig(width=8), 4).eval()
    lines = [json.loads(x) for x in (videos / "manifest.jsonl").read_text().splitlines()]
    shapes = set()
    for batch in some(stream, 8):
        rows, frames = batch.latent_BFCHW.shape[:2]
        shapes.add(frames)
        assert rows == len(batch.index_B) == 2
        assert batch.segment_S3.dtype == batch.index_B.dtype == torch.int64
        assert batch.segment_S3[:, 0].tolist() == sorted(batch.segment_S3[:, 0].tolist())
        texts = []
        for row, index in enumerate(batch.index_B.tolist()):
            line = lines[index]
            spec = ClipSpec(num_pixel_frames=4 * frames - 3, size=(32, 32))
            video = decode_file(videos / line["file"], spec)
            with torch.no_grad():
                assert torch.equal(batch.latent_BFCHW[row], codec.encode(video[None])[0])
            starts = [s for s in (0, *line["switch_frames"]) if s < frames]
            own = batch.segment_S3[batch.segment_S3[:, 0] == row]
            assert own[:, 1].tolist() == starts
            assert own[:, 2].tolist() == [*starts[1:], frames]
            texts += line["segments"][: len(starts)]
        assert torch.equal(batch.text_SXD, WordEncoder(16, 24).encode(texts))
    assert shapes == {21, 9}


def test_ranks_share_each_global_batch_in_order(cache):
    whole = some(LatentCache(cache, batch_size=4, seed=2), 6)
    parts = [
        some(LatentCache(cache, batch_size=4, seed=2, rank=r, world_size=2), 6) for r in (0, 1)
    ]
    for one, first, second in zip(whole, *parts, strict=True):
        assert one.index_B.tolist() == [*first.index_B.tolist(), *second.index_B.tolist()]
        assert torch.equal(one.latent_BFCHW, torch.cat([first.latent_BFCHW, second.latent_BFCHW]))
    with pytest.raises(ValueError, match=r"batch of 4 cannot be shared by 3 data ranks"):
        LatentCache(cache, batch_size=4, world_size=3)


def test_an_epoch_takes_each_clip_once_whatever_the_batch():
    clips = list(range(100, 110))
    for size in (1, 3, 10, 25):
        order = ClipOrder({"a": clips}, batch_size=size, seed=1)
        taken = [clip for step in range(60) for clip in order.clips_of(step)]
        epochs = [taken[i : i + 10] for i in range(0, len(taken) - 9, 10)]
        assert all(sorted(epoch) == clips for epoch in epochs)
        assert epochs[0] != epochs[1]
        again = ClipOrder({"a": clips}, batch_size=size, seed=1)
        backwards = {step: again.clips_of(step) for step in reversed(range(60))}
        assert [clip for step in range(60) for clip in backwards[step]] == taken
        other = ClipOrder({"a": clips}, batch_size=size, seed=2)
        assert taken != [clip for step in range(60) for clip in other.clips_of(step)]


def test_buckets_take_turns_by_their_sizes_and_never_meet():
    buckets = {(21,): range(40), (9,): range(100, 108), (5,): range(200, 201)}
    order = ClipOrder(buckets, batch_size=4, seed=3)
    batches = [order.clips_of(step) for step in range(49 * 4)]
    kinds = [{clip // 100 for clip in batch} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds)
    counts = [sum(kind == {k} for kind in kinds) for k in range(3)]
    assert counts == [160, 32, 4]
    first = [clip for batch in batches for clip in batch if clip < 100][:40]
    assert sorted(first) == list(range(40))


def test_what_is_damaged_is_refused_by_name_with_the_remedy(cache, tmp_path):
    def copy(name: str) -> Path:
        return Path(shutil.copytree(cache, tmp_path / name))

    remedy = r"run tools.cache_latents once more with the same arguments"
    gone = copy("gone")
    (gone / "shard_00001.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"shard_00001.safetensors is missing: .*{remedy}"):
        LatentCache(gone)
    short = copy("short")
    data = (short / "shard_00000.safetensors").read_bytes()
    (short / "shard_00000.safetensors").write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"shard_00000.safetensors has \d+ bytes instead of \d+"):
        LatentCache(short)
    flipped = copy("flipped")
    data = bytearray((flipped / "shard_00002.safetensors").read_bytes())
    data[-50] ^= 1
    (flipped / "shard_00002.safetensors").write_bytes(data)
    opened = LatentCache(flipped, batch_size=3)
    with pytest.raises(ValueError, match=rf"shard_00002.safetensors is damaged: .*{remedy}"):
        some(opened, 9)
    head = copy("head")
    data = bytearray((head / "shard_00000.safetensors").read_bytes())
    data[9] = 0
    (head / "shard_00000.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"shard_00000.safetensors is damaged \(.*\): delete it"):
        some(LatentCache(head, batch_size=3), 9)
    begun = copy("begun")
    (begun / "manifest.jsonl").unlink()
    with pytest.raises(ValueError, match=rf"begun and is not finished: {remedy}"):
        LatentCache(begun)
    with pytest.raises(ValueError, match=r"no latents at .*: python -m tools.cache_latents"):
        LatentCache(tmp_path / "nowhere")
    (begun / "manifest.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"is no manifest of latents"):
        LatentCache(begun)


def test_a_clip_is_had_by_its_number(cache):
    stream = LatentCache(cache)
    assert 2 in stream
    assert 3 not in stream
    assert stream.latent(2).shape == (21, 4, 8, 8)
    with pytest.raises(ValueError, match=r"has no clip 3: it holds 7 of 0 to 7; rejected.jsonl"):
        stream.latent(3)


def test_another_text_file_or_setting_is_another_data_set(cache, videos, tmp_path):
    opened = LatentCache(cache)
    names = {opened.fingerprint()}
    copied = Path(shutil.copytree(cache, tmp_path / "copy"))
    lines = (copied / "manifest.jsonl").read_text()
    for old, new in (('"text": "', '"text": "x'), ('"num_bytes": ', '"num_bytes": 1'),
                     ('"fps": null', '"fps": 16.0')):  # fmt: skip
        (copied / "manifest.jsonl").write_text(lines.replace(old, new, 1))
        names.add(LatentCache(copied).fingerprint())
    assert len(names) == 4
    (copied / "manifest.jsonl").write_text(lines)
    assert LatentCache(copied).fingerprint() == opened.fingerprint()


def test_texts_hold_from_the_latent_frame_that_shows_their_first_pixel_frame():
    shown = ((0, "a"), (9, "b"), (33, "c"))
    assert segments_of(shown, "a", 21, 4) == [(0, 3, "a"), (3, 9, "b"), (9, 21, "c")]
    assert segments_of(shown, "a", 9, 4) == [(0, 3, "a"), (3, 9, "b")]
    assert segments_of(((0, "a"), (6, "b"), (8, "c")), "a", 5, 4) == [(0, 2, "a"), (2, 5, "c")]
    assert segments_of(((0, ""), (6, "b"), (9, "c")), "b", 5, 4) == [(0, 3, "b"), (3, 5, "c")]
    assert segments_of((), "a", 5, 4) == [(0, 5, "a")]
    assert segments_of(((0, ""), (18, "b")), "b", 5, 4) == [(0, 5, "b")]


def test_what_a_thread_reads_comes_in_order_and_so_do_its_errors():
    device = torch.device("cpu")

    def read(step: int) -> int:
        if step == 7:
            raise ValueError("step 7 cannot be read")
        return step * step

    found = read_ahead(read, 4, 2, device)
    assert [next(found) for _ in range(3)] == [16, 25, 36]
    with pytest.raises(ValueError, match="step 7"):
        next(found)
    with pytest.raises(ValueError, match="step -1 must be 0 or more"):
        read_ahead(read, -1, 2, device)


def test_a_spec_that_cannot_be_is_refused():
    for wrong, said in (
        ({"num_frames": (9, 21)}, "must be above 0 and fall"),
        ({"starts": (0, 0)}, "different pixel frames"),
        ({"dtype": "int8"}, "cannot be had"),
        ({"fps": 0.0}, "must be above 0"),
        ({"sizes": ()}, "either a size or buckets"),
        ({"every": 0}, "at least 1, and one start"),
        ({"every": 8, "starts": (0, 4)}, "at least 1, and one start"),
    ):
        fields = {"codec": "", "text": "", "text_dim": 1, "text_length": 1, "sizes": ((8, 8),),
                  "num_frames": (21,), **wrong}  # fmt: skip
        with pytest.raises(ValueError, match=said):
            EncodingSpec(**fields)  # type: ignore[arg-type]
