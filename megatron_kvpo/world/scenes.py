"""What is seen in the shapes world: scenes, how their sprites move, and how they are drawn.

Geometry is in units of 1/32 of the picture's side, x to the right, y down; at the default size a
unit is a pixel. Speeds are units per pixel frame.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kvpo.world.captions import (
    COLOURS,
    MOTIONS,
    PLACES,
    SHAPES,
    SPEEDS,
    STILL,
    SegmentSpec,
    SpriteState,
    caption,
    parse_captions,
)

Floats = NDArray[np.float32]

GRID = 32.0
PIXEL_FPS = 16
BACKGROUND = (16, 16, 24)

_EXTENTS = {
    "square": (4.0, 4.0, 4.0),
    "circle": (4.5, 4.5, 4.5),
    "triangle": (5.5, 20 / 3, 10 / 3),
    "cross": (5.0, 5.0, 5.0),
}  # half width, reach upwards and downwards from the centroid
_CROSS_HALF_ARM = 1.75
AREAS = {"square": 64.0, "circle": np.pi * 4.5**2, "triangle": 55.0, "cross": 57.75}
"""Square units that a sprite covers."""

_WALL_MARGIN = 0.5
_SHORTEST_TRIP = 6.0  # room a newly asked motion needs, so that it can be seen
_PLACE_SPREAD = 1.0  # units that an origin may lie off the place that its caption names
_MAX_TRIES = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A whole video: what is asked, when, and where the sprites begin."""

    segments: tuple[SegmentSpec, ...]
    starts: tuple[int, ...]
    """First pixel frame of each segment; the first is 0."""

    origins: tuple[tuple[float, float], ...]
    """Centroid (x, y) of each sprite in pixel frame 0."""

    num_pixel_frames: int

    @property
    def captions(self) -> list[str]:
        """One text per segment."""
        return caption(self.segments)


def pixel_start(latent_frame: int) -> int:
    """First pixel frame of a latent frame, which is also how many pixel frames come before it."""
    return 0 if latent_frame == 0 else 4 * latent_frame - 3


def bounds(shape: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """((lowest x, highest x), (lowest y, highest y)) of a sprite's centroid between the walls."""
    half, up, down = _EXTENTS[shape]
    return (
        (half + _WALL_MARGIN, GRID - half - _WALL_MARGIN),
        (up + _WALL_MARGIN, GRID - down - _WALL_MARGIN),
    )


def positions(scene: Scene) -> NDArray[np.float64]:
    """Centroid of each sprite in each pixel frame: [sprites, pixel frames, (x, y)].

    The step into pixel frame f follows the segment of f.
    """
    stops = [*scene.starts[1:], scene.num_pixel_frames]
    paths = []
    for index, origin in enumerate(scene.origins):
        walker = _Walker(origin)
        for segment, start, stop in zip(scene.segments, scene.starts, stops, strict=True):
            walker.follow(segment.sprites[index], stop - max(start, 1))
        paths.append(walker.path())
    return np.stack(paths)


class _Walker:
    """One sprite's way through the segments."""

    def __init__(self, origin: tuple[float, float]) -> None:
        self._pieces = [np.array([origin])]
        self._motion = ""
        self._sign = 1.0

    @property
    def here(self) -> NDArray[np.float64]:
        return np.asarray(self._pieces[-1][-1])

    def path(self) -> NDArray[np.float64]:
        return np.concatenate(self._pieces)

    def follow(self, sprite: SpriteState, num_frames: int) -> None:
        """Walk `num_frames` steps as asked; a bounce begins towards the farther wall.

        From about the middle it begins to the right or downwards.
        """
        axes = bounds(sprite.shape)
        steps = np.arange(1, num_frames + 1)
        piece = np.tile(self.here, (num_frames, 1))
        for axis, speed in enumerate(sprite.velocity):
            low, high = axes[axis]
            at = self.here[axis]
            if not sprite.bounces:
                piece[:, axis] = np.clip(at + speed * steps, low, high)
            elif speed:
                if sprite.motion != self._motion:
                    self._sign = 1.0 if high - at + 4 * _PLACE_SPREAD >= at - low else -1.0
                width = high - low
                phase = (at - low) if self._sign > 0 else 2 * width - (at - low)
                phases = (phase + speed * steps) % (2 * width)
                piece[:, axis] = low + np.minimum(phases, 2 * width - phases)
                if num_frames:
                    self._sign = 1.0 if phases[-1] <= width else -1.0
        self._motion = sprite.motion
        if num_frames:
            self._pieces.append(piece)


def sample_scene(
    seed: int, num_pixel_frames: int, switch_frames_pixel: Sequence[int] = ()
) -> Scene:
    """Draw a scene of one or two sprites; the same seed gives the same scene.

    Two sprites differ in shape and colour, do not overlap at the start and, where the draw
    allows it, at no time. Asked motions have room to be seen.
    """
    starts = (0, *switch_frames_pixel)
    if any(b <= a for a, b in itertools.pairwise((*starts, num_pixel_frames))):
        raise ValueError(
            f"switch frames {tuple(switch_frames_pixel)} must rise and lie inside "
            f"(0, {num_pixel_frames})"
        )
    rng = np.random.default_rng(seed)
    num_sprites = 1 + int(rng.random() < 0.4)
    fallback = None
    for _ in range(_MAX_TRIES):
        scene = _draw_scene(rng, num_sprites, starts, num_pixel_frames)
        apart = _apart(scene)
        if apart.all():
            return scene
        if apart[0]:
            fallback = fallback or scene
    return fallback or _draw_scene(rng, 1, starts, num_pixel_frames)


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _apart(scene: Scene) -> NDArray[np.bool_]:
    """Per pixel frame, whether the sprites' boxes are a unit apart or more."""
    path = positions(scene)
    if len(path) == 1:
        return np.ones(scene.num_pixel_frames, dtype=bool)
    first, second = (_EXTENTS[s.shape] for s in scene.segments[0].sprites)
    dx, dy = (path[1] - path[0]).T
    gap_y = np.where(dy > 0, dy - second[1] - first[2], -dy - first[1] - second[2])
    return np.asarray((np.abs(dx) - first[0] - second[0] >= 1) | (gap_y >= 1))


def _draw_scene(
    rng: np.random.Generator, num_sprites: int, starts: tuple[int, ...], num_pixel_frames: int
) -> Scene:
    shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:num_sprites]]
    colours = [list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:num_sprites]]
    sprites, walkers = [], []
    for shape, colour in zip(shapes, colours, strict=True):
        motion, speed = _draw_action(rng, list(MOTIONS))
        place = _draw_place(rng, motion)
        sprites.append(
            SpriteState(shape=shape, colour=colour, motion=motion, speed=speed, place=place)
        )
        walkers.append(_Walker(_draw_origin(rng, sprites[-1])))
    origins = tuple((float(w.here[0]), float(w.here[1])) for w in walkers)
    segments = []
    for start, stop in itertools.pairwise((*starts, num_pixel_frames)):
        if start:
            sprites = _draw_changes(rng, sprites, walkers)
        segments.append(SegmentSpec(sprites=tuple(sprites)))
        for sprite, walker in zip(sprites, walkers, strict=True):
            walker.follow(sprite, stop - max(start, 1))
    return Scene(segments=tuple(segments), starts=starts, origins=origins,
                 num_pixel_frames=num_pixel_frames)  # fmt: skip


def _draw_action(rng: np.random.Generator, motions: Sequence[str]) -> tuple[str, str]:
    motion = _pick(rng, motions)
    return motion, "" if motion == STILL else _pick(rng, list(SPEEDS))


def _draw_place(rng: np.random.Generator, motion: str) -> str:
    """Any place, but a sprite that moves one way begins at the side it moves away from."""
    x, y = (0 if motion.startswith("bounces") else way for way in MOTIONS[motion])
    places = [p for p, at in PLACES.items() if _begins(at[0], x) and _begins(at[1], y)]
    return _pick(rng, places)


def _begins(share: float, way: int) -> bool:
    return way == 0 or share == (0.0 if way > 0 else 1.0)


def _draw_origin(rng: np.random.Generator, sprite: SpriteState) -> tuple[float, float]:
    """Near the sprite's place, between the walls."""
    point = []
    for (low, high), share in zip(bounds(sprite.shape), PLACES[sprite.place], strict=True):
        off = _PLACE_SPREAD * (2 * rng.random() - 1)
        point.append(float(np.clip(low + share * (high - low) + off, low, high)))
    return point[0], point[1]


def _draw_changes(
    rng: np.random.Generator, sprites: list[SpriteState], walkers: list[_Walker]
) -> list[SpriteState]:
    changed = list(sprites)
    chosen = set(rng.permutation(len(sprites))[: int(rng.integers(1, len(sprites) + 1))].tolist())
    for index in sorted(chosen):
        sprite, kind = sprites[index], rng.random()
        fields: dict[str, Any] = {}
        if kind > 0.45:
            free = [c for c in COLOURS if all(c != s.colour for s in changed)]
            fields["colour"] = _pick(rng, free)
        if kind < 0.8:
            motions = [m for m in MOTIONS if _has_room(sprite.shape, m, walkers[index].here)]
            action = (sprite.motion, sprite.speed)
            while action == (sprite.motion, sprite.speed):
                action = _draw_action(rng, motions)
            fields["motion"], fields["speed"] = action
        changed[index] = replace(sprite, **fields)
    return changed


def _has_room(shape: str, motion: str, at: NDArray[np.float64]) -> bool:
    """Whether a sprite at `at` could be seen to follow `motion`."""
    if motion == STILL or motion.startswith("bounces"):
        return True
    return all(
        (high - x if way > 0 else x - low) >= _SHORTEST_TRIP
        for (low, high), x, way in zip(bounds(shape), at, MOTIONS[motion], strict=True)
        if way
    )


def coverage(shape: str, centre_N2: NDArray[Any], size: int = 32) -> Floats:
    """Share of each pixel that a sprite covers, [N, size, size] in [0, 1], edges anti-aliased.

    Args:
        shape: one of SHAPES.
        centre_N2: centroids (x, y) in units.
        size: pixels of a side.
    """
    scale = size / GRID
    grid = (np.arange(size, dtype=np.float32) + 0.5) / scale
    centre = np.asarray(centre_N2, dtype=np.float32)
    dx = (grid[None, :] - centre[:, :1])[:, None, :]
    dy = (grid[None, :] - centre[:, 1:])[:, :, None]

    def inside(distance: Floats) -> Floats:
        return np.asarray(np.clip(0.5 - distance * np.float32(scale), 0, 1), np.float32)

    half, up, down = _EXTENTS[shape]
    if shape == "circle":
        return inside(np.sqrt(dx * dx + dy * dy) - np.float32(half))
    if shape == "triangle":
        slope = np.float32(half / (up + down))
        side = (np.abs(dx) - slope * (dy + np.float32(up))) / np.sqrt(1 + slope * slope)
        return np.asarray(np.minimum(inside(side), inside(dy - np.float32(down))))
    wide_x, wide_y = inside(np.abs(dx) - half), inside(np.abs(dy) - half)
    if shape == "square":
        return np.asarray(wide_x * wide_y)
    arm_x, arm_y = inside(np.abs(dx) - _CROSS_HALF_ARM), inside(np.abs(dy) - _CROSS_HALF_ARM)
    return np.asarray(wide_x * arm_y + arm_x * wide_y - arm_x * arm_y)


def render(
    scene: Scene, size: int = 32, path_SF2: NDArray[np.float64] | None = None
) -> NDArray[np.uint8]:
    """Draw every pixel frame: uint8 [pixel frames, size, size, 3]. Later sprites lie on top.

    `path_SF2` places the sprites elsewhere than `positions(scene)` does.
    """
    frames = np.empty((scene.num_pixel_frames, size, size, 3), dtype=np.float32)
    frames[:] = np.array(BACKGROUND, dtype=np.float32)
    path = positions(scene) if path_SF2 is None else path_SF2
    edges = (*scene.starts, scene.num_pixel_frames)
    for index, sprite in enumerate(scene.segments[0].sprites):
        cover = coverage(sprite.shape, path[index], size)[..., None]
        paint = np.empty((scene.num_pixel_frames, 1, 1, 3), dtype=np.float32)
        for segment, (start, stop) in zip(scene.segments, itertools.pairwise(edges), strict=True):
            paint[start:stop] = COLOURS[segment.sprites[index].colour]
        frames += cover * (paint - frames)
    return np.rint(frames).astype(np.uint8)


def scene_from_texts(texts: Sequence[str], starts: Sequence[int], num_pixel_frames: int) -> Scene:
    """The scene that texts describe, its sprites exactly at the places they name.

    Args:
        texts: one per segment; a sprite of no named place begins in the middle.
        starts: first pixel frame of each segment; the first is 0.
        num_pixel_frames: of the whole video.
    """
    segments = tuple(parse_captions(texts))
    origins = []
    for sprite in segments[0].sprites:
        share = PLACES[sprite.place or "middle centre"]
        (low_x, high_x), (low_y, high_y) = bounds(sprite.shape)
        origins.append((low_x + share[0] * (high_x - low_x), low_y + share[1] * (high_y - low_y)))
    return Scene(segments=segments, starts=tuple(starts), origins=tuple(origins),
                 num_pixel_frames=num_pixel_frames)  # fmt: skip
