"""The benchmark of readers: real files, real readers, and a table that says what the JSON says."""

from __future__ import annotations

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace

import av
import pytest
import torch

from tests import quiet
from tools import benchmark_data

pytest.importorskip("nvidia.dali")

_quiet_afterwards = quiet.quiet_afterwards

SMALL = ["--files", "1", "--seconds", "1", "--source", "64", "96", "--size", "32", "48",
         "--clip-frames", "5", "--batch", "2", "--batches", "1", "--repeats", "2"]  # fmt: skip


def test_every_codec_and_reader_has_a_rate_and_a_line(tmp_path):
    out = tmp_path / "cpu.json"
    options = [*SMALL, "--folder", str(tmp_path / "files"), "--consumes", "10"]
    assert benchmark_data.main([*options, "--output", str(out)]) == 0
    found = json.loads(out.read_text())
    assert {(row["codec"], row["front_end"]) for row in found["rows"] if row["front_end"]} == {
        ("h264", "frames"), ("hevc", "frames"), ("vp9", "native"),
    }  # fmt: skip
    readers = {row["reader"] for row in found["rows"]}
    assert {"megatron_kvpo", "PyAV"} <= readers
    assert len(found["rows"]) == 3 * len(readers)
    for row in found["rows"]:
        assert row["pixel_frames"] == 10
        assert 0 < row["min_frames_per_s"] <= row["median_frames_per_s"] <= row["max_frames_per_s"]
        assert row["feeds"] == pytest.approx(row["median_frames_per_s"] / 10)
    table = out.with_suffix(".md").read_text()
    assert "| h264 | megatron_kvpo (frames) |" in table
    assert "Training consumes 10 pixel frames a second" in table
    written = sorted((tmp_path / "files").rglob("*.mp4"))
    stamps = [path.stat().st_mtime_ns for path in written]
    again = ["--codecs", "h264", "--output", str(tmp_path / "again.json")]
    assert benchmark_data.main([*SMALL, "--folder", str(tmp_path / "files"), *again]) == 0
    assert [path.stat().st_mtime_ns for path in written] == stamps, "files are used again"
    assert "feeds" not in (tmp_path / "again.md").read_text()


def test_readers_use_all_threads_also_where_a_batch_has_fewer_clips(monkeypatch):
    meet = threading.Barrier(3, timeout=20)

    def read(clip: int) -> torch.Tensor:
        meet.wait()  # breaks if fewer are read at a time
        return torch.tensor(clip)

    monkeypatch.setattr(benchmark_data, "cut", lambda file, spec, epoch, number: number)
    pipeline = SimpleNamespace(report=SimpleNamespace(good=["file"]), clip=None)
    with ThreadPoolExecutor(3) as pool:
        options = SimpleNamespace(batch=1)
        assert benchmark_data._timed(pipeline, read, pool, options, 0, 3) > 0


def test_options_that_cannot_run_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.json"):
        benchmark_data.main(["--output", str(tmp_path / "x.md")])
    with pytest.raises(ValueError, match="are 1 or more"):
        benchmark_data.main(["--output", str(tmp_path / "x.json"), "--repeats", "0"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            benchmark_data.main(["--output", str(tmp_path / "x.json"), "--backend", "gpu"])


def fake_torchcodec(monkeypatch, fails_at=None, cuda_error="Unsupported device: cuda"):
    """A build without CUDA, which on the CPU shows black; returns the devices it was asked for."""
    asked = []

    class VideoDecoder:
        def __init__(self, path, *, device, num_ffmpeg_threads, transforms=()):
            asked.append(device)
            if device == "cuda":
                raise RuntimeError(f"validateDeviceInterface, DeviceInterface.cpp:69, {cuda_error}")
            if len(asked) == fails_at:
                raise TypeError("no more\nclips today")
            self.size = transforms[1] if transforms else (64, 96)

        def get_frames_at(self, frames):
            return SimpleNamespace(data=torch.zeros(len(frames), 3, *self.size).byte())

    decoders = ModuleType("torchcodec.decoders")
    transforms = ModuleType("torchcodec.transforms")
    decoders.VideoDecoder, transforms.CenterCrop, transforms.Resize = VideoDecoder, tuple, tuple
    for name, module in (("decoders", decoders), ("transforms", transforms)):
        monkeypatch.setitem(sys.modules, f"torchcodec.{name}", module)
    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    return asked


def measured_as_on_a_gpu(tmp_path, monkeypatch):
    """The record of `--backend gpu` where nothing but torchcodec minds that there is none."""
    pipeline = benchmark_data.VideoPipeline
    monkeypatch.setattr(
        benchmark_data, "VideoPipeline",
        lambda *args, **options: pipeline(*args, **{**options, "backend": "cpu"}),
    )  # fmt: skip
    monkeypatch.setattr(benchmark_data, "_target", lambda options: torch.device("cpu"))
    options = ["--backend", "gpu", "--folder", str(tmp_path / "files"), "--codecs", "h264", "vp9"]
    options += ["--output", str(tmp_path / "gpu.json")]
    return benchmark_data.measure(benchmark_data._parse([*SMALL, *options]), lambda found: None)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            "Unsupported device: cuda (device type: cuda, variant: default)",
            "this build has no CUDA",
        ),
        ("Failed to create the NVDEC decoder", "it fails on CUDA"),
    ],
)
def test_torchcodec_without_cuda_is_measured_on_the_cpu_and_named_so(
    tmp_path, monkeypatch, error, reason
):
    asked = fake_torchcodec(monkeypatch, cuda_error=error)
    found = measured_as_on_a_gpu(tmp_path, monkeypatch)
    name = f"torchcodec (CPU: {reason})"
    assert asked.count("cuda") == 1, "one decoder is tried"
    rows = [(row["codec"], row["reader"]) for row in found["rows"]]
    readers = ("megatron_kvpo", "PyAV", name)
    assert rows == [(codec, reader) for codec in ("h264", "vp9") for reader in readers]
    (note,) = found["notes"]
    assert (note["codec"], note["reader"]) == ("", "torchcodec")
    assert note["note"].startswith(f"measured on the CPU, because {reason}: RuntimeError: ")
    assert error in note["note"]
    table = benchmark_data.table(found)
    assert f"| vp9 | {name} |" in table
    assert f"\n- torchcodec: measured on the CPU, because {reason}" in table


@pytest.mark.parametrize(("fails_at", "timings"), [(2, 0), (5, 1)])
def test_what_fails_is_left_out_and_the_rows_before_it_are_on_disk(
    tmp_path, monkeypatch, fails_at, timings
):
    asked = fake_torchcodec(monkeypatch, fails_at=fails_at)
    out = tmp_path / "cpu.json"
    options = [*SMALL, "--folder", str(tmp_path / "files"), "--output", str(out), "--threads", "1"]
    saved, write = [], benchmark_data.provenance.write_json
    monkeypatch.setattr(
        benchmark_data.provenance, "write_json",
        lambda found, path: (write(found, path), saved.append(json.loads(path.read_text()))),
    )  # fmt: skip
    assert benchmark_data.main([*options, "--codecs", "h264", "vp9"]) == 0
    found = json.loads(out.read_text())
    said = f"failed after {timings} of 2 timings: TypeError: no more clips today"
    assert found["notes"] == [{"codec": "h264", "reader": "torchcodec", "note": said}]
    assert f"\n- h264, torchcodec: {said}\n" in out.with_suffix(".md").read_text()
    repeats = {(row["codec"], row["reader"]): row["repeats"] for row in found["rows"]}
    assert repeats.pop(("h264", "torchcodec"), 0) == timings
    assert repeats == {
        (codec, reader): 2 for codec in ("h264", "vp9")
        for reader in ("megatron_kvpo", "PyAV", *(["torchcodec"] if codec == "vp9" else []))
    }  # fmt: skip
    assert len(asked) > fails_at, "the next codec tries it again"
    first = next(record for record in saved if record["notes"])
    assert len(first["rows"]) == (3 if timings else 0), "written as it failed"
    assert [len(record["rows"]) for record in saved] == sorted(len(r["rows"]) for r in saved)


def test_a_codec_that_cannot_be_written_costs_no_other(tmp_path, monkeypatch):
    broken = ("no_such_encoder", "mp4", {})
    monkeypatch.setitem(benchmark_data.benchmark_clips.ENCODERS, "h264", broken)
    out = tmp_path / "cpu.json"
    options = [*SMALL, "--folder", str(tmp_path / "files"), "--output", str(out)]
    assert benchmark_data.main([*options, "--codecs", "h264", "vp9"]) == 1
    found = json.loads(out.read_text())
    assert {row["codec"] for row in found["rows"]} == {"vp9"}
    note = next(note for note in found["notes"] if note["codec"] == "h264")
    assert note["reader"] == ""
    assert "not written: UnknownCodecError" in note["note"]
    assert not list((tmp_path / "files").glob("h264*/.*")), "nothing unfinished is left"


def test_a_failure_of_this_packages_reader_ends_with_code_1_and_all_other_rows(
    tmp_path, monkeypatch
):
    def fails(stream, count):
        raise av.error.InvalidDataError(1, "not today")

    monkeypatch.setattr(benchmark_data, "_drain", fails)
    out = tmp_path / "cpu.json"
    options = [*SMALL, "--folder", str(tmp_path / "files"), "--output", str(out)]
    assert benchmark_data.main([*options, "--codecs", "vp9"]) == 1
    found = json.loads(out.read_text())
    readers = {row["reader"] for row in found["rows"]}
    assert "PyAV" in readers
    assert "megatron_kvpo" not in readers
