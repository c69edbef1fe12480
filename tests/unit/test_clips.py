"""Which pixel frames, which size and which texts a clip has: by arithmetic, without decoding."""

from pathlib import Path

import numpy as np
import pytest

from megatron_kvpo import settings
from megatron_kvpo.data.clips import ClipSpec, Schedule, cut
from megatron_kvpo.data.probe import VideoFile
from megatron_kvpo.data.sources import Segment, VideoSource

SIZE = (8, 8)


def file_of(deltas, time_base=0.001, index=0, **values) -> VideoFile:
    values = {"height": 480, "width": 832, **values}
    return VideoFile(path=Path("x"), index=index, codec="h264", time_base=time_base, timed=True,
                     indexed=True, deltas=tuple(deltas), **values)  # fmt: skip


STEADY = file_of([(40, 99)])  # 100 pixel frames, 25 a second
VARIABLE = file_of([(100, 10), (20, 50)])  # 10 a second for a second, then 50 a second


def test_timestamps_are_unpacked():
    assert file_of([(100, 2), (50, 1)], first_pts=7).pts.tolist() == [7, 107, 207, 257]
    np.testing.assert_allclose(file_of([(100, 2), (50, 1)]).times_s, [0, 0.1, 0.2, 0.25, 0.3])


def test_without_fps_frames_are_counted():
    clip = cut(STEADY, ClipSpec(num_pixel_frames=4, size=SIZE, start=3, stride=5), 0, 0)
    assert clip.frames.tolist() == [3, 8, 13, 18]
    assert clip.start_s == pytest.approx(0.12)


def test_resampling_takes_what_is_shown_at_each_time():
    up = cut(STEADY, ClipSpec(num_pixel_frames=6, size=SIZE, fps=50), 0, 0)
    assert up.frames.tolist() == [0, 0, 1, 1, 2, 2]
    down = cut(STEADY, ClipSpec(num_pixel_frames=5, size=SIZE, fps=16), 0, 0)
    assert down.frames.tolist() == [0, 1, 3, 4, 6]  # 0, 62.5, 125, 187.5, 250 ms
    strided = cut(STEADY, ClipSpec(num_pixel_frames=3, size=SIZE, fps=16, stride=2), 0, 0)
    assert strided.frames.tolist() == [0, 3, 6]
    later = cut(STEADY, ClipSpec(num_pixel_frames=3, size=SIZE, fps=16, start=8), 0, 0)
    assert (later.start_s, later.frames.tolist()) == (0.5, [12, 14, 15])


def test_a_variable_rate_is_resampled_by_its_timestamps():
    clip = cut(VARIABLE, ClipSpec(num_pixel_frames=20, size=SIZE, fps=10), 0, 0)
    assert clip.frames.tolist() == [*range(11), *range(15, 60, 5)]


def test_timestamps_rounded_to_milliseconds_lose_no_frame():
    stamps = np.diff(np.round(np.arange(91) * 1000 / 30)).astype(int)
    file = file_of([(int(delta), 1) for delta in stamps])
    clip = cut(file, ClipSpec(num_pixel_frames=91, size=SIZE, fps=30), 0, 0)
    assert clip.frames.tolist() == list(range(91))


def test_seconds_are_a_number_of_pixel_frames():
    assert ClipSpec(seconds=5, fps=16, size=SIZE).num_pixel_frames == 80
    assert ClipSpec(seconds=5, fps=16, stride=2, size=SIZE).num_pixel_frames == 40


def test_random_starts_depend_on_seed_epoch_and_file_and_reach_all_that_fit():
    spec = ClipSpec(num_pixel_frames=98, size=SIZE, start="random")

    def starts(file, seed):
        return [int(cut(file, spec, seed, epoch).frames[0]) for epoch in range(40)]

    assert set(starts(STEADY, 0)) == {0, 1, 2}
    assert starts(STEADY, 0) == starts(STEADY, 0)
    assert starts(STEADY, 0) != starts(STEADY, 1)
    assert starts(STEADY, 0) != starts(file_of([(40, 99)], index=1), 0)


def test_random_starts_by_time_leave_room_for_the_clip():
    spec = ClipSpec(num_pixel_frames=16, size=SIZE, fps=10, start="random")
    found = {int(cut(VARIABLE, spec, 0, epoch).frames[0]) for epoch in range(200)}
    assert found == set(range(6))  # the last shown time, 1.5 s later, must lie before 2.02 s
    late = max(found)
    assert cut(VARIABLE, spec, 0, 0).frames.max() <= 60
    assert late == 5


TEXTS = (Segment(text="a"), Segment(text="b", start=1.0), Segment(text="c", start=75,
         unit="pixel_frame"), Segment(text="d", start=30, unit="latent_frame"))  # fmt: skip
CAPTIONED = file_of([(40, 199)], segments=TEXTS)  # d begins at pixel frame 117, 4.68 s


def test_texts_come_with_the_pixel_frame_of_the_clip_where_they_begin():
    whole = cut(CAPTIONED, ClipSpec(num_pixel_frames=200, size=SIZE), 0, 0)
    assert whole.segments == ((0, "a"), (25, "b"), (75, "c"), (117, "d"))
    part = cut(CAPTIONED, ClipSpec(num_pixel_frames=40, size=SIZE, start=30, stride=2), 0, 0)
    assert part.segments == ((0, "b"), (23, "c"))
    slow = cut(CAPTIONED, ClipSpec(num_pixel_frames=81, size=SIZE, fps=16), 0, 0)
    assert slow.segments == ((0, "a"), (16, "b"), (48, "c"), (75, "d"))
    assert cut(STEADY, ClipSpec(num_pixel_frames=4, size=SIZE), 0, 0).segments == ()


def test_before_the_first_text_there_is_none_and_a_text_of_no_frame_is_dropped():
    late = file_of([(40, 99)], segments=(Segment(text="x", start=1), Segment(text="y", start=1.01)))
    clip = cut(late, ClipSpec(num_pixel_frames=50, size=SIZE), 0, 0)
    assert clip.segments == ((0, ""), (25, "x"), (26, "y"))
    strided = cut(late, ClipSpec(num_pixel_frames=9, size=SIZE, stride=10), 0, 0)
    assert strided.segments == ((0, ""), (3, "y"))


def test_scene_clips_begin_where_a_segment_does_and_fit():
    spec = ClipSpec(num_pixel_frames=100, size=SIZE, start="scene")
    clips = [cut(CAPTIONED, spec, 0, epoch) for epoch in range(40)]
    assert {int(clip.frames[0]) for clip in clips} == {0, 25, 75}
    assert {clip.segments[0] for clip in clips} == {(0, "a"), (0, "b"), (0, "c")}
    assert spec.fault(CAPTIONED) is None
    long = ClipSpec(num_pixel_frames=100, size=SIZE, start="scene")
    only_late = file_of([(40, 199)], segments=(Segment(text="x", start=5.0),))
    assert long.fault(only_late) == "no segment is long enough before the file ends"


def test_files_that_are_too_short_are_named_by_what_they_lack():
    assert ClipSpec(num_pixel_frames=101, size=SIZE).fault(STEADY) == (
        "too short: 100 pixel frames, 101 needed"
    )
    assert ClipSpec(num_pixel_frames=100, size=SIZE).fault(STEADY) is None
    assert ClipSpec(num_pixel_frames=64, size=SIZE, fps=16).fault(STEADY) is None
    assert ClipSpec(num_pixel_frames=65, size=SIZE, fps=16).fault(STEADY) == (
        "too short: 4.000 s, more than 4.000 s needed"
    )


def test_a_file_goes_to_the_bucket_of_its_proportions():
    spec = ClipSpec(num_pixel_frames=1, buckets=((480, 832), (832, 480), (640, 640), (240, 416)))
    assert spec.size_of(file_of([(1, 1)], height=720, width=1280)) == (480, 832)
    assert spec.size_of(file_of([(1, 1)], height=1920, width=1080)) == (832, 480)
    assert spec.size_of(file_of([(1, 1)], height=500, width=520)) == (640, 640)
    assert spec.size_of(file_of([(1, 1)], height=300, width=533)) == (240, 416)
    assert spec.size_of(file_of([(1, 1)], height=720, width=720, sample_aspect=16 / 9)) == (
        480, 832)  # fmt: skip


def test_what_is_shown_covers_the_size_in_the_middle():
    spec = ClipSpec(num_pixel_frames=1, size=(100, 100))
    assert cut(file_of([(1, 1)], height=200, width=400), spec, 0, 0).roi == ((0, 100), (200, 300))
    assert cut(file_of([(1, 1)], height=400, width=200), spec, 0, 0).roi == ((100, 0), (300, 200))
    oblong = file_of([(1, 1)], height=200, width=200, sample_aspect=2.0)
    assert cut(oblong, spec, 0, 0).roi == ((0, 50), (200, 150))


def test_a_recipe_can_hold_the_settings():
    read = {"buckets": [[8, 16], [16, 8]], "seconds": 2, "fps": 8, "start": "scene"}
    assert settings.from_mapping(ClipSpec, read) == ClipSpec(
        num_pixel_frames=16, buckets=((8, 16), (16, 8)), fps=8.0, start="scene"
    )
    read = {"path": "videos", "max_bad": 0, "check": "packets", "cache": "elsewhere"}
    source = settings.from_mapping(VideoSource, read)
    assert (source.report_path, source.max_bad) == (Path("elsewhere/skipped.jsonl"), 0.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_pixel_frames": 0, "size": SIZE}, "above 0"),
        ({"num_pixel_frames": 1}, "either a size or buckets"),
        ({"num_pixel_frames": 1, "size": SIZE, "buckets": (SIZE,)}, "either a size or buckets"),
        ({"num_pixel_frames": 1, "buckets": ((8, 0),)}, "above 0"),
        ({"num_pixel_frames": 1, "size": SIZE, "start": -1}, "from 0 on"),
        ({"num_pixel_frames": 1, "size": SIZE, "start": "late"}, "'late'"),
        ({"num_pixel_frames": 1, "size": SIZE, "fps": 0}, "fps 0 must be above 0"),
        ({"seconds": 2, "size": SIZE}, "`seconds` stands with fps"),
        ({"seconds": 2, "fps": 8, "num_pixel_frames": 3, "size": SIZE}, "not with num_pixel"),
    ],
)
def test_settings_that_contradict_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ClipSpec(**values)


def test_buckets_take_turns_by_their_number_of_files_and_leave_none_out():
    buckets = [0] * 7 + [1] * 4 + [2]
    schedule = Schedule(buckets, batch=3, seed=5, shuffle=True)
    steps = [schedule.step(step) for step in range(36)]
    for rows in steps:
        assert len({buckets[file] for file, _ in rows}) == 1
    turns = [buckets[rows[0][0]] for rows in steps]
    for start in (0, 12, 24):
        assert np.bincount(turns[start : start + 12]).tolist() == [7, 4, 1]
    assert max(np.diff(np.flatnonzero(np.array(turns) == 1))) <= 4, "evenly spread"
    for bucket, size in enumerate([7, 4, 1]):
        rows = [row for step in steps for row in step if buckets[row[0]] == bucket]
        for epoch in range(len(rows) // size):
            files = [file for file, of in rows[epoch * size : (epoch + 1) * size] if of == epoch]
            assert sorted(files) == np.flatnonzero(np.array(buckets) == bucket).tolist()


def test_a_step_needs_no_step_before_it():
    buckets = [0, 1, 0, 0, 1, 0, 1]
    ahead = Schedule(buckets, batch=2, seed=1, shuffle=True)
    straight = [ahead.step(step) for step in range(30)]
    for step in (29, 3, 17, 0, 14):
        assert Schedule(buckets, batch=2, seed=1, shuffle=True).step(step) == straight[step]
        assert ahead.step(step) == straight[step]


def test_an_epoch_uses_each_file_once_in_batches_of_one_bucket():
    buckets = [0, 1, 0, 0, 1, 0, 1]
    steps = Schedule(buckets, batch=2, seed=1, shuffle=True).epoch(3)
    assert sorted(file for step in steps for file in step) == list(range(7))
    assert all(len({buckets[file] for file in step}) == 1 for step in steps)
    assert sorted(len(step) for step in steps) == [1, 2, 2, 2]
