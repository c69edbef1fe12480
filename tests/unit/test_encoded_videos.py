"""Latents of any source of videos: where clips begin, their rate and size, and what is skipped."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("nvidia.dali")

from megatron_kvpo.config import CodecConfig
from megatron_kvpo.data.clips import ClipSpec, cut
from megatron_kvpo.data.embeddings import add_texts
from megatron_kvpo.data.encoded_videos import DrawnClips, EncodedVideos
from megatron_kvpo.data.encoding import EncodingSpec
from megatron_kvpo.data.graph import Decoder
from megatron_kvpo.data.latents import LatentCache
from megatron_kvpo.data.probe import probe_source
from megatron_kvpo.data.sources import VideoSource
from megatron_kvpo.data.workers import Workers
from megatron_kvpo.model.codec import load_codec
from megatron_kvpo.model.text_encoder import WordEncoder
from megatron_kvpo.training.latent_streams import open_videos
from megatron_kvpo.training.parts import codec_on
from tests.unit import small
from tests.unit.test_cache_latents import Words
from tests.unit.test_latents import RECIPE, assert_same, some
from tests.unit.test_wan_vae import tiny
from tests.unit.tiny_pretrain import recipe as recipe_of
from tests.unit.video_files import picture, shard, write
from tools import cache_latents

ranks = small.ranks
BUCKETS = ((24, 32), (32, 24), (24, 24))
SIZES = [(48, 64), (64, 48), (48, 64), (48, 48), (64, 48), (48, 64)]
FRAMES = [40, 40, 33, 40, 40, 12]
TEXTS = ["a red square moves right", "it turns blue"]


def irregular(number: int) -> list[int]:
    """Timestamps of 40 pixel frames in 1/1000 s: fast, then slow."""
    return [20 * n if n < 20 else 400 + (60 + number) * (n - 20) for n in range(40)]


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Two shards of videos of three proportions, also of a varying rate; one has no caption."""
    folder, made = tmp_path_factory.mktemp("shards"), tmp_path_factory.mktemp("files")
    members: list[dict[str, bytes]] = [{}, {}]
    for number, (size, count) in enumerate(zip(SIZES, FRAMES, strict=True)):
        timed = (
            {"times": irregular(number), "time_base": Fraction(1, 1000)} if number in (1, 3) else {}
        )
        codec, suffix = ("libx264", "mp4") if number % 2 else ("libvpx-vp9", "webm")
        file = write(
            made / f"{number}.{suffix}",
            codec,
            rate=24,
            **timed,
            pixels=[picture(n + number, *size) for n in range(count)][: len(irregular(0))],
        )
        texts = {"segments": TEXTS, "switch_s": [0.5]}
        some_members = members[number % 2]
        some_members[f"{number}.{suffix}"] = file.read_bytes()
        some_members[f"{number}.json"] = json.dumps(texts).encode()
    members[1]["9.mp4"] = (made / "1.mp4").read_bytes()
    for number, some_members in enumerate(members):
        shard(folder / f"s-{number:04d}.tar", some_members)
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def spec_of(**settings) -> EncodingSpec:
    codec = load_codec(CodecConfig(width=8), 4)
    values = {"sizes": BUCKETS, "num_frames": (4, 2), "fps": 12.0, **settings}
    return EncodingSpec.of(codec, WordEncoder(16, 24), **values)


def source_of(videos: Path, **settings) -> VideoSource:
    return VideoSource(**{"path": videos, "max_bad": 0.3, **settings})


def opened(kind, videos: Path, spec: EncodingSpec, **settings):
    codec = load_codec(CodecConfig(width=8), 4).requires_grad_(False).eval()
    return kind(source_of(videos), spec, codec, WordEncoder(16, 24), **settings)


def cached(recipe: Path, videos: Path, output: Path, *more: str) -> LatentCache:
    arguments = [str(recipe), "--videos", str(videos), "--output", str(output), "--device", "cpu",
                 "--buckets", "24x32,32x24,24x24", "--frames", "4,2", "--fps", "12",
                 "--max-bad", "0.3", *more]  # fmt: skip
    assert cache_latents.main(arguments) == 0
    return LatentCache(output, batch_size=2, seed=3)


def test_shards_buckets_rates_and_lengths_give_the_same_batches_with_and_without_a_cache(
    recipe, videos, tmp_path
):
    cache = cached(recipe, videos, tmp_path / "one", "--every", "5", "--shard-clips", "4")
    again = cached(recipe, videos, tmp_path / "two", "--every", "5", "--shard-clips", "4",
                   "--threads", "5")  # fmt: skip
    files = [sorted((tmp_path / name).iterdir()) for name in ("one", "two")]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    assert again.fingerprint() == cache.fingerprint()
    plain = opened(EncodedVideos, videos, spec_of(every=5), batch_size=2, seed=3)
    assert plain.spec == cache.spec
    assert plain.fingerprint() == cache.fingerprint()
    assert len(plain) == len(cache)
    batches = some(cache, 12)
    assert_same(some(plain, 12), batches)
    assert_same(some(plain, 3, step=7), batches[7:10])
    shapes = {tuple(batch.latent_BFCHW.shape[1:]) for batch in batches}
    assert shapes >= {(4, 4, 6, 8), (4, 4, 8, 6), (4, 4, 6, 6), (2, 4, 6, 8)}


def test_each_latent_is_that_of_the_pixel_frames_shown_at_its_times(recipe, videos, tmp_path):
    """Against the clips of a whole file, decoded once, that stand at the times by hand."""
    cache = cached(recipe, videos, tmp_path / "latents", "--every", "5")
    codec = load_codec(CodecConfig(width=8), 4).eval()
    plain = ClipSpec(num_pixel_frames=1, size=(8, 8))
    files = {f.name: f for f in probe_source(source_of(videos), plain.fault).good}
    lines = [line for line in cache.manifest.lines if line.file.endswith("1.mp4")]
    file = files[lines[0].file]
    assert [line.start for line in lines] == list(range(0, 5 * len(lines), 5))
    end_s = (400 + 61 * 20) / 1000
    assert len(lines) == 1 + int((end_s - 0.002) * 12 - 4) // 5
    decoder = Decoder(torch.float32, "cpu", 1, 1)
    times_s = [t / 1000 for t in irregular(1)]
    whole_spec = ClipSpec(num_pixel_frames=40, buckets=BUCKETS)
    whole = decoder.decode([cut(file, whole_spec, 0, 0)])[0][0].clone()
    for line in lines:
        frames = line.shape[0]
        shown = [
            max(n for n, t in enumerate(times_s) if t <= (line.start + k) / 12 + 1e-3)
            for k in range(4 * frames - 3)
        ]
        with torch.no_grad():
            by_hand = codec.encode(whole[None, :, shown])[0]
        assert torch.equal(cache.latent(line.clip), by_hand), line.start
        switch = max(0, -(-(6 - line.start) // 4))  # 0.5 s at 12 a second
        texts = [(part.start, part.stop, part.text) for part in line.segments]
        if switch == 0 or switch >= frames:
            assert texts == [(0, frames, TEXTS[1 if switch == 0 else 0])]
        else:
            assert texts == [(0, switch, TEXTS[0]), (switch, frames, TEXTS[1])]


def test_what_is_short_or_told_in_nothing_is_reported_and_probed_once(recipe, videos, tmp_path):
    (videos / ".probe.jsonl").unlink(missing_ok=True)
    probes = tmp_path / "probes"
    with mock.patch.object(Workers, "probe", autospec=True, side_effect=Workers.probe) as probe:
        cache = cached(recipe, videos, tmp_path / "one", "--starts", "0,12", "--probes",
                       str(probes))  # fmt: skip
        assert probe.call_count == 7
        cached(recipe, videos, tmp_path / "two", "--starts", "0,12", "--probes", str(probes))
        assert probe.call_count == 7
    assert not (videos / ".probe.jsonl").exists()
    skipped = [json.loads(x) for x in (probes / "skipped.jsonl").read_text().splitlines()]
    assert skipped == [{"file": "s-0001.tar/9.mp4", "reason": "no caption is given"}]
    rejected = [json.loads(x) for x in
                (tmp_path / "one" / "rejected.jsonl").read_text().splitlines()]  # fmt: skip
    names = [row["file"] for row in rejected]
    assert names.count("s-0001.tar/9.mp4") == 2  # both of its clips
    assert len(cache) == 2 * 7 - len(rejected)
    assert all("too short" in row["reason"] for row in rejected if "9.mp4" not in row["file"])
    taken = {(line.file, line.start) for line in cache.manifest.lines}
    assert ("s-0001.tar/5.mp4", 0) in taken


def test_clips_that_are_drawn_are_a_function_of_seed_step_and_global_batch(videos):
    spec = spec_of(num_frames=(3,))
    one = opened(DrawnClips, videos, spec, start="random", batch_size=2, seed=5)
    whole = some(one, 9)
    assert_same(some(one, 2, step=5), whole[5:7])
    parts = [some(opened(DrawnClips, videos, spec, start="random", batch_size=2, seed=5, rank=r,
                         world_size=2), 9) for r in (0, 1)]  # fmt: skip
    for batch, *shares in zip(whole, *parts, strict=True):
        assert batch.index_B.tolist() == [i for s in shares for i in s.index_B.tolist()]
        assert torch.equal(batch.latent_BFCHW, torch.cat([s.latent_BFCHW for s in shares]))
        assert batch.segment_S3[:, 2].max() == 3
        assert len(batch.text_SXD) == len(batch.segment_S3)
    by_file: dict[int, list[torch.Tensor]] = {}
    for batch in whole:
        for index, latent in zip(batch.index_B.tolist(), batch.latent_BFCHW, strict=True):
            by_file.setdefault(index, []).append(latent)
    seen = [f for f in by_file.values() if len(f) > 1]
    assert any(not torch.equal(a, b) for f in seen for a, b in itertools.pairwise(f))
    specs = (spec, spec_of(num_frames=(2,)))
    names = {opened(DrawnClips, videos, s, start=start).fingerprint()
             for s in specs for start in ("random", "scene")}  # fmt: skip
    assert len(names) == 4
    with pytest.raises(ValueError, match=r"one length and no other starts: not \[4, 2\] latent"):
        opened(DrawnClips, videos, spec_of(), start="random")
    with pytest.raises(ValueError, match="batch of 3 cannot be shared by 2 data ranks"):
        opened(DrawnClips, videos, spec, start="random", batch_size=3, world_size=2)


def test_a_file_that_fails_later_is_replaced_by_one_of_its_shape(videos):
    stream = opened(EncodedVideos, videos, spec_of(num_frames=(2,)), batch_size=2, seed=1)
    undisturbed = some(stream, 9)
    stream = opened(EncodedVideos, videos, spec_of(num_frames=(2,)), batch_size=2, seed=1)
    decode, bad = stream._set.decode, 0

    def failing(clips):
        return ["damaged since" if clip.index == bad else found
                for clip, found in zip(clips, decode(clips), strict=True)]  # fmt: skip

    stream._failures._source = source_of(videos, max_bad=0.5)
    with mock.patch.object(stream._set, "decode", failing):
        batches = some(stream, 9)
    replaced = 0
    for ours, theirs in zip(batches, undisturbed, strict=True):
        assert ours.latent_BFCHW.shape == theirs.latent_BFCHW.shape
        for a, b in zip(ours.index_B.tolist(), theirs.index_B.tolist(), strict=True):
            assert a != bad
            assert a == b or b == bad
            replaced += b == bad
    assert replaced
    assert '"reason": "damaged since"' in (videos / "skipped.jsonl").read_text()


def test_wans_codec_and_cached_embeddings_feed_pretraining(videos, tmp_path, ranks):
    tiny().save_pretrained(tmp_path / "vae")
    texts, words = tmp_path / "texts.safetensors", Words(16, 12)
    settings = [
        "model.latent_height=4", "model.latent_width=6", f"codec.vae={tmp_path}",
        f"latents.embeddings={texts}", f"latents.videos.path={videos}", "stream.num_frames=3",
        "latents.videos.max_bad=0.3", "latents.videos.fps=12", "latents.videos.every=6",
    ]  # fmt: skip
    config = recipe_of(tmp_path, *settings)
    add_texts(texts, words, TEXTS[:1])
    with pytest.raises(ValueError, match=r"1 texts are not in .*, the first is 'it turns blue'"):
        open_videos(config, ranks)
    add_texts(texts, words, TEXTS)
    stream = open_videos(config, ranks)
    assert isinstance(stream, EncodedVideos)
    assert stream.spec.sizes == ((32, 48),)
    codec = codec_on(config, torch.device("cpu"))
    for batch in some(stream, 3):
        assert batch.latent_BFCHW.shape == (4, 3, 4, 4, 6)
        for index, latent in zip(batch.index_B.tolist(), batch.latent_BFCHW, strict=True):
            (clip,) = stream._set.decode([stream._clips[index]])
            pixels = clip.video_CFHW.float() / 127.5 - 1
            torch.testing.assert_close(codec.encode(pixels[None])[0], latent, rtol=1e-3, atol=1e-3)
    drawn = open_videos(recipe_of(tmp_path, *settings[:-1], "latents.videos.start=scene"), ranks)
    assert isinstance(drawn, DrawnClips)
    assert next(drawn.batches()).latent_BFCHW.shape == (4, 3, 4, 4, 6)
