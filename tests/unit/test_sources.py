"""Folders, manifests and shards: which videos they name, with which texts, and what is refused."""

import json

import pytest

from megatron_kvpo.data.sources import Segment, VideoSource, read_entries
from tests.unit.video_files import shard


def entries(path):
    return read_entries(VideoSource(path=path))


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_a_folder_without_manifest_is_searched_and_captions_stand_beside(tmp_path):
    touch(tmp_path, "b.mp4", "a/c.WEBM", "a/d.mov", ".hidden/e.mp4", "notes.md")
    (tmp_path / "b.txt").write_text(" a cat \n")
    (tmp_path / "a" / "d.json").write_text(json.dumps({"caption": "a dog"}))
    found = entries(tmp_path)
    assert [entry.name for entry in found] == ["a/c.WEBM", "a/d.mov", "b.mp4"]
    assert [entry.index for entry in found] == [0, 1, 2]
    assert [entry.segments for entry in found] == [
        (), (Segment(text="a dog"),), (Segment(text="a cat"),),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "segments"),
    [
        ({}, ()),
        ({"caption": "x"}, (Segment(text="x"),)),
        ({"text": "x"}, (Segment(text="x"),)),
        ({"segments": ["x"], "switch_frames": []}, (Segment(text="x"),)),
        (
            {"segments": ["x", "y"], "switch_frames": [9], "fps": 16},
            (Segment(text="x", unit="latent_frame"), Segment(text="y", start=9.0,
                                                             unit="latent_frame")),
        ),
        (
            {"segments": ["x", "y"], "switch_s": [1.5]},
            (Segment(text="x"), Segment(text="y", start=1.5)),
        ),
        (
            {"segments": ["x", "y"], "switch_pixel_frames": [33]},
            (Segment(text="x", unit="pixel_frame"), Segment(text="y", start=33.0,
                                                            unit="pixel_frame")),
        ),
        (
            {"segments": [{"text": "x"}, {"text": "y", "start_s": 2}, {"text": "z",
             "start_latent_frame": 21}]},
            (Segment(text="x"), Segment(text="y", start=2.0),
             Segment(text="z", start=21.0, unit="latent_frame")),
        ),
    ],
)  # fmt: skip
def test_a_line_gives_texts_and_where_they_begin(tmp_path, row, segments):
    (tmp_path / "list.jsonl").write_text(json.dumps({"file": "v/a.mp4", **row}) + "\n")
    (entry,) = entries(tmp_path / "list.jsonl")
    assert entry.path == tmp_path / "v" / "a.mp4"
    assert entry.segments == segments


def test_csv_rows_of_one_file_are_its_segments(tmp_path):
    (tmp_path / "manifest.csv").write_text(
        'file,caption,start_s\na.mp4,"a cat, asleep",0\na.mp4,it wakes,2.5\nb.mp4,a dog,\nc.mp4,,\n'
    )
    found = entries(tmp_path)
    assert [entry.name for entry in found] == ["a.mp4", "b.mp4", "c.mp4"]
    assert found[0].segments == (Segment(text="a cat, asleep"),
                                 Segment(text="it wakes", start=2.5))  # fmt: skip
    assert found[1].segments == (Segment(text="a dog"),)
    assert found[2].segments == ()


def test_shards_are_read_by_offset(tmp_path):
    shard(tmp_path / "s-00.tar", {"a.mp4": b"one", "a.json": b'{"caption": "x"}', "b.txt": b"y"})
    shard(tmp_path / "s-01.tar", {"d/b.txt": b"y\n", "d/b.v.mp4": b"three", "readme": b""})
    for path in (tmp_path, tmp_path / "s-*.tar", tmp_path / "s-{00..01}.tar"):
        found = entries(path)
        assert [entry.name for entry in found] == ["s-00.tar/a.mp4", "s-01.tar/d/b.mp4"]
        assert [entry.segments[0].text for entry in found] == ["x", "y"]
        for entry, content in zip(found, (b"one", b"three"), strict=True):
            data = entry.path.read_bytes()
            assert data[entry.offset : entry.offset + entry.size] == content
    assert [e.name for e in entries(tmp_path / "s-01.tar")] == ["s-01.tar/d/b.mp4"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.jsonl", '{"file": "a", "segments": "x"}', "line 1: 'segments' is 'x', not a list"),
        ("m.jsonl", '{"file": "a"}\n{"file": "b", "segments": ["x", "y"]}', "line 2: 2 segments"),
        ("m.jsonl", '{"file": "a", "segments": ["x", "y"], "switch_frames": ["9"]}', "not a list"),
        ("m.jsonl", '{"file": "a", "segments": [{"start_s": 1}]}', "has no 'text'"),
        ("m.jsonl", '{"file": "a", "segments": [{"text": "x", "start_s": "z"}]}', "no number"),
        (
            "m.jsonl",
            '{"file": "a", "segments": [{"text": "x", "start_s": 1, "start_pixel_frame": 2}]}',
            "begins twice",
        ),
        ("m.jsonl", '{"file": "a", "segments": ["x", "y", "z"], "switch_s": [3, 2]}', "must rise"),
        ("m.jsonl", '{"file": "a", "segments": ["x", "y"], "switch_s": [-3]}', "must rise"),
        ("m.jsonl", '["file"]', "line 1"),
        ("m.csv", "name\na.mp4\n", "without 'file'"),
        ("m.csv", "file,caption\n,x\n", "line 2: no file is named"),
        ("m.tar", "no tar at all", "no uncompressed tar file"),
        ("m.txt", "a.mp4", "give a folder, a .jsonl or .csv manifest, or .tar shards"),
    ],
)
def test_what_is_ill_formed_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        entries(tmp_path / name)


@pytest.mark.parametrize("name", ["nothing", "no.jsonl", "no-*.tar"])
def test_a_missing_source_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=name.replace("*", r"\*")):
        entries(tmp_path / name)


def test_a_shard_without_videos_and_a_folder_without_anything_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no manifest at"):
        entries(tmp_path)
    shard(tmp_path / "s.tar", {"a.txt": b"x"})
    with pytest.raises(ValueError, match="no video in 1 shards"):
        entries(tmp_path)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"max_bad 1\.5 is a share"):
        VideoSource(path="x", max_bad=1.5)
    with pytest.raises(ValueError, match="choose 'decode' or 'packets'"):
        VideoSource(path="x", check="all")
