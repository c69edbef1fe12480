"""Latents that a GPU encodes are a CPU's, and a video is continued there as on a CPU."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from megatron_kvpo.config import CodecConfig, ParallelConfig
from megatron_kvpo.model.codec import load_codec
from megatron_kvpo.model.wan_vae import WanVae
from megatron_kvpo.parallel.groups import start_ranks, stop_ranks
from megatron_kvpo.records import LatentBatch
from megatron_kvpo.rollout.group import roll_out_group
from megatron_kvpo.training.continuation import Beginnings
from tests.unit import small
from tests.unit.video_files import manifest, picture, write

pytest.importorskip("nvidia.dali")

from megatron_kvpo.data.encoded_videos import DrawnClips, EncodedVideos
from megatron_kvpo.data.encoding import EncodingSpec
from megatron_kvpo.data.latents import LatentCache
from megatron_kvpo.data.shapes import write_dataset
from megatron_kvpo.data.sources import VideoSource
from megatron_kvpo.model.text_encoder import WordEncoder
from tools import cache_latents

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RECIPE = """
model: {latent_channels: 4, latent_height: 4, latent_width: 4, text_dim: 16, text_length: 24}
codec: {width: 8}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("gpu_latents")
    write_dataset(made / "videos", 3, 3, num_latent_frames=12, size=32)
    (made / "recipe.yaml").write_text(RECIPE)
    return made


def make(folder: Path, output: Path, device: str) -> LatentCache:
    arguments = [str(folder / "recipe.yaml"), "--videos", str(folder / "videos"), "--output",
                 str(output), "--frames", "12", "--device", device]  # fmt: skip
    assert cache_latents.main(arguments) == 0
    return LatentCache(output, batch_size=2, seed=1, device=device)


def test_a_gpu_encodes_as_a_cpu_does_and_batches_lie_on_it(folder, tmp_path):
    ours, theirs = (make(folder, tmp_path / device, device) for device in ("cuda", "cpu"))
    assert ours.fingerprint() == theirs.fingerprint()
    for _, a, b in zip(range(3), ours.batches(), theirs.batches(), strict=False):
        for name in (f.name for f in dataclasses.fields(LatentBatch)):
            assert getattr(a, name).is_cuda == (name != "index_B")
        assert a.index_B.tolist() == b.index_B.tolist()
        torch.testing.assert_close(a.latent_BFCHW.cpu(), b.latent_BFCHW, rtol=2e-2, atol=2e-2)
        assert torch.equal(a.text_SXD.cpu(), b.text_SXD)
        assert torch.equal(a.segment_S3.cpu(), b.segment_S3)


@pytest.fixture(scope="module")
def h264(tmp_path_factory) -> Path:
    """Four files that NVDEC decodes, of two proportions and rates."""
    made = tmp_path_factory.mktemp("h264")
    rows = []
    for number in range(4):
        size = (96, 128) if number % 2 else (128, 96)
        write(made / f"{number}.mp4", rate=24 + number,
              pixels=[picture(n + number, *size) for n in range(30)])  # fmt: skip
        rows.append({"file": f"{number}.mp4", "segments": ["a red square", "it falls"],
                     "switch_s": [0.5]})  # fmt: skip
    (made / "recipe.yaml").write_text(RECIPE)
    return manifest(made, rows)


def streams(h264: Path, output: Path, backend: str) -> tuple[LatentCache, EncodedVideos]:
    """A cache and the same without it, decoded by `backend`, encoded on the GPU."""
    assert cache_latents.main([
        str(h264 / "recipe.yaml"), "--videos", str(h264), "--output", str(output), "--frames",
        "3,2", "--device", "cuda", "--backend", backend, "--fps", "12", "--every", "3", "--buckets",
        "48x64,64x48",
    ]) == 0  # fmt: skip
    cache = LatentCache(output, batch_size=2, seed=1, device="cuda")
    codec = load_codec(CodecConfig(width=8), 4).cuda().requires_grad_(False).eval()
    plain = EncodedVideos(VideoSource(path=h264), cache.spec, codec, WordEncoder(16, 24),
                          batch_size=2, seed=1, device="cuda", backend=backend)  # fmt: skip
    return cache, plain


def test_nvdec_fills_a_cache_and_feeds_training_with_the_same_bits(h264, tmp_path):
    cache, plain = streams(h264, tmp_path / "gpu", "gpu")
    assert plain._set._decoder._front_end(plain._set._cut(plain._clips[0])) == "native"
    assert plain.fingerprint() == cache.fingerprint()
    other, _ = streams(h264, tmp_path / "cpu", "cpu")
    assert other.fingerprint() == cache.fingerprint()
    for _, a, b, c in zip(
        range(6), cache.batches(), plain.batches(), other.batches(), strict=False
    ):
        for name in (f.name for f in dataclasses.fields(LatentBatch)):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
            assert getattr(b, name).is_cuda == (name != "index_B")
        assert (a.latent_BFCHW - c.latent_BFCHW).norm() < 0.1 * c.latent_BFCHW.norm()
    assert plain._set._decoder.decoded["native"] > 0


def test_clips_that_are_drawn_are_decoded_and_encoded_on_the_gpu(h264):
    codec = load_codec(CodecConfig(width=8), 4).cuda().requires_grad_(False).eval()
    spec = EncodingSpec.of(codec, WordEncoder(16, 24), sizes=((48, 64),), num_frames=(3,), fps=12.0)
    stream = DrawnClips(VideoSource(path=h264), spec, codec, WordEncoder(16, 24), start="random",
                        batch_size=2, seed=1, device="cuda", backend="gpu")  # fmt: skip
    twice = [list(itertools.islice(stream.batches(2), 3)) for _ in range(2)]
    for a, b in zip(*twice, strict=True):
        assert a.latent_BFCHW.is_cuda
        assert a.latent_BFCHW.shape == (2, 3, 4, 12, 16)
        assert torch.equal(a.latent_BFCHW, b.latent_BFCHW)


@pytest.mark.parametrize("wan", [False, True])
def test_a_group_continues_a_video_on_a_gpu(folder, wan):
    joined = start_ranks(ParallelConfig(timeout_s=120), "cuda")
    try:
        tiny = small.build(joined, "device=cuda")
        codec = load_codec(CodecConfig(width=8), 4).cuda().requires_grad_(False)
        if wan:
            from tests.unit.test_wan_vae import tiny as tiny_vae

            codec = WanVae(tiny_vae())
        beginnings = Beginnings(tiny.config.model, codec, joined.device)
        prompt = dataclasses.replace(
            small.switching(12), video=folder / "videos" / "00001.mp4", video_frames=9
        )
        beginnings.check([prompt])
        begin = beginnings.shared((joined.tensor, joined.context, joined.branch))
        with tiny.policy.acting("old"):
            sampled = roll_out_group(tiny.world, tiny.encode, prompt, tiny.plan(),
                                     tiny.noises(prompt), tiny.stages.sequences, None,
                                     begin)  # fmt: skip
        given = begin(prompt)
        assert given.is_cuda
        assert given.std() > 0.01
        assert torch.equal(sampled.group.latent_NFCHW[:, :9], given.expand(4, -1, -1, -1, -1))
        energies = tiny.stages.energies(0, [sampled], "old")
        assert float(energies.anchor_P.max()) < 1e-9
        sampled.release()
        assert tiny.world.pool.num_free == tiny.num_pages
    finally:
        stop_ranks()
