"""tools.generate from the command line: the shapes checkpoint, one process, no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_kvpo.config import load_config
from megatron_kvpo.data.shapes import write_dataset
from megatron_kvpo.data.video import ClipSpec, decode_file
from megatron_kvpo.data.video_file import VideoWriter
from megatron_kvpo.model.codec import load_codec
from tools import generate

RECIPE = Path(__file__).parents[2] / "examples" / "shapes" / "demo.yaml"
RED, BLUE = "a red square at the middle left moves right", "it turns blue"


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(RECIPE.parents[2])  # the recipe's paths count from there


def frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def make(tmp_path: Path, *more: str) -> np.ndarray:
    out = tmp_path / "out.mp4"
    assert generate.main([str(RECIPE), "device=cpu", "--output", str(out), *more]) == 0
    assert list(tmp_path.glob(".*")) == []  # nothing half-written is left behind
    return frames(out)


def test_a_switch_turns_red_into_blue(tmp_path):
    texts = ["--prompt", RED, "--prompt", BLUE, "--prompt", "it falls"]
    video = make(tmp_path, *texts, "--switch", "9,18", "--scale", "4")
    assert video.shape == (4 * 21 - 3, 128, 128, 3)
    early, late = (video[i].astype(float).max(axis=(0, 1)) for i in (20, 70))
    assert early[0] > 150 > early[2]
    assert late[2] > 150 > late[0]


def test_a_decoder_beside_the_generator_shows_the_same_video(tmp_path, monkeypatch):
    """The same pixels: x264 makes two files of one video now and then."""
    write, shown = VideoWriter.write, []

    def watched(writer, frames_FCHW):
        shown[-1].append(frames_FCHW.clone())
        write(writer, frames_FCHW)

    monkeypatch.setattr(VideoWriter, "write", watched)
    for more in ([], ["--decode-on", "cpu"]):
        shown.append([])
        assert len(make(tmp_path, "--prompt", RED, "--frames", "9", *more)) == 33
    own, beside = (torch.cat(blocks) for blocks in shown)
    assert own.shape == (33, 3, 32, 32)
    assert torch.equal(beside, own)


def test_a_line_of_a_prompt_file_brings_its_switches_and_frames_may_be_fewer(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [{"segments": [BLUE]}, {"segments": [RED, BLUE], "switch_frames": [9]}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    from_file = make(tmp_path, "--prompts", str(file), "--line", "1", "--frames", "15")
    assert len(from_file) == 57
    assert np.ptp(from_file) > 150


def test_lines_that_are_typed_become_the_prompt_of_the_next_block(tmp_path, monkeypatch):
    class Typist:
        def __init__(self, *_):
            self.calls = 0

        def newest(self):
            self.calls += 1
            return {4: BLUE, 5: "a purple elephant"}.get(self.calls)

    monkeypatch.setattr(generate, "Lines", Typist)
    video = make(tmp_path, "--prompt", RED, "--interactive")
    late = video[70].astype(float).max(axis=(0, 1))
    assert late[2] > 150 > late[0]  # and the line with an unknown word ended nothing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", RED, "--switch", "9"], r"1 prompts need 0 switch frames, 1 are given"),
        (["--prompt", RED, "--prompt", BLUE, "--switch", "10"], r"\[10\] must .* multiples of 3"),
        (["--prompt", RED, "--frames", "20"], r"--frames 20 must be a multiple of 3"),
        (["--prompt", RED, "--decode-on", "here"], r"--decode-on here names no device"),
        (["--prompt", RED, "--decode-on", "cuda:9"], r"--decode-on cuda:9: there are \d+ CUDA"),
        (["--prompt", "a red elephant"], r"unknown word 'elephant'"),
        (["--prompt", RED, "--weights", "nowhere.safetensors"], r"nowhere.safetensors"),
        (["--prompts", "examples/shapes/prompts_dev.jsonl", "--line", "99"], r"lines 0 to 31"),
        ([], r"nothing to show"),
    ],
)
def test_what_cannot_work_is_refused_before_a_file_is_begun(tmp_path, arguments, message):
    out = tmp_path / "out.mp4"
    with pytest.raises(ValueError, match=message):
        generate.main([str(RECIPE), "device=cpu", "--output", str(out), *arguments])
    assert list(tmp_path.iterdir()) == []


def test_only_mp4_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"out.avi is no .mp4 file"):
        generate.main([str(RECIPE), "device=cpu", "--output", str(tmp_path / "out.avi"),
                       "--prompt", RED])  # fmt: skip


def test_latents_are_kept_as_they_are_and_the_record_says_what_they_cost(tmp_path):
    files = [tmp_path / f"{name}.safetensors" for name in ("first", "again", "other")]
    record = tmp_path / "record.json"
    for file, seed in zip(files, ("0", "0", "1"), strict=True):
        texts = ["--prompt", RED, "--prompt", BLUE, "--switch", "9", "--seed", seed]
        files_out = ["--output", str(file), "--record", str(record), "--compare", str(files[0])]
        assert generate.main([str(RECIPE), "device=cpu", *texts, *files_out]) == 0
        found = json.loads(record.read_text())
        assert (found["relative_difference"] == 0) is (seed == "0")
        assert (found["relative_difference_last_block"] == 0) is (seed == "0")
    assert found["relative_difference"] > 0.1
    latent = load_file(files[0])["latent_FCHW"]
    assert latent.shape == (21, 16, 8, 8)
    assert found["block_s"]["repeats"] == 6  # seven blocks, the first warms up
    assert found["switch_s"]["repeats"] == 1
    assert 0 < found["block_s"]["min"] <= found["block_s"]["median"] <= found["block_s"]["max"]
    assert "decode_s" not in found
    assert found["config"]["model"]["hidden_dim"] == 128


def test_a_video_is_continued_from_its_own_latents(tmp_path):
    pytest.importorskip("nvidia.dali")
    clips = tmp_path / "clips"
    write_dataset(clips, 2, 3, size=64)
    spec = ClipSpec(num_pixel_frames=45, size=(32, 32))
    config = load_config(RECIPE)
    codec = load_codec(config.codec, config.model.latent_channels)
    given = codec.encode(decode_file(clips / "00000.mp4", spec)[None])[0].detach()
    line = {"segments": [RED, BLUE], "switch_frames": [12], "video": "clips/00000.mp4",
            "video_frames": 12}  # fmt: skip
    (tmp_path / "prompts.jsonl").write_text(json.dumps(line) + "\n")
    ways = {
        "line": ["--prompts", str(tmp_path / "prompts.jsonl")],
        "file": ["--video", str(clips / "00000.mp4"), "--video-frames", "12", "--prompt", RED,
                 "--prompt", BLUE, "--switch", "12"],
    }  # fmt: skip
    found = {}
    for name, arguments in ways.items():
        out = tmp_path / f"{name}.safetensors"
        assert generate.main([str(RECIPE), "device=cpu", "--output", str(out), *arguments]) == 0
        found[name] = load_file(out)["latent_FCHW"]
    torch.testing.assert_close(found["line"][:12], given, rtol=1e-5, atol=1e-5)
    assert torch.equal(found["line"], found["file"])
    video = make(tmp_path, *ways["file"])
    assert len(video) == 81
    near = (video[40].astype(float) - frames(clips / "00000.mp4")[40][::2, ::2]) / 255
    assert np.sqrt((near**2).mean()) < 0.1, "the beginning is the video's"
    for wrong, said in ((["--video", str(clips / "gone.mp4"), "--video-frames", "6"], "no such"),
                        (["--video", str(clips), "--video-frames", "6"], "a folder"),
                        (["--video", str(clips / "00000.mp4"), "--video-frames", "21"],
                         "--video-frames 21 must be")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            make(tmp_path, *wrong, "--prompt", RED)
