"""tools.cache_latents: whole after a kill, alike from any number of processes, never mixed up."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("nvidia.dali")

from megatron_kvpo.data.embeddings import add_texts
from megatron_kvpo.data.latents import LatentCache
from megatron_kvpo.data.shapes import write_dataset
from megatron_kvpo.data.video import ClipSpec, decode_file
from megatron_kvpo.model.text_encoder import WordEncoder
from tests.unit.test_latents import RECIPE
from tools import cache_latents

ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal, sys
from megatron_kvpo.data import latent_files
from tools import cache_latents
replace, count = os.replace, 0
def dying(source, target):
    global count
    count += "shard_" in str(target)
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
latent_files.os.replace = dying
cache_latents.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A recipe, ten videos, one of which is broken."""
    made = tmp_path_factory.mktemp("tool")
    write_dataset(made / "videos", 10, 3, num_latent_frames=12, size=32)
    (made / "videos" / "00004.mp4").write_bytes(b"")
    (made / "recipe.yaml").write_text(RECIPE)
    return made


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    return [
        str(folder / "recipe.yaml"), "--videos", str(folder / "videos"), "--output", str(output),
        "--device", "cpu", "--frames", "9", "--shard-clips", "2", *more,
    ]  # fmt: skip


def digest(folder: Path) -> dict[str, str]:
    """Every file's contents."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    """The cache that one undisturbed process makes."""
    output = tmp_path_factory.mktemp("whole") / "latents"
    assert cache_latents.main(arguments(folder, output)) == 0
    return output


def test_a_bad_file_is_reported_and_the_rest_is_there(whole):
    names = {f"shard_{n:05d}.safetensors" for n in range(5)}
    assert set(digest(whole)) == {*names, "settings.json", "manifest.jsonl", "rejected.jsonl"}
    cache = LatentCache(whole)
    assert [line.clip for line in cache.manifest.lines] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    (rejected,) = map(json.loads, (whole / "rejected.jsonl").read_text().splitlines())
    assert (rejected["clip"], rejected["file"]) == (4, "00004.mp4")
    assert "the file is empty" in rejected["reason"]
    assert {oct(file.stat().st_mode) for file in whole.iterdir()} == {
        oct((whole / "settings.json").stat().st_mode)
    }


def test_what_a_kill_leaves_is_kept_and_a_rerun_ends_with_the_same_bytes(folder, whole, tmp_path):
    output = tmp_path / "latents"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, *arguments(folder, output)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == -9, done.stderr.decode()[-2000:]
    left = digest(output)
    shards = {name for name in left if name.startswith("shard_")}
    assert shards == {"shard_00000.safetensors", "shard_00001.safetensors"}
    assert any(name.endswith(".partial") for name in left), "it was killed while it wrote"
    with pytest.raises(ValueError, match="begun and is not finished"):
        LatentCache(output)
    times = {name: (output / name).stat().st_mtime_ns for name in shards}
    assert cache_latents.main(arguments(folder, output)) == 0
    assert digest(output) == digest(whole)
    assert {name: (output / name).stat().st_mtime_ns for name in shards} == times


def test_processes_make_together_what_one_makes(folder, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    output = tmp_path / "latents"
    for number, rank in enumerate(("2", "0", "1")):
        assert not (output / "manifest.jsonl").exists(), f"written before process {number}"
        monkeypatch.setenv("RANK", rank)
        assert cache_latents.main(arguments(folder, output)) == 0
    assert digest(output) == digest(whole)


@pytest.mark.gloo
def test_torchrun_starts_them(folder, whole, tmp_path):
    output = tmp_path / "latents"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr",
               "127.0.0.1", "--nproc_per_node", "2", "-m", "tools.cache_latents"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments(folder, output)], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert digest(output) == digest(whole)
    assert "clips/s" in done.stderr
    assert "left 0:00" in done.stderr


def test_a_rerun_with_other_settings_is_refused_and_changes_nothing(folder, whole):
    before = digest(whole)
    for more, said in (
        (["--dtype", "bfloat16"], "dtype bfloat16, not float32"),
        (["--frames", "6"], r"num_frames \(6,\), not \(9,\)"),
        (["--starts", "0,4"], "starts .* num_clips 20, not 10"),
        (["--shard-clips", "3"], "shard_clips 3, not 2"),
        (["codec.width=16"], "codec .*, not"),
    ):
        with pytest.raises(ValueError, match=rf"made with other settings \(asked for is .*{said}"):
            cache_latents.main(arguments(folder, whole, *more))
    assert cache_latents.main(arguments(folder, whole)) == 0
    assert digest(whole) == before


def test_a_shard_that_was_cut_short_or_lost_is_made_anew(folder, whole, tmp_path):
    output = tmp_path / "latents"
    output.mkdir()
    for file in whole.iterdir():
        data = file.read_bytes()
        if file.name != "shard_00001.safetensors":
            (output / file.name).write_bytes(data[:-8] if file.name.startswith("shard_00003")
                                             else data)  # fmt: skip
    for file in output.iterdir():
        file.chmod((whole / file.name).stat().st_mode)
    assert cache_latents.main(arguments(folder, output)) == 0
    assert digest(output) == digest(whole)


def test_clips_may_begin_anywhere_and_take_every_other_pixel_frame(folder, tmp_path):
    output = tmp_path / "latents"
    more = ["--frames", "3", "--starts", "0,8", "--fps", "8"]
    assert cache_latents.main([*arguments(folder, output), *more]) == 0
    cache = LatentCache(output)
    assert len(cache) == 18
    line = cache.line(3)
    assert (line.file, line.start) == ("00001.mp4", 8)
    assert {line.start for line in cache.manifest.lines} == {0, 8}
    codec = cache_latents.codec_on(
        cache_latents.read_recipe(cache_latents._parse(arguments(folder, output))),
        torch.device("cpu"),
    )
    spec = ClipSpec(num_pixel_frames=9, size=(32, 32), start=16, stride=2)
    video = decode_file(folder / "videos" / "00001.mp4", spec)
    assert torch.equal(cache.latent(3), codec.encode(video[None])[0])


class Words(WordEncoder):
    """The word encoder, as one that fills a cache of embeddings."""

    identity, dtype = "words", torch.float32

    def embed(self, texts: list[str]) -> list[torch.Tensor]:
        return [text_XD[: len(self.words_of(text))]
                for text, text_XD in zip(texts, self.encode(texts), strict=True)]  # fmt: skip


def test_embeddings_may_come_from_a_file_and_must_be_whole(folder, whole, tmp_path):
    file, words = tmp_path / "embeddings.safetensors", Words(16, 24)
    manifest = (folder / "videos" / "manifest.jsonl").read_text().splitlines()
    texts = [text for line in manifest for text in json.loads(line)["segments"]]
    add_texts(file, words, texts[1:])
    output = tmp_path / "latents"
    told = arguments(folder, output, "--embeddings", str(file))
    with pytest.raises(ValueError, match=rf"1 texts are not in .*{texts[0]!r}"):
        cache_latents.main(told)
    assert not output.exists()
    add_texts(file, words, texts)
    assert cache_latents.main(told) == 0
    ours, theirs = LatentCache(output, batch_size=9), LatentCache(whole, batch_size=9)
    assert ours.spec.text == "words"
    a, b = next(ours.batches()), next(theirs.batches())
    assert torch.equal(a.text_SXD, b.text_SXD)
    assert torch.equal(a.latent_BFCHW, b.latent_BFCHW)
    assert ours.fingerprint() != theirs.fingerprint()


def test_wans_vae_encodes_too(folder, tmp_path):
    from tests.unit.test_wan_vae import tiny

    theirs = tiny()
    theirs.save_pretrained(tmp_path / "vae")
    output = tmp_path / "latents"
    more = ["model.latent_height=4", "model.latent_width=6", "--vae", str(tmp_path / "vae")]
    assert cache_latents.main([*arguments(folder, output), "--frames", "3", *more]) == 0
    cache = LatentCache(output)
    assert cache.spec.sizes == ((32, 48),)
    spec = ClipSpec(num_pixel_frames=9, size=(32, 48))
    video = decode_file(folder / "videos" / "00002.mp4", spec)
    with torch.no_grad():
        mode_FCHW = theirs.encode(video[None]).latent_dist.mode()[0].transpose(0, 1)
    mean, std = (torch.tensor(theirs.config[f"latents_{name}"]) for name in ("mean", "std"))
    whole = (mode_FCHW - mean[:, None, None]) / std[:, None, None]
    found = cache.latent(2)
    assert found.shape == (3, 4, 4, 6)
    error = (found - whole).norm() / whole.norm()
    assert error < 0.03, f"off by {error:.3g}: the weights are rounded to bfloat16"


def test_what_cannot_work_is_refused_before_anything_is_written(folder, tmp_path):
    output = tmp_path / "latents"
    for more, said in (
        (["model.text_dim=8", "model.text_length=2"], "exceed model.text_length 2"),
        (["--vae", str(tmp_path)], "holds no Wan VAE"),
        (["model.colour=3"], r"unknown setting model.colour"),
        (["--embeddings", "/nowhere"], "no prompt embeddings at /nowhere"),
        (["--frames", "9,21"], "must be above 0 and fall"),
        (["--size", "32", "36"], "frames of 32 x 36 do not divide into patches of 8 x 8"),
        (["--every", "4", "--starts", "0,8"], "every 4 pixel frames from .0, 8. on: use"),
    ):
        with pytest.raises(ValueError, match=said):
            cache_latents.main(arguments(folder, output, *more))
    assert not output.exists()
    output.mkdir()
    (output / "shard_00000.safetensors").write_bytes(b"another's")
    with pytest.raises(ValueError, match=r"holds files of something else and no settings.json"):
        cache_latents.main(arguments(folder, output))
    with pytest.raises(ValueError, match=r"no videos at .*nowhere: give a folder, a .jsonl"):
        cache_latents.main([*arguments(folder, output), "--videos", "/nowhere"])


def test_a_source_without_one_good_file_or_with_too_many_bad_ones_is_refused(folder, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    line = {"file": "bad.mp4", "segments": ["a red square"]}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(line) + "\n")
    output = tmp_path / "latents"
    with pytest.raises(ValueError, match=r"no usable video in .*; 1 of 1 .*bad.mp4: .*cannot be "):
        cache_latents.main([*arguments(folder, output), "--videos", str(tmp_path)])
    assert json.loads((tmp_path / "skipped.jsonl").read_text())["file"] == "bad.mp4"
    with pytest.raises(ValueError, match=r"1 of 10 .*more than max_bad 0.05 of the files"):
        cache_latents.main([*arguments(folder, output), "--max-bad", "0.05"])
    assert not output.exists()
