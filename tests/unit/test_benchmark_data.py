"""The benchmark of readers: real files, real readers, and a table that says what the JSON says."""

from __future__ import annotations

import json

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


def test_options_that_cannot_run_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.json"):
        benchmark_data.main(["--output", str(tmp_path / "x.md")])
    with pytest.raises(ValueError, match="are 1 or more"):
        benchmark_data.main(["--output", str(tmp_path / "x.json"), "--repeats", "0"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            benchmark_data.main(["--output", str(tmp_path / "x.json"), "--backend", "gpu"])
