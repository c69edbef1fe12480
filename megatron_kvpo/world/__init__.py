"""The shapes world: coloured sprites that move on a dark ground, told in a few plain words."""

from megatron_kvpo.world.captions import (
    COLOURS,
    MOTIONS,
    PLACES,
    SHAPES,
    SPEEDS,
    STILL,
    WORDS,
    SegmentSpec,
    SpriteState,
    caption,
    parse_captions,
)
from megatron_kvpo.world.scenes import (
    AREAS,
    BACKGROUND,
    GRID,
    PIXEL_FPS,
    Scene,
    bounds,
    coverage,
    pixel_start,
    positions,
    render,
    sample_scene,
    scene_from_texts,
)

__all__ = [
    "AREAS", "BACKGROUND", "COLOURS", "GRID", "MOTIONS", "PIXEL_FPS", "PLACES", "SHAPES",
    "SPEEDS", "STILL", "WORDS", "Scene", "SegmentSpec", "SpriteState", "bounds", "caption",
    "coverage", "parse_captions", "pixel_start", "positions", "render", "sample_scene",
    "scene_from_texts",
]  # fmt: skip
