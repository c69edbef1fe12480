"""What DALI dies of kills one process and not the next; other deaths change nothing."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_kvpo.data import in_flight
from megatron_kvpo.data.clips import ClipSpec, cut
from megatron_kvpo.data.in_flight import CRASHED, FOLDER, InFlight
from megatron_kvpo.data.video import VideoPipeline, probe_file
from tests.unit.video_files import picture, write

pytest.importorskip("nvidia.dali")

ROOT = Path(__file__).parents[2]
CLIP = ClipSpec(num_pixel_frames=8, size=(96, 128), dtype=torch.uint8)

FAULT = """
import os, time
if os.environ.get("FAULT"):
    from megatron_kvpo.data.graph import Decoder
    feed = Decoder._feed

    def fault(self, front_end, samples, clips):
        if front_end == "native" and any(c.file.path.name == "b.webm" for c in clips):
            if os.environ["FAULT"] == "hang":
                time.sleep(600)
            os.kill(os.getpid(), int(os.environ["FAULT"]))
        return feed(self, front_end, samples, clips)

    Decoder._feed = fault
"""
"""A decoder's fault, in every process that Python starts: DALI has none at hand."""

RUN = """
import sys, torch
from pathlib import Path
from megatron_kvpo.data.video import ClipSpec, VideoPipeline
clip = ClipSpec(num_pixel_frames=8, size=(96, 128), dtype=torch.uint8)
values = {"batch_size": 3, "shuffle": False, "backend": sys.argv[2]}
print(len(list(VideoPipeline(Path(sys.argv[1]), clip, **values).epoch())))
"""

BACKENDS = pytest.mark.parametrize("backend", ["cpu", pytest.param("gpu", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
])])  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    found = tmp_path / "videos"
    found.mkdir()
    pixels = [picture(number, 192, 256) for number in range(8)]  # NVDEC refuses small VP9
    for name in "abc":
        write(found / f"{name}.webm", "libvpx-vp9", pixels=pixels)
    (tmp_path / "sitecustomize.py").write_text(FAULT)
    paths = [str(tmp_path), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.delenv("FAULT", raising=False)
    return found


def run(folder: Path, fault: str, backend: str = "cpu") -> int:
    """A process that decodes an epoch, with this fault; how it ended."""
    return subprocess.run(
        [sys.executable, "-c", RUN, str(folder), backend], env={**os.environ, "FAULT": fault},
        cwd=ROOT, capture_output=True, check=False,
    ).returncode  # fmt: skip


def pipeline_of(folder: Path, backend: str = "cpu") -> VideoPipeline:
    return VideoPipeline(folder, CLIP, batch_size=3, shuffle=False, backend=backend)


def notes(folder: Path) -> list[str]:
    """Names of the videos in notes that stand there."""
    lines = [p.read_text().splitlines() for p in sorted((folder / FOLDER).glob("*.notes"))]
    return [Path(json.loads(line)["path"]).name for own in lines for line in own]


@BACKENDS
def test_what_kills_dali_kills_one_process_and_is_decoded_by_pyav_in_the_next(
    backend, folder, monkeypatch, caplog
):
    assert run(folder, str(int(signal.SIGSEGV)), backend) == -signal.SIGSEGV
    assert notes(folder) == ["a.webm", "b.webm", "c.webm"]
    monkeypatch.setenv("FAULT", str(int(signal.SIGSEGV)))  # for processes that are started
    with caplog.at_level(logging.INFO):
        pipeline = pipeline_of(folder, backend)
    assert f"DALI died of SIGSEGV at {folder / 'b.webm'}: PyAV decodes it" in caplog.text
    assert caplog.text.count("DALI died") == 1
    assert len(list(pipeline.epoch())) == 1
    assert pipeline.decoder.decoded == {"native": 2, "frames": 1}
    assert len(pipeline.report.good) == 3, "no video is lost"
    rows = [json.loads(line) for line in (folder / FOLDER / CRASHED).read_text().splitlines()]
    assert [(Path(row["path"]).name, row["reason"]) for row in rows] == [
        ("b.webm", "died of SIGSEGV")
    ]
    caplog.clear()
    assert len(pipeline_of(folder, backend).decoder._refused) == 1
    assert "trying" not in caplog.text
    assert InFlight(folder, "another decoder").refused() == set()
    os.utime(folder / "b.webm", (1, 1))
    assert pipeline_of(folder, backend).decoder._refused == set(), "another file"


def test_a_run_that_died_of_something_else_goes_on_with_the_same_decoder(folder, caplog):
    assert run(folder, str(int(signal.SIGKILL))) == -signal.SIGKILL
    assert len(notes(folder)) == 3
    with caplog.at_level(logging.INFO):
        pipeline = pipeline_of(folder)
    assert "trying 3 clips" in caplog.text
    assert len(list(pipeline.epoch())) == 1
    assert pipeline.decoder.decoded == {"native": 3, "frames": 0}
    assert not (folder / FOLDER / CRASHED).exists()
    assert notes(folder) == [], "nothing is in hand"


def test_what_hangs_alone_is_pyavs_too(folder, monkeypatch):
    clip = cut(probe_file(folder / "b.webm", CLIP), CLIP, 0, 0)
    monkeypatch.setenv("FAULT", "hang")
    monkeypatch.setattr(in_flight, "PATIENCE_S", 3)
    left = [in_flight._noted(clip, "cpu")]
    assert list(in_flight._tried(left)) == [(left[0], "said nothing for 3 s")]


def test_notes_of_a_living_process_are_its_own(folder):
    mine, clip = InFlight(folder, "cpu"), cut(probe_file(folder / "a.webm", CLIP), CLIP, 0, 0)
    with mine.holding([clip]):
        assert notes(folder) == ["a.webm"]
        assert InFlight(folder, "cpu").refused() == set()
        assert notes(folder) == ["a.webm"]
    assert notes(folder) == []


def test_without_a_place_for_notes_it_decodes_all_the_same(folder, caplog):
    (folder / FOLDER).write_text("a file")
    pipeline = pipeline_of(folder)
    assert len(list(pipeline.epoch())) == 1
    assert pipeline.decoder.decoded == {"native": 3, "frames": 0}
    assert caplog.text.count("what DALI decodes is not noted") == 1
