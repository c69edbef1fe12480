"""The shapes rewards against real renders, corrupted renders and wrong captions."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_kvpo.config import RewardConfig
from megatron_kvpo.data.shapes import write_video
from megatron_kvpo.records import Clip, Span
from megatron_kvpo.reward.base import SHAPES as OURS
from megatron_kvpo.reward.base import build_rewards
from megatron_kvpo.reward.measure import measure
from megatron_kvpo.world import (
    COLOURS,
    MOTIONS,
    SHAPES,
    STILL,
    Scene,
    SegmentSpec,
    caption,
    positions,
    render,
    sample_scene,
)
from tests.unit.shapes_faults import MOTION_FAULTS, PICTURE_FAULTS, blur, fade, ground, noise

NUM_PIXEL_FRAMES = 81
NUM_SCENES = 24
SHARES = [0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0]


@functools.cache
def scenes(num_segments: int = 2) -> list[Scene]:
    switches = {1: (), 2: (33,), 3: (33, 57)}[num_segments]
    return [sample_scene(seed, NUM_PIXEL_FRAMES, switches) for seed in range(NUM_SCENES)]


def moving() -> list[Scene]:
    return [s for s in scenes() if all(p.motion != STILL for g in s.segments for p in g.sprites)]


def to_tensor(frames_FHWC: np.ndarray) -> Tensor:
    return torch.from_numpy(frames_FHWC).permute(0, 3, 1, 2).float() / 255


def clip_for(scene: Scene, frames_FCHW: Tensor, texts: list[str] | None = None) -> Clip:
    texts = texts or scene.captions
    stops = (*scene.starts[1:], scene.num_pixel_frames)
    spans = tuple(
        Span(start=a, stop=b, text=texts[i], history=tuple(texts[:i]))
        for i, (a, b) in enumerate(zip(scene.starts, stops, strict=True))
    )
    return Clip(frames_FCHW=frames_FCHW, spans=spans)


@functools.cache
def clean() -> list[Clip]:
    return [clip_for(scene, to_tensor(render(scene))) for scene in scenes()]


def score(name: str, clips: list[Clip]) -> Tensor:
    (reward,) = build_rewards([name], RewardConfig())
    assert reward.components == (name,)
    return reward.score(clips)[0]


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks, ties averaged."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def decline(name: str, strengths: list[float], clips_of: Callable[[float], list[Clip]]) -> float:
    """Mean over scenes of the rank correlation between corruption strength and score."""
    scores = np.stack([score(name, clips_of(s)).numpy() for s in strengths])
    return float(np.mean([spearman(np.array(strengths), column) for column in scores.T]))


@pytest.mark.parametrize("name", sorted(OURS))
@pytest.mark.parametrize("num_segments", [1, 2, 3])
def test_real_renders_score_high(name: str, num_segments: int) -> None:
    clips = [clip_for(s, to_tensor(render(s))) for s in scenes(num_segments)]
    scores = score(name, clips)
    assert scores.dtype == torch.float32
    assert scores.shape == (NUM_SCENES,)
    assert scores.mean() > 0.85
    assert scores.min() > 0.7
    assert scores.max() <= 1 + 1e-6


@pytest.mark.parametrize(("fault", "strengths"), PICTURE_FAULTS)
def test_visual_quality_falls_with_picture_faults(
    fault: Callable[[Tensor, float], Tensor], strengths: list[float]
) -> None:
    def clips_of(strength: float) -> list[Clip]:
        return [replace(c, frames_FCHW=fault(c.frames_FCHW, strength)) for c in clean()[:12]]

    assert decline("visual_quality", strengths, clips_of) <= -0.9


@pytest.mark.parametrize(("fault", "strengths"), MOTION_FAULTS)
def test_motion_quality_falls_with_motion_faults(
    fault: Callable[[Scene, float], np.ndarray], strengths: list[float]
) -> None:
    def clips_of(strength: float) -> list[Clip]:
        return [clip_for(s, to_tensor(render(s, path_SF2=fault(s, strength)))) for s in singles]

    singles = [s for s in moving() if len(s.origins) == 1]
    assert len(singles) >= 8
    assert decline("motion_quality", strengths, clips_of) <= -0.9


def altered(scene: Scene, kind: str, sprite: int = 0) -> Scene:
    """The same scene with another colour, shape or way of one sprite in every segment."""
    taken = {p.colour for g in scene.segments for p in g.sprites}
    shapes = [p.shape for p in scene.segments[0].sprites]
    colours = [c for c in COLOURS if c not in taken]
    swap = {"moves left": "moves right", "rises": "falls", "bounces sideways": "rises",
            "bounces vertically": "moves right", STILL: "moves left"}  # fmt: skip
    swap |= {b: a for a, b in list(swap.items())[:2]}
    segments = []
    for index, segment in enumerate(scene.segments):
        sprites, old = list(segment.sprites), segment.sprites[sprite]
        if kind == "colour":
            turned = index and old.colour != scene.segments[0].sprites[sprite].colour
            sprites[sprite] = replace(old, colour=colours[1 if turned else 0])
        elif kind == "shape":
            other = next(s for s in SHAPES if s not in shapes)
            sprites[sprite] = replace(old, shape=other)
        else:
            sprites[sprite] = replace(old, motion=swap[old.motion])
            if sprites[sprite].motion == STILL:
                sprites[sprite] = replace(sprites[sprite], speed="")
        segments.append(SegmentSpec(sprites=tuple(sprites)))
    return replace(scene, segments=tuple(segments))


def wrong_captions(scene: Scene, kind: str) -> list[str]:
    """Texts of the altered scene; later ones say everything, changed or not."""
    first, *later = altered(scene, kind, len(scene.origins) - 1).segments
    texts = [
        " and ".join(
            f"the {p.shape} turns {p.colour} and {p.motion} {p.speed}" for p in segment.sprites
        )
        for segment in later
    ]
    return [*caption([first]), *texts]


@pytest.mark.parametrize("kind", ["colour", "shape", "direction"])
def test_wrong_captions_score_lower(kind: str) -> None:
    wrong = [clip_for(s, c.frames_FCHW, wrong_captions(s, kind))
             for s, c in zip(scenes(), clean(), strict=True)]  # fmt: skip
    right, fooled = score("text_alignment", clean()), score("text_alignment", wrong)
    assert (right > fooled + 0.05).float().mean() >= 0.95


@pytest.mark.parametrize("kind", ["colour", "shape", "direction"])
def test_text_alignment_falls_with_the_share_of_wrong_frames(kind: str) -> None:
    rights = [s for s in moving() if len(s.origins) == 1]
    pairs = [(to_tensor(render(s)), to_tensor(render(altered(s, kind)))) for s in rights]

    def clips_of(share: float) -> list[Clip]:
        clips = []
        for scene, (right, wrong) in zip(rights, pairs, strict=True):
            frames = right.clone()
            stops = (*scene.starts[1:], scene.num_pixel_frames)
            for a, b in zip(scene.starts, stops, strict=True):
                edge = b - round(share * (b - a))
                frames[edge:b] = wrong[edge:b]
            clips.append(clip_for(scene, frames))
        return clips

    assert decline("text_alignment", SHARES, clips_of) <= -0.9


@pytest.mark.parametrize("kind", ["colour", "shape", "direction"])
def test_mean_alignment_falls_with_the_share_of_mismatched_clips(kind: str) -> None:
    wrong = [clip_for(s, c.frames_FCHW, wrong_captions(s, kind))
             for s, c in zip(scenes(), clean(), strict=True)]  # fmt: skip
    counts = [round(share * NUM_SCENES) for share in SHARES]
    means = [score("text_alignment", wrong[:n] + clean()[n:]).mean().item() for n in counts]
    assert spearman(np.array(counts), np.array(means)) <= -0.9


def test_captions_of_other_scenes_score_far_lower() -> None:
    for count in (1, 2):
        group = [s for s in scenes() if len(s.origins) == count]
        frames = [to_tensor(render(s)) for s in group]
        others = group[1:] + group[:1]
        right = score("text_alignment", list(map(clip_for, group, frames)))
        other = score("text_alignment", list(map(clip_for, others, frames)))
        assert (right > other).float().mean() >= 0.95
        assert other.mean() < 0.65


def test_the_held_out_reward_falls_with_flicker_and_with_drifting_size() -> None:
    def flickering(strength: float) -> list[Clip]:
        sign = (-1.0) ** torch.arange(NUM_PIXEL_FRAMES).view(-1, 1, 1, 1)
        return [replace(c, frames_FCHW=(c.frames_FCHW * (1 + strength * sign)).clamp(0, 1))
                for c in clean()]  # fmt: skip

    def noisy(strength: float) -> list[Clip]:
        return [replace(c, frames_FCHW=noise(c.frames_FCHW, strength)) for c in clean()]

    def pulsing(strength: float) -> list[Clip]:
        phase = torch.sin(torch.arange(NUM_PIXEL_FRAMES) * 0.5).square().tolist()
        return [replace(c, frames_FCHW=torch.cat(
            [blur(f[None], 4 * strength * p) for f, p in zip(c.frames_FCHW, phase, strict=True)]
        )) for c in clean()[:6]]  # fmt: skip

    for clips_of in (flickering, noisy, pulsing):
        assert decline("temporal_consistency", [0, 0.05, 0.1, 0.2, 0.4, 0.8], clips_of) <= -0.9


@pytest.mark.parametrize("name", sorted(OURS))
def test_a_score_does_not_depend_on_its_batch(name: str) -> None:
    together = score(name, clean())
    alone = torch.cat([score(name, [clip]) for clip in reversed(clean())]).flip(0)
    fresh = score(name, [replace(c, frames_FCHW=c.frames_FCHW.clone()) for c in clean()])
    assert torch.equal(together, alone)
    assert torch.equal(together, fresh)


@pytest.mark.parametrize("name", sorted(OURS))
@pytest.mark.parametrize("frames", ["blank", "black", "white", "noise"])
def test_empty_and_wild_frames_score_finite_and_low(name: str, frames: str) -> None:
    fills = {
        "blank": ground().expand(NUM_PIXEL_FRAMES, 3, 32, 32),
        "black": torch.zeros(NUM_PIXEL_FRAMES, 3, 32, 32),
        "white": torch.ones(NUM_PIXEL_FRAMES, 3, 32, 32),
        "noise": noise(torch.full((NUM_PIXEL_FRAMES, 3, 32, 32), 0.5), 0.3),
    }
    wild = [replace(clip, frames_FCHW=fills[frames].contiguous()) for clip in clean()[:4]]
    scores = score(name, wild)
    assert scores.isfinite().all()
    assert (scores >= 0).all()
    assert (scores < 0.5).all()


@pytest.mark.parametrize("name", sorted(OURS))
def test_a_tiny_change_of_the_pixels_is_a_tiny_change_of_the_score(name: str) -> None:
    worn = [replace(c, frames_FCHW=noise(blur(c.frames_FCHW, 0.7), 0.03)) for c in clean()[:8]]
    generator = torch.Generator().manual_seed(1)
    nudged = [replace(c, frames_FCHW=c.frames_FCHW
                      + 1e-5 * torch.randn(c.frames_FCHW.shape, generator=generator))
              for c in worn]  # fmt: skip
    change = (score(name, worn) - score(name, nudged)).abs()
    assert change.max() < 1e-4


@pytest.mark.parametrize("name", ["visual_quality", "motion_quality", "text_alignment"])
def test_there_is_a_slope_from_a_bad_clip_towards_a_good_one(name: str) -> None:
    def mixed(share: float) -> list[Clip]:
        return [replace(c, frames_FCHW=share * c.frames_FCHW + (1 - share) * worse)
                for c, worse in zip(clean(), bad, strict=True)]  # fmt: skip

    bad = [noise(fade(blur(c.frames_FCHW, 1.2), 0.5), 0.05) for c in clean()]
    gain = score(name, mixed(0.3)) - score(name, mixed(0.25))
    assert (gain > 0).float().mean() >= 0.95


def test_scores_survive_a_vp9_round_trip(tmp_path: Path) -> None:
    decoded = []
    for index, scene in enumerate(scenes()[:8]):
        path = tmp_path / f"{index}.mp4"
        write_video(path, render(scene))
        with av.open(str(path)) as container:
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        decoded.append(clip_for(scene, to_tensor(np.stack(frames))))
    for name in OURS:
        assert (score(name, decoded) - score(name, clean()[:8])).abs().max() < 0.05, name


def test_another_picture_size_scores_alike() -> None:
    large = [clip_for(s, to_tensor(render(s, 64))) for s in scenes()[:6]]
    for name in ("visual_quality", "motion_quality", "text_alignment"):
        assert (score(name, large) - score(name, clean()[:6])).abs().max() < 0.1, name


def test_the_centroids_are_those_of_the_scene() -> None:
    for scene, clip in zip(scenes(), clean(), strict=True):
        error = measure(clip).centre_SF2 - torch.from_numpy(positions(scene))
        assert error.norm(dim=-1).max() < 0.3


def test_measuring_again_after_an_edit_in_place_sees_the_edit() -> None:
    clip = replace(clean()[0], frames_FCHW=clean()[0].frames_FCHW.clone())
    before = score("visual_quality", [clip])
    clip.frames_FCHW.mul_(0.5)
    assert score("visual_quality", [clip]) < before - 0.2


def test_a_colour_may_come_a_few_pixel_frames_late() -> None:
    def turns(scene: Scene) -> bool:
        first, second = (g.sprites[0].colour for g in scene.segments)
        return first != second and len(scene.origins) == 1

    scene = next(s for s in scenes() if turns(s))
    first, second = scene.segments
    unturned = replace(second.sprites[0], colour=first.sprites[0].colour)
    kept = replace(scene, segments=(first, SegmentSpec(sprites=(unturned,))))
    frames, late = to_tensor(render(scene)), to_tensor(render(kept))
    scores = []
    for delay in (0, 2, 20):
        mixed = frames.clone()
        mixed[33 : 33 + delay] = late[33 : 33 + delay]
        scores.append(score("text_alignment", [clip_for(scene, mixed)]).item())
    assert scores[0] - scores[1] < 0.02
    assert scores[0] - scores[2] > 0.08


def test_all_four_rewards_are_fast() -> None:
    clips = [replace(c, frames_FCHW=c.frames_FCHW[:33].clone(), spans=(replace(c.spans[0]),))
             for c in clean() for _ in range(3)]  # fmt: skip
    began = time.process_time()
    for name in OURS:
        score(name, clips)
    assert time.process_time() - began < 2, f"{len(clips)} clips of 33 pixel frames"


def test_an_unknown_reward_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'visual_quality'"):
        build_rewards(["visual_qualty"], RewardConfig())


def test_an_empty_batch_gives_no_scores() -> None:
    assert score("visual_quality", []).shape == (0,)


def test_texts_outside_the_grammar_are_refused() -> None:
    clip = Clip(frames_FCHW=torch.zeros(9, 3, 32, 32),
                spans=(Span(start=0, stop=9, text="a red sqare falls"),))  # fmt: skip
    with pytest.raises(ValueError, match=r"'sqare'.*did you mean 'square'"):
        score("text_alignment", [clip])


def test_every_motion_can_be_altered() -> None:
    assert {altered(s, "direction").segments[0].sprites[0].motion for s in scenes()} <= set(MOTIONS)
