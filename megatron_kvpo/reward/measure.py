"""What the shapes rewards know of a clip: soft, smooth measurements of its pixels.

A pixel is explained as ground + a * (colour - ground) with one palette colour and a share a in
[0, 1]; from these come ink per colour, centroids, outlines, and what no colour explains. Nothing
is thresholded, so a small change of the pixels is a small change of every number here.
Lengths are world units (1/32 of the side), areas square units.
"""

from __future__ import annotations

import functools
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_kvpo.records import Clip, Span
from megatron_kvpo.world import (
    AREAS,
    BACKGROUND,
    COLOURS,
    GRID,
    SHAPES,
    SpriteState,
    coverage,
    parse_captions,
)

GRACE_PIXEL_FRAMES = 4
"""After a sprite is asked to turn to another colour, its colour counts fully only from here on."""

_SOFTNESS = 0.04  # of the choice between colours, in squared sine of the angle to each
_ANGLE_FLOOR = 0.03  # squared distance from the ground below which a pixel has no hue
_WINDOWS = ((7.0, False), (8.0, True))  # radius and whether flat, of the centroid's refinements
_PERIMETERS = {"square": 32.0, "circle": 28.3, "triangle": 33.8, "cross": 40.0}
_REACH = 7  # an outline spans 2 * 7 + 1 samples a side, one unit apart


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What the texts of a clip ask for, span by span and sprite by sprite."""

    states: tuple[tuple[SpriteState, ...], ...]
    """[span][sprite]."""

    turned: tuple[tuple[bool, ...], ...]
    """Whether the span's text gives the sprite a new colour. [span][sprite]."""

    area: float
    """Ink of all sprites together."""

    perimeter: float
    """Length of all their edges."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Soft measurements of one clip. S counts sprites here, F pixel frames, K palette colours."""

    asked: Asked
    pixel_side: float
    centre_SF2: Tensor
    """Centroid (x, y) of each asked sprite."""

    mass_SF: Tensor
    """Ink of each sprite within its window."""

    ink_FK: Tensor
    """Ink of each palette colour in the whole frame."""

    colour_weight_F: Tensor
    """Less than 1 in the grace time after a turn."""

    likeness_SFJ: Tensor
    """Cosine between a sprite's outline and that of each of SHAPES."""

    residual_F: Tensor
    """Squared distance of pixels from their best explanation, summed over the frame."""

    edge_F: Tensor
    """Area that is neither ground nor full colour: edges, blur, fading, ghosts."""


def asked_of(spans: tuple[Span, ...]) -> Asked:
    """Read a clip's texts, pronouns resolved by their history. ValueError if it cannot."""
    states, turned = [], []
    for span in spans:
        segments = parse_captions((*span.history, span.text))
        now = segments[-1].sprites
        before = segments[-2].sprites if len(segments) > 1 else now
        states.append(now)
        turned.append(tuple(a.colour != b.colour for a, b in zip(before, now, strict=True)))
    if len({len(s) for s in states}) != 1:
        raise ValueError(f"the spans of a clip ask for different numbers of sprites: {spans}")
    return Asked(states=tuple(states), turned=tuple(turned),
                 area=sum(AREAS[s.shape] for s in states[0]),
                 perimeter=sum(_PERIMETERS[s.shape] for s in states[0]))  # fmt: skip


_CACHE = cast(
    "MutableMapping[Tensor, tuple[tuple[int, tuple[Span, ...]], Measured]]",
    WeakTensorKeyDictionary(),
)


def measure(clip: Clip) -> Measured:
    """Measure a clip once; later calls for the same, unchanged frames return the same object."""
    frames = clip.frames_FCHW
    key = (0 if frames.is_inference() else frames._version, clip.spans)
    known = _CACHE.get(frames)
    if known is None or known[0] != key:
        known = (key, _measure(clip))
        _CACHE[frames] = known
    return known[1]


@torch.no_grad()
def _measure(clip: Clip) -> Measured:
    asked = asked_of(clip.spans)
    frames = clip.frames_FCHW.float()
    num_frames, _, height, width = frames.shape
    if height != width:
        raise ValueError(f"the shapes world is square, not {height} x {width}")
    pixel_area = (GRID / height) ** 2
    ink_FKHW, residual_FHW, edge_FHW = _explain(frames)
    track_SFK, weight_F = _colours_to_track(clip.spans, asked, frames)
    track_FSK = track_SFK.transpose(0, 1)
    ink_NHW = torch.bmm(track_FSK, ink_FKHW.flatten(2)).view(-1, height, width)
    centre_N2, mass_N = _locate(ink_NHW)
    likeness_NJ = _outlines(ink_NHW, centre_N2) @ _templates().to(frames.device).T
    num_sprites = len(track_SFK)

    def per_sprite(x_N: Tensor) -> Tensor:
        return x_N.view(num_frames, num_sprites, *x_N.shape[1:]).transpose(0, 1).contiguous()

    return Measured(
        asked=asked,
        pixel_side=GRID / height,
        centre_SF2=per_sprite(centre_N2),
        mass_SF=per_sprite(mass_N),
        ink_FK=ink_FKHW.sum((2, 3)) * pixel_area,
        colour_weight_F=weight_F,
        likeness_SFJ=per_sprite(likeness_NJ),
        residual_F=residual_FHW.sum((1, 2)) * pixel_area,
        edge_F=edge_FHW.sum((1, 2)) * pixel_area,
    )


def _explain(frames_FCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ink per colour [F, K, H, W], unexplained squared distance and edge share [F, H, W]."""
    ground_C, step_KC = _palette(frames_FCHW.device)
    num_frames, _, height, width = frames_FCHW.shape
    offset_FCP = (frames_FCHW - ground_C.view(3, 1, 1)).flatten(2)
    norm_F1P = offset_FCP.square().sum(1, keepdim=True)
    size_K1 = step_KC.square().sum(1, keepdim=True)
    dot_FKP = step_KC @ offset_FCP
    share_FKP = (dot_FKP / size_K1).clamp_(0, 1)
    # |x - a d|^2 = |x|^2 - a (2 x.d - a |d|^2); in place, for these are the large tensors here.
    error_FKP = dot_FKP.mul_(2).addcmul_(share_FKP, size_K1, value=-1)
    error_FKP = error_FKP.mul_(share_FKP).neg_().add_(norm_F1P)
    choice_FKP = (error_FKP / ((norm_F1P + _ANGLE_FLOOR) * -_SOFTNESS)).exp_()
    choice_FKP *= choice_FKP.sum(1, keepdim=True).reciprocal_()
    residual_FP = (choice_FKP * error_FKP).sum(1).clamp_min_(0)
    square_FKP = share_FKP.square()
    edge_FP = (share_FKP - square_FKP).square_().mul_(choice_FKP).sum(1).mul_(16)
    ink_FKP = share_FKP.mul_(-2).add_(3).mul_(square_FKP).mul_(choice_FKP)
    size = (num_frames, height, width)
    return ink_FKP.view(num_frames, -1, height, width), residual_FP.view(size), edge_FP.view(size)


@functools.cache
def _palette(device: torch.device) -> tuple[Tensor, Tensor]:
    """The ground's colour [3] and the way from it to each palette colour [K, 3]."""
    ground = torch.tensor(BACKGROUND, dtype=torch.float32) / 255
    colours = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255
    return ground.to(device), (colours - ground).to(device)


def _colours_to_track(
    spans: tuple[Span, ...], asked: Asked, frames_FCHW: Tensor
) -> tuple[Tensor, Tensor]:
    """Which colours belong to each sprite in each pixel frame [S, F, K], and the grace weights.

    One sprite owns all ink. Two own their asked colours, in the grace time also the one before.
    """
    names = list(COLOURS)
    num_frames, num_sprites = len(frames_FCHW), len(asked.states[0])
    track_SFK = torch.full((num_sprites, num_frames, len(names)), float(num_sprites == 1))
    weight_F = torch.ones(num_frames)
    for index, span in enumerate(spans):
        grace = slice(span.start, min(span.start + GRACE_PIXEL_FRAMES, span.stop))
        if any(asked.turned[index]):
            ramp = (torch.arange(GRACE_PIXEL_FRAMES) + 1.0) / (GRACE_PIXEL_FRAMES + 1)
            weight_F[grace] = ramp[: grace.stop - grace.start]
        for sprite, state in enumerate(asked.states[index]):
            track_SFK[sprite, span.start : span.stop, names.index(state.colour)] = 1
            if asked.turned[index][sprite] and span.history:
                before = parse_captions(span.history)[-1].sprites[sprite].colour
                others = {s.colour for s in asked.states[index]}
                if before not in others:
                    track_SFK[sprite, grace, names.index(before)] = 1
    return track_SFK.to(frames_FCHW.device), weight_F.to(frames_FCHW.device)


def _locate(ink_NHW: Tensor) -> tuple[Tensor, Tensor]:
    """Centroid [N, 2] of the main blob and its ink [N], by a window that follows the centroid."""
    size = ink_NHW.shape[-1]
    grid_P = _grid(size, ink_NHW.device)
    middle = torch.full((len(ink_NHW), 2), GRID / 2, device=ink_NHW.device)
    flat = torch.ones(len(ink_NHW), size, device=ink_NHW.device)
    centre_N2, mass_N = _moments(ink_NHW, grid_P, flat, flat, middle)
    for radius, is_flat in _WINDOWS:
        away_N2P = (grid_P - centre_N2[..., None]).abs()
        if is_flat:
            window_N2P = torch.sigmoid((radius - away_N2P) / 0.6)
        else:
            window_N2P = torch.exp(-0.5 * (away_N2P / radius).square())
        centre_N2, mass_N = _moments(ink_NHW, grid_P, window_N2P[:, 0], window_N2P[:, 1], centre_N2)
    return centre_N2, mass_N


def _moments(
    ink_NHW: Tensor, grid_P: Tensor, window_x_NW: Tensor, window_y_NH: Tensor, prior_N2: Tensor
) -> tuple[Tensor, Tensor]:
    """Centroid and ink under a separable window; half a unit of ink sits at the prior."""
    pixel_area = (GRID / ink_NHW.shape[-1]) ** 2
    by_x_NW = torch.bmm(window_y_NH[:, None], ink_NHW)[:, 0] * window_x_NW * pixel_area
    by_y_NH = torch.bmm(ink_NHW, window_x_NW[..., None])[..., 0] * window_y_NH * pixel_area
    mass_N = by_x_NW.sum(1)
    sums_N2 = torch.stack([by_x_NW @ grid_P, by_y_NH @ grid_P], dim=1)
    return (sums_N2 + 0.5 * prior_N2) / (mass_N + 0.5)[:, None], mass_N


def _grid(size: int, device: torch.device) -> Tensor:
    """Centres of the pixels of one side, in units."""
    return (torch.arange(size, device=device) + 0.5) * (GRID / size)


def _outlines(ink_NHW: Tensor, centre_N2: Tensor) -> Tensor:
    """Ink around the centroid on a grid of units, as vectors of length 1 (0 without ink)."""
    size = ink_NHW.shape[-1]
    steps = torch.arange(-_REACH, _REACH + 1, device=ink_NHW.device, dtype=torch.float32)
    at_N2R = centre_N2[..., None] + steps
    away_N2RP = (_grid(size, ink_NHW.device) - at_N2R[..., None]).abs()
    hat_N2RP = (1 - away_N2RP).clamp_min(0) * (GRID / size)
    outline_NRR = torch.bmm(torch.bmm(hat_N2RP[:, 1], ink_NHW), hat_N2RP[:, 0].transpose(1, 2))
    flat = outline_NRR.flatten(1)
    return flat / (flat.square().sum(1, keepdim=True) + 1.0).sqrt()


@functools.cache
def _templates() -> Tensor:
    """Outline of each of SHAPES, averaged over where in a pixel the centroid falls. [J, R * R]."""
    phases = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)) / 4 + GRID / 2
    outlines = []
    for shape in SHAPES:
        share = torch.from_numpy(coverage(shape, phases.numpy()))
        ink = share.square() * (3 - 2 * share)
        mean = _outlines(ink, _locate(ink)[0]).mean(0)
        outlines.append(mean / mean.norm())
    return torch.stack(outlines)
