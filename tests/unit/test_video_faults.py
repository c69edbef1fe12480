"""Files that are broken or unusual are decoded right or skipped by name, and stop nothing else."""

import json
import logging
import os
import signal
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from megatron_kvpo.data import probe, workers
from megatron_kvpo.data.sources import VideoSource
from megatron_kvpo.data.video import ClipSpec, VideoPipeline, decode_file, load_videos, probe_file
from tests.unit.video_files import FRAMES, by_pyav, manifest, number_of, psnr, shard, write

pytest.importorskip("nvidia.dali")

CLIP = ClipSpec(num_pixel_frames=8, size=(96, 128), dtype=torch.uint8)


def pipeline_of(path: Path, clip: ClipSpec = CLIP, *, batch_size=4, max_bad=1.0, **values):
    source = {k: values.pop(k) for k in ("check", "cache") if k in values}
    return VideoPipeline(VideoSource(path=path, max_bad=max_bad, **source), clip,
                         batch_size=batch_size, **{"shuffle": False, **values})  # fmt: skip


def skipped(folder: Path) -> dict[str, str]:
    lines = (folder / "skipped.jsonl").read_text().splitlines()
    return {row["file"]: row["reason"] for row in map(json.loads, lines)}


def write_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        for number in range(4):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = 44100, 1024 * number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def broken_folder(root: Path) -> Path:
    good = write(root / "good.mp4")
    data = good.read_bytes()
    (root / "cut.mp4").write_bytes(data[: len(data) // 2])
    front = write(root / "front.mp4", container_options={"movflags": "faststart"}).read_bytes()
    (root / "front.mp4").write_bytes(front[: len(front) * 2 // 3])
    (root / "empty.mp4").touch()
    (root / "garbage.mp4").write_bytes(bytes(range(256)) * 40)
    spoiled = bytearray(data)
    begin = data.index(b"mdat") + len(data) // 4
    spoiled[begin : begin + 400] = bytes(400)
    (root / "spoiled.mp4").write_bytes(spoiled)
    webm = write(root / "good.webm", "libvpx-vp9").read_bytes()
    (root / "cut.webm").write_bytes(webm[: len(webm) // 2])
    write_sound(root / "sound.mp4")
    (root / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    return root


@pytest.mark.parametrize("check", ["decode", "packets"])
def test_broken_files_are_skipped_by_name_and_the_others_used(tmp_path, caplog, check):
    folder = broken_folder(tmp_path)
    with caplog.at_level(logging.WARNING):
        pipeline = pipeline_of(folder, check=check)
    good = {file.name for file in pipeline.report.good}
    reasons = skipped(folder)
    later = {"spoiled.mp4"} & good  # what packets do not show shows when it is decoded
    assert good - later == {"good.mp4", "good.webm"}
    assert reasons == dict(pipeline.report.rejected)
    assert reasons["empty.mp4"] == "the file is empty"
    assert reasons["sound.mp4"] == "no video stream in it"
    assert reasons["front.mp4"].startswith("truncated")
    assert "cannot be opened or read" in reasons["garbage.mp4"]
    assert set(reasons) | later == {
        "cut.mp4", "front.mp4", "empty.mp4", "garbage.mp4", "spoiled.mp4", "cut.webm", "sound.mp4",
        "list.mp4",
    }  # fmt: skip
    assert f"{len(reasons)} of 10 videos cannot be used" in caplog.text
    for batch in pipeline.epoch():
        for video_CFHW in batch.video_BCFHW:
            shown = [number_of(image) for image in video_CFHW.permute(1, 2, 3, 0).numpy()]
            assert shown == list(range(8))
    assert set(skipped(folder)) == set(reasons) | later


def test_too_many_bad_files_stop_with_count_and_reasons(tmp_path):
    folder = broken_folder(tmp_path)
    with pytest.raises(ValueError, match=r"8 of 10 videos cannot be used: cut.mp4: .*max_bad 0.5"):
        pipeline_of(folder, max_bad=0.5)
    assert len(skipped(folder)) == 8, "the report is there to read"
    assert len(pipeline_of(folder, max_bad=0.8)) == 2


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264"), ("webm", "libvpx-vp9")])
def test_a_variable_frame_rate_comes_out_even(tmp_path, suffix, codec):
    # Pictures 0..9 every 100 ms, then 10..39 every 20 ms; at 10 a second every fifth of the latter.
    times = [100 * n for n in range(10)] + [1000 + 20 * n for n in range(30)]
    path = write(tmp_path / f"a.{suffix}", codec, num=40, times=times,
                 time_base=Fraction(1, 1000), rate=50)  # fmt: skip
    clip = ClipSpec(num_pixel_frames=16, size=(96, 128), fps=10, dtype=torch.uint8)
    video = decode_file(path, clip).permute(1, 2, 3, 0).numpy()
    assert [number_of(image) for image in video] == [*range(11), 15, 20, 25, 30, 35]


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264"), ("webm", "libvpx-vp9")])
def test_a_higher_rate_repeats_what_is_shown(tmp_path, suffix, codec):
    path = write(tmp_path / f"a.{suffix}", codec)
    clip = ClipSpec(num_pixel_frames=9, size=(96, 128), fps=60, start=3, dtype=torch.uint8)
    video = decode_file(path, clip).permute(1, 2, 3, 0).numpy()
    assert [number_of(image) for image in video] == [1, 1, 2, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("start", [0, 1, 37, 88])
@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "libx264"), ("mkv", "libx265"), ("ts", "libx264"),
                          ("webm", "libvpx-vp9"), ("avi", "mpeg4")]
)  # fmt: skip
def test_any_start_of_a_long_file_is_found(tmp_path_factory, suffix, codec, start):
    path = tmp_path_factory.getbasetemp() / f"long-{codec}.{suffix}"
    if not path.exists():
        write(path, codec, num=100, options={"g": "30", "bf": "2"} if codec != "libvpx-vp9" else {})
    reference = by_pyav(path)
    clip = ClipSpec(num_pixel_frames=3, size=(96, 128), start=start, stride=4, dtype=torch.uint8)
    video = decode_file(path, clip).permute(1, 2, 3, 0).numpy()
    assert psnr(video, reference[start : start + 9 : 4]) >= 40
    assert [number_of(image) for image in video] == [start, start + 4, start + 8]


def test_ten_bits_are_shown_in_eight(tmp_path):
    path = write(tmp_path / "a.mp4", pix_fmt="yuv420p10le", matrix=9, colour_range=1)
    file = probe_file(path, CLIP)
    assert (file.pixel_format, file.matrix) == ("yuv420p10le", 9)
    video = decode_file(path, CLIP).permute(1, 2, 3, 0).numpy()
    assert psnr(video, by_pyav(path)[:8]) >= 40


def test_a_picture_in_a_sound_file_is_no_video(tmp_path):
    cover = write(tmp_path / "cover.avi", "mjpeg", pix_fmt="yuvj420p", num=1)
    with av.open(str(cover)) as container:
        (packet, *_) = container.demux(video=0)
        picture = bytes(packet)
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=44100)
        image = container.add_stream("mjpeg", rate=25)
        image.width, image.height, image.pix_fmt = 128, 96, "yuvj420p"
        image.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 44100, 0
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
        packet = av.Packet(picture)
        packet.stream, packet.pts, packet.dts = image, 0, 0
        container.mux(packet)
    with pytest.raises(ValueError, match="no video stream in it"):
        probe_file(path, ClipSpec(num_pixel_frames=1, size=(8, 8)))


def test_a_decoder_that_dies_of_a_file_takes_nothing_with_it(tmp_path, monkeypatch, caplog):
    write(tmp_path / "a.mp4")
    write(tmp_path / "deadly.mp4")
    write(tmp_path / "z.mp4")
    deadly_to_probe(monkeypatch, "segfault")
    with caplog.at_level(logging.WARNING):
        pipeline = pipeline_of(tmp_path)
    assert [file.name for file in pipeline.report.good] == ["a.mp4", "z.mp4"]
    assert skipped(tmp_path) == {"deadly.mp4": "the decoder died of SIGSEGV"}
    assert load_videos(pipeline).shape == (2, 3, 8, 96, 128)
    monkeypatch.undo()
    assert len(pipeline_of(tmp_path)) == 3, "a death is not remembered"


def deadly_to_probe(monkeypatch, how: str) -> None:
    """Makes the process that probes deadly.mp4 die of a signal, or hang, for real."""
    ask = workers.Worker.ask

    def spoiled(self, request, patience_s):
        if "deadly" in request["path"] and how == "segfault":
            os.kill(self._process.pid, signal.SIGSEGV)
            self._process.wait()
        if "deadly" in request["path"] and how == "hang":
            os.kill(self._process.pid, signal.SIGSTOP)
            patience_s = 0.3
        return ask(self, request, patience_s)

    monkeypatch.setattr(workers.Worker, "ask", spoiled)


def test_a_decoder_that_dies_in_the_middle_of_a_run_costs_one_file(tmp_path, monkeypatch):
    for name in ("a.mp4", "deadly.mp4", "z.mp4"):
        write(tmp_path / name)
    pipeline = pipeline_of(tmp_path, batch_size=3)
    deadly_to_probe(monkeypatch, "segfault")
    stream = pipeline.batches()
    for _ in range(3):
        batch = next(stream)
        assert len(batch.video_BCFHW) == 3
        assert set(batch.index_B.tolist()) <= {0, 2}
    stream.close()
    assert skipped(tmp_path) == {"deadly.mp4": "the decoder died of SIGSEGV"}


def test_a_decoder_that_hangs_is_stopped(tmp_path, monkeypatch):
    write(tmp_path / "a.mp4")
    write(tmp_path / "deadly.mp4")
    deadly_to_probe(monkeypatch, "hang")
    assert [file.name for file in pipeline_of(tmp_path).report.good] == ["a.mp4"]
    assert "said nothing for 0 s" in skipped(tmp_path)["deadly.mp4"]


def test_what_a_worker_prints_and_its_death_between_files_do_no_harm(tmp_path):
    path = write(tmp_path / "a.mp4")
    pool = workers.Workers(1)
    size = path.stat().st_size
    first = pool.probe(path, 0, size, decode=True)
    (worker,) = [pool._idle.get()]
    os.kill(worker._process.pid, signal.SIGKILL)
    pool._idle.put(worker)
    with pytest.raises(workers.DecoderDied, match="SIGKILL"):
        pool.probe(path, 0, size, decode=True)
    assert pool.probe(path, 0, size, decode=True) == first
    assert pool.deaths == 1
    pool.close()


def test_a_file_that_fails_after_a_good_probe_is_replaced_by_the_same_one_everywhere(tmp_path):
    for number in range(8):
        write(tmp_path / f"{number}.mp4")
    pipeline_of(tmp_path)  # remembers all as good
    spoil_behind_the_caches_back(tmp_path / "3.mp4")

    def seen(rank, world_size):
        pipeline = pipeline_of(tmp_path, batch_size=8 // world_size, seed=4, rank=rank,
                               world_size=world_size, shuffle=True, max_bad=0.2)  # fmt: skip
        stream = pipeline.batches()
        rows = [next(stream).index_B.tolist() for _ in range(3)]
        stream.close()
        return rows

    whole = seen(0, 1)
    assert all(3 not in rows and len(rows) == 8 for rows in whole)
    halves = [seen(rank, 2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    assert "3.mp4" in skipped(tmp_path)


def test_too_many_files_that_fail_late_stop_the_run(tmp_path):
    for number in range(4):
        write(tmp_path / f"{number}.mp4")
    pipeline_of(tmp_path)
    for number in (1, 2):
        spoil_behind_the_caches_back(tmp_path / f"{number}.mp4")
    with pytest.raises(ValueError, match=r"2 of 4 videos cannot be used: .*max_bad 0\.3"):
        list(pipeline_of(tmp_path, max_bad=0.3).epoch())
    with pytest.raises(ValueError, match=r"2 videos were probed but not decoded"):
        load_videos(pipeline_of(tmp_path, max_bad=0.5))


def spoil_behind_the_caches_back(path: Path) -> None:
    stat = path.stat()
    path.write_bytes(bytes(stat.st_size))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_probe_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    for name in ("a.mp4", "b.mp4"):
        write(tmp_path / name)
    (tmp_path / "bad.mp4").write_bytes(b"x" * 99)
    asked = []
    run = workers.Workers.probe

    def counted(self, path, offset, size, *, decode):
        asked.append(path.name)
        return run(self, path, offset, size, decode=decode)

    monkeypatch.setattr(workers.Workers, "probe", counted)
    first = pipeline_of(tmp_path).report
    assert sorted(asked) == ["a.mp4", "b.mp4", "bad.mp4"]
    assert pipeline_of(tmp_path).report == first
    assert len(asked) == 3
    write(tmp_path / "b.mp4", num=9)
    with (tmp_path / probe.CACHE).open("a") as cache:
        cache.write('{"format": 1, "key": ["half')
    assert pipeline_of(tmp_path).report.good[1].num_pixel_frames == 9
    assert asked[3:] == ["b.mp4"]
    assert len(pipeline_of(tmp_path)) == 2
    assert len(asked) == 4, "what a torn line preceded is remembered too"


def test_a_data_set_that_cannot_be_written_to_is_used_without_a_cache(tmp_path, caplog):
    write(tmp_path / "a.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"x" * 99)
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        pipeline = pipeline_of(tmp_path, cache=tmp_path / "file" / "no folder")
    assert len(pipeline) == 1
    assert "probes are not kept" in caplog.text
    assert "no report of skipped videos" in caplog.text
    assert len(pipeline_of(tmp_path, cache=tmp_path / "elsewhere")) == 1
    assert (tmp_path / "elsewhere" / probe.CACHE).is_file()
    assert skipped(tmp_path / "elsewhere").keys() == {"bad.mp4"}


def test_members_of_shards_are_decoded_in_place_and_a_cut_shard_is_named(tmp_path):
    one = write(tmp_path / "one.webm", "libvpx-vp9", num=8).read_bytes()
    two = write(tmp_path / "two.mp4").read_bytes()
    folder = tmp_path / "shards"
    folder.mkdir()
    shard(folder / "s-0.tar", {"a.webm": one, "a.json": b'{"caption": "x"}', "b.mp4": two})
    whole = shard(folder / "s-1.tar", {"c.mp4": two, "d.mp4": two}).read_bytes()
    (folder / "s-1.tar").write_bytes(whole[: len(two) + 1024 + 2000])
    pipeline = pipeline_of(folder)
    assert [file.name for file in pipeline.report.good] == [
        "s-0.tar/a.webm", "s-0.tar/b.mp4", "s-1.tar/c.mp4"]  # fmt: skip
    (batch,) = pipeline.epoch()
    assert batch.segments == (((0, "x"),), (), ())
    for row in range(3):
        shown = [number_of(image) for image in batch.video_BCFHW[row].permute(1, 2, 3, 0).numpy()]
        assert shown == list(range(8))
    assert pipeline.decoder.decoded == {"native": 1, "frames": 2}
    assert sorted(path.name for path in folder.iterdir()) == [
        ".dali", ".probe.jsonl", "s-0.tar", "s-1.tar", "skipped.jsonl"]  # fmt: skip


def test_a_codec_that_dali_keeps_refusing_is_not_offered_again(tmp_path, monkeypatch, caplog):
    for number in range(6):
        write(tmp_path / f"{number}.mp4")
    monkeypatch.setattr("megatron_kvpo.data.graph.NATIVE_CODECS", {"cpu": frozenset({"h264"})})
    pipeline = pipeline_of(tmp_path, batch_size=2)
    assert sorted(i for batch in pipeline.epoch() for i in batch.index_B.tolist()) == list(range(6))
    assert caplog.text.count("DALI refuses") == 3
    assert pipeline.decoder.decoded == {"native": 0, "frames": 6}


def test_a_manifest_with_missing_files_counts_them(tmp_path):
    write(tmp_path / "a.mp4")
    manifest(tmp_path, [{"file": "a.mp4", "caption": "x"}, {"file": "gone.mp4"}])
    pipeline = pipeline_of(tmp_path)
    assert skipped(tmp_path) == {"gone.mp4": "no such file"}
    assert pipeline.report.good[0].num_pixel_frames == FRAMES
