"""The shapes world: its grammar, its motions and its pictures."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from megatron_kvpo.world import (
    AREAS,
    BACKGROUND,
    COLOURS,
    GRID,
    MOTIONS,
    SHAPES,
    SPEEDS,
    STILL,
    WORDS,
    Scene,
    SegmentSpec,
    SpriteState,
    bounds,
    caption,
    coverage,
    parse_captions,
    pixel_start,
    positions,
    render,
    sample_scene,
)

SEEDS = range(150)
SWITCHES = (21, 45, 57)


def scene_of(sprite: SpriteState, origin: tuple[float, float], num_frames: int = 81) -> Scene:
    return Scene(segments=(SegmentSpec(sprites=(sprite,)),), starts=(0,), origins=(origin,),
                 num_pixel_frames=num_frames)  # fmt: skip


def sprite(motion: str, speed: str = "", shape: str = "square", colour: str = "red") -> SpriteState:
    return SpriteState(shape=shape, colour=colour, motion=motion, speed=speed)


def test_captions_read_back_to_the_scene_they_tell() -> None:
    for seed in SEEDS:
        scene = sample_scene(seed, 81, SWITCHES)
        assert parse_captions(scene.captions) == list(scene.segments)


def test_every_single_sprite_sentence_reads_back() -> None:
    for shape, colour, motion, speed in itertools.product(SHAPES, COLOURS, MOTIONS, SPEEDS):
        if motion != STILL or not speed:
            segment = SegmentSpec(sprites=(sprite(motion, speed, shape, colour),))
            assert parse_captions(caption([segment])) == [segment]


def test_captions_say_what_changes() -> None:
    square = sprite("moves right", "slowly")
    circle = sprite("falls", shape="circle", colour="green")
    turned = replace(square, colour="blue", motion="falls", speed="")
    alone = [SegmentSpec(sprites=(square,)), SegmentSpec(sprites=(turned,))]
    assert caption(alone) == ["a red square moves right slowly", "it turns blue and falls"]
    both = [SegmentSpec(sprites=(square, circle)),
            SegmentSpec(sprites=(replace(square, colour="blue"),
                                 replace(circle, motion="rises", speed="quickly")))]  # fmt: skip
    assert caption(both) == [
        "a red square moves right slowly and a green circle falls",
        "the square turns blue and the circle rises quickly",
    ]


def test_nothing_to_tell_is_refused() -> None:
    segment = SegmentSpec(sprites=(sprite("falls"),))
    with pytest.raises(ValueError, match="changes nothing"):
        caption([segment, segment])
    with pytest.raises(ValueError, match="shape"):
        caption([segment, SegmentSpec(sprites=(sprite("falls", shape="circle"),))])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a red sqare falls"], "'sqare'.*did you mean 'square'"),
        (["a crimson square falls"], "'crimson'"),
        (["it falls"], "cannot read 'it falls'"),
        (["a red square"], "cannot read"),
        (["a square red falls"], "cannot read"),
        (["a red square stays still quickly"], "cannot read"),
        (["a red square falls", "the circle rises"], "cannot read"),
        (["a red square falls", "it turns"], "cannot read"),
        (["a red square falls", "rises"], "cannot read"),
        (["a red square falls", "a blue circle falls"], "cannot read"),
        (["a red square falls and a blue circle rises", "it falls"], "cannot read"),
        ([""], "cannot read"),
    ],
)
def test_what_the_grammar_does_not_hold_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_captions(texts)


def test_the_vocabulary_is_closed_and_sorted() -> None:
    used = {word for seed in SEEDS for text in sample_scene(seed, 81, SWITCHES).captions
            for word in text.split()}  # fmt: skip
    assert used == set(WORDS)
    assert list(WORDS) == sorted(set(WORDS))


def test_a_state_outside_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match="'hexagon' is unknown"):
        sprite("falls", shape="hexagon")
    with pytest.raises(ValueError, match="no speed"):
        sprite(STILL, "slowly")


@pytest.mark.parametrize(("latent", "pixel"), [(0, 0), (1, 1), (2, 5), (3, 9), (21, 81)])
def test_pixel_frames_of_latent_frames(latent: int, pixel: int) -> None:
    assert pixel_start(latent) == pixel


@pytest.mark.parametrize("speed", list(SPEEDS))
@pytest.mark.parametrize("motion", ["moves left", "moves right", "rises", "falls"])
def test_a_sprite_goes_the_asked_way_and_stops_at_the_wall(motion: str, speed: str) -> None:
    state = sprite(motion, speed)
    path = positions(scene_of(state, (16.0, 16.0)))[0]
    way, wall = np.array(MOTIONS[motion]), bounds("square")[int(motion in ("rises", "falls"))]
    np.testing.assert_allclose(path[10] - path[0], 10 * SPEEDS[speed] * way, atol=1e-12)
    if speed != "slowly":
        assert abs(path[-1] @ np.abs(way) - wall[int(way.sum() > 0)]) < 1e-9
        np.testing.assert_allclose(path[-1], path[-2])


def test_a_medium_motion_crosses_in_about_60_pixel_frames() -> None:
    for low, high in (axis for shape in SHAPES for axis in bounds(shape)):
        assert 48 <= (high - low) / SPEEDS[""] <= 65


def test_a_bouncing_sprite_turns_at_both_walls() -> None:
    path = positions(scene_of(sprite("bounces sideways", "quickly"), (20.0, 10.0), 200))[0]
    (low, high), _ = bounds("square")
    assert path[1, 0] < path[0, 0]  # towards the farther wall
    assert path[:, 0].min() >= low
    assert path[:, 0].max() <= high
    assert path[:, 0].max() > high - 0.8
    assert (path[:, 1] == 10).all()
    steps = np.abs(np.diff(path[:, 0]))
    assert (steps > 0.8 - 1e-9).mean() > 0.9
    assert (np.diff(np.sign(np.diff(path[:, 0]))) != 0).sum() >= 5


def test_a_segment_governs_the_step_into_its_first_frame() -> None:
    first, second = sprite("moves right"), sprite("rises")
    scene = Scene(segments=(SegmentSpec(sprites=(first,)), SegmentSpec(sprites=(second,))),
                  starts=(0, 5), origins=((8.0, 16.0),), num_pixel_frames=9)  # fmt: skip
    np.testing.assert_allclose(positions(scene)[0, 4], [8 + 4 * 0.4, 16])
    np.testing.assert_allclose(positions(scene)[0, 5], [8 + 4 * 0.4, 16 - 0.4])


def test_a_bounce_that_only_changes_its_speed_keeps_its_way() -> None:
    first, second = sprite("bounces sideways"), sprite("bounces sideways", "slowly")
    scene = Scene(segments=(SegmentSpec(sprites=(first,)), SegmentSpec(sprites=(second,))),
                  starts=(0, 40), origins=((10.0, 16.0),), num_pixel_frames=60)  # fmt: skip
    steps = np.diff(positions(scene)[0, :, 0])
    assert np.sign(steps[38]) == np.sign(steps[39])


def test_the_same_seed_gives_the_same_scene_and_others_differ() -> None:
    assert sample_scene(4, 81, (33,)) == sample_scene(4, 81, (33,))
    scenes = [sample_scene(seed, 81, (33,)) for seed in SEEDS]
    assert len(set(scenes)) == len(scenes)


def test_sampled_scenes_keep_the_rules() -> None:
    counts = []
    for seed in SEEDS:
        scene = sample_scene(seed, 81, SWITCHES)
        path = positions(scene)
        counts.append(len(path))
        for index, state in enumerate(scene.segments[0].sprites):
            for axis, (low, high) in enumerate(bounds(state.shape)):
                assert low - 1e-9 <= path[index, :, axis].min()
                assert path[index, :, axis].max() <= high + 1e-9
            way = np.array(MOTIONS[state.motion])
            if not state.bounces and way.any():
                assert (path[index, 20] - path[index, 0]) @ way > 3.9
        for segment in scene.segments:
            assert len({s.colour for s in segment.sprites}) == len(segment.sprites)
            assert len({s.shape for s in segment.sprites}) == len(segment.sprites)
        covers = [coverage(s.shape, path[i, :1])[0] for i, s in
                  enumerate(scene.segments[0].sprites)]  # fmt: skip
        assert len(covers) == 1 or (covers[0] * covers[1]).sum() == 0
    assert 30 < counts.count(2) < 90


def test_bad_switch_frames_are_refused() -> None:
    for switches in ((0,), (40, 40), (81,)):
        with pytest.raises(ValueError, match="switch frames"):
            sample_scene(0, 81, switches)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [32, 64])
def test_a_sprite_covers_its_area_around_its_centroid(shape: str, size: int) -> None:
    centres = np.array([[16.0, 15.0], [15.3, 16.2], [12.55, 18.7]])
    grid = (np.arange(size) + 0.5) * GRID / size
    for centre, cover in zip(centres, coverage(shape, centres, size), strict=True):
        assert cover.min() >= 0
        assert cover.max() <= 1
        assert cover.sum() * (GRID / size) ** 2 == pytest.approx(AREAS[shape], rel=0.03)
        mean = np.array([cover.sum(0) @ grid, cover.sum(1) @ grid]) / cover.sum()
        np.testing.assert_allclose(mean, centre, atol=0.06)


def test_a_frame_shows_ground_and_full_colour() -> None:
    frames = render(scene_of(sprite(STILL, shape="cross", colour="cyan"), (16.0, 16.0), 2))
    assert frames.shape == (2, 32, 32, 3)
    assert frames.dtype == np.uint8
    assert tuple(frames[0, 0, 0]) == BACKGROUND
    assert tuple(frames[0, 16, 16]) == COLOURS["cyan"]


def test_a_sprite_turns_at_the_first_pixel_frame_of_the_segment() -> None:
    first, second = sprite(STILL), sprite(STILL, colour="blue")
    scene = Scene(segments=(SegmentSpec(sprites=(first,)), SegmentSpec(sprites=(second,))),
                  starts=(0, 9), origins=((16.0, 16.0),), num_pixel_frames=12)  # fmt: skip
    frames = render(scene)
    assert tuple(frames[8, 16, 16]) == COLOURS["red"]
    assert tuple(frames[9, 16, 16]) == COLOURS["blue"]


def test_colours_are_well_apart() -> None:
    points = np.array([BACKGROUND, *COLOURS.values()], dtype=float)
    for a, b in itertools.combinations(points, 2):
        assert np.linalg.norm(a - b) >= 150
