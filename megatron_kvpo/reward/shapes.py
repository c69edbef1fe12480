"""Rewards of the shapes world: no weights, all scores in [0, 1], smooth in the pixels.

A fault x >= 0 in units of its tolerance scores 1 / (1 + x): steep near perfection, and with a
slope left far from it. Each clip is scored by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_kvpo.records import Clip, Span
from megatron_kvpo.reward.measure import GRACE_PIXEL_FRAMES, Measured, measure
from megatron_kvpo.world import AREAS, BACKGROUND, COLOURS, SHAPES, SpriteState, bounds

_STRIDE = 8
"""Pixel frames over which a speed is taken, besides the step from one frame to the next."""


def _each(clips: Sequence[Clip], rate: Callable[[Clip], Tensor]) -> Tensor:
    """Scores of the clips one by one, so that none depends on its batch."""
    if not clips:
        return torch.zeros(0)
    with torch.no_grad():
        return torch.stack([rate(clip) for clip in clips]).float()


class VisualQuality:
    """Is every pixel frame a clean render of as much as was asked for?

    Three faults add up: colour that is no mix of the ground with one palette colour (wrong hues,
    noise, colour pushed past the palette), area between ground and full colour beyond what
    edges need (blur, fading, ghosts), and too much or too little ink.
    """

    name = "visual_quality"
    _RESIDUAL, _EDGE, _EDGE_SOFTNESS, _EDGE_WEIGHT, _INK_WEIGHT = 0.04, 0.65, 0.08, 1.2, 2.0

    def score(self, clips: Sequence[Clip]) -> Tensor:
        """See Reward.score."""
        return _each(clips, self._rate)

    def _rate(self, clip: Clip) -> Tensor:
        seen = measure(clip)
        area = seen.asked.area
        colour_F = seen.residual_F / area / self._RESIDUAL
        needed = self._EDGE * seen.asked.perimeter * seen.pixel_side
        excess_F = (seen.edge_F - needed) / area / self._EDGE_SOFTNESS
        edge_F = torch.nn.functional.softplus(excess_F) * self._EDGE_SOFTNESS
        ink_F = _soft_abs(seen.ink_FK.sum(1) / area - 1, 0.05)
        fault_F = colour_F + self._EDGE_WEIGHT * edge_F + self._INK_WEIGHT * ink_F
        return (1 / (1 + fault_F)).mean()


class MotionQuality:
    """Do the asked sprites move smoothly, at the asked velocity, stopping or turning at walls?

    Compares the centroid's way over 1 and over 8 pixel frames with the one asked for. A leap
    counts over the whole clip.
    """

    name = "motion_quality"
    _STEP_TOLERANCE, _STRIDE_TOLERANCE, _LEAP = 0.2, 0.1, 0.5

    def score(self, clips: Sequence[Clip]) -> Tensor:
        """See Reward.score."""
        return _each(clips, self._rate)

    def _rate(self, clip: Clip) -> Tensor:
        seen = measure(clip)
        num_sprites = len(seen.mass_SF)
        scores = [self._one(seen, sprite, clip.spans) for sprite in range(num_sprites)]
        return torch.stack(scores).mean()

    def _one(self, seen: Measured, sprite: int, spans: Sequence[Span]) -> Tensor:
        shown_F = _shown(seen, sprite)
        step: list[Tensor] = []
        stride: list[Tensor] = []
        total: list[Tensor] = []
        for span, states in zip(spans, seen.asked.states, strict=True):
            for length, scores in ((1, step), (_STRIDE, stride)):
                pairs = _pairs(span, length)
                if pairs is None:
                    continue
                first, last = pairs
                error = _miss(seen.centre_SF2[sprite], first, last, states[sprite])
                tolerance = self._STEP_TOLERANCE if length == 1 else length * self._STRIDE_TOLERANCE
                scores.append(shown_F[first] * shown_F[last] / (1 + error / tolerance**2))
                if length == 1:
                    total.append(error)
        if not step:
            return shown_F.mean()
        smooth = torch.cat(step).mean()
        steady = torch.cat(stride).mean() if stride else smooth
        leaps = 1 / (1 + torch.cat(total).mean() / self._LEAP)
        return 0.5 * (smooth + steady) * leaps


class TextAlignment:
    """Does each span show the colours, shapes and directions that its text names?

    Speed is left to motion_quality: going faster than asked costs nothing here, as long as the
    direction is right.
    """

    name = "text_alignment"
    _COLOUR, _SHAPE, _MOTION = 0.4, 0.25, 0.35
    _LIKENESS_SOFTNESS = 0.004
    _SHORTEST_WAY = 1.6
    """Units over 8 pixel frames at the slow speed: what a direction is judged on."""

    def score(self, clips: Sequence[Clip]) -> Tensor:
        """See Reward.score."""
        return _each(clips, self._rate)

    def _rate(self, clip: Clip) -> Tensor:
        seen = measure(clip)
        total = seen.ink_FK.new_zeros(())
        for index, span in enumerate(clip.spans):
            states = seen.asked.states[index]
            scores = [self._one(seen, s, state, span) for s, state in enumerate(states)]
            total = total + torch.stack(scores).mean() * self._purity(seen, states, span)
        return total / len(clip.frames_FCHW)

    def _one(self, seen: Measured, sprite: int, state: SpriteState, span: Span) -> Tensor:
        """Score of one sprite in one span, times the span's pixel frames."""
        part = slice(span.start, span.stop)
        shown_F = _shown(seen, sprite)[part]
        ink_F = seen.ink_FK[part, list(COLOURS).index(state.colour)]
        present_F = (ink_F / AREAS[state.shape]).clamp(0, 1)
        weight_F = seen.colour_weight_F[part]
        colour = (weight_F * present_F * (2 - present_F)).sum() / weight_F.sum()
        likeness_FJ = seen.likeness_SFJ[sprite, part]
        choice_FJ = torch.softmax(likeness_FJ / self._LIKENESS_SOFTNESS, dim=1)
        kind = SHAPES.index(state.shape)
        shape = (choice_FJ[:, kind] * likeness_FJ[:, kind].square() * shown_F).mean()
        score = self._COLOUR * colour + self._SHAPE * shape
        weight = self._COLOUR + self._SHAPE
        pairs = _pairs(span, _STRIDE) or _pairs(span, _STRIDE // 2)
        if pairs is not None:
            score = score + self._MOTION * self._direction(seen, sprite, state, pairs)
            weight += self._MOTION
        return score / weight * (span.stop - span.start)

    def _direction(
        self, seen: Measured, sprite: int, state: SpriteState, pairs: tuple[slice, slice]
    ) -> Tensor:
        first, last = pairs
        shown_F = _shown(seen, sprite)
        centre_F2 = seen.centre_SF2[sprite]
        went_F2 = centre_F2[last] - centre_F2[first]
        faults = []
        for asked_F2 in _ways(centre_F2[first], state, last.start - first.start):
            length_F1 = asked_F2.norm(dim=1, keepdim=True)
            heading_F2 = asked_F2 / (length_F1 + 1e-3)
            along_F1 = (went_F2 * heading_F2).sum(1, keepdim=True)
            spare_F2 = heading_F2 * (along_F1 - length_F1).clamp_min(0)
            miss_F = (went_F2 - spare_F2 - asked_F2).square().sum(1)
            faults.append(miss_F / (length_F1[:, 0].square() + self._SHORTEST_WAY**2))
        fault_F = torch.stack(faults).amin(0)
        return (shown_F[first] * shown_F[last] / (1 + 3 * fault_F)).mean()

    def _purity(self, seen: Measured, states: Sequence[SpriteState], span: Span) -> Tensor:
        """Share of the span's ink that has an asked colour, ink of half a sprite granted."""
        ink_FK = seen.ink_FK[span.start : span.stop]
        names = list(COLOURS)
        asked_F = ink_FK[:, [names.index(s.colour) for s in states]].sum(1)
        weight_F = seen.colour_weight_F[span.start : span.stop]
        stray_F = (ink_FK.sum(1) - asked_F).clamp_min(0) * weight_F
        grant = seen.asked.area / 2
        return ((asked_F + grant) / (asked_F + stray_F + grant)).mean()


class TemporalConsistency:
    """Does a clip keep what it shows from frame to frame? Held out: texts and palette unread.

    Compares frames 1 and 8 apart in their saliency (distance from the ground): its area, its
    mean colour, the length and direction of its edges, and flicker of the ground, of which most
    of a clip must consist. Pairs that
    straddle a change of text do not count.
    """

    name = "temporal_consistency"
    _SALIENCE, _COLOUR, _AREA, _EDGES, _FLICKER = 0.15, 0.1, 0.14, 0.15, 0.06
    _LEAST_AREA, _QUIET_SHARE, _QUIET_TOLERANCE = 16.0, 0.7, 0.3

    def score(self, clips: Sequence[Clip]) -> Tensor:
        """See Reward.score."""
        return _each(clips, self._rate)

    def _rate(self, clip: Clip) -> Tensor:
        frames = clip.frames_FCHW.float()
        ground = torch.tensor(BACKGROUND, device=frames.device).view(3, 1, 1) / 255
        offset = frames - ground
        norm_FHW = offset.square().sum(1)
        salient_FHW = norm_FHW.square() / (norm_FHW.square() + self._SALIENCE**2)
        pixel_area = 32.0**2 / norm_FHW[0].numel()
        area_F = salient_FHW.sum((1, 2)) * pixel_area
        colour_FC = torch.einsum("fhw,fchw->fc", salient_FHW, frames) * pixel_area
        colour_FC = colour_FC / (area_F + 1)[:, None]
        padded = torch.nn.functional.pad(salient_FHW, (1, 1, 1, 1))
        edges_F2 = torch.stack([padded.diff(dim=d).abs().sum((1, 2)) for d in (1, 2)], dim=1)
        scores = []
        for length in (1, _STRIDE):
            mask = _same_span(clip.spans, length, frames.device)
            if not mask.any():
                continue
            a, b = slice(None, -length), slice(length, None)
            log_area_F = (area_F + 1).log()
            fault = (colour_FC[b] - colour_FC[a]).square().sum(1) / self._COLOUR**2
            fault = fault + ((log_area_F[b] - log_area_F[a]) / self._AREA).square()
            log_edges_F2 = (edges_F2 + 1).log()
            fault = fault + ((log_edges_F2[b] - log_edges_F2[a]) / self._EDGES).square().sum(1)
            if length == 1:
                fault = fault + self._flicker(frames, salient_FHW)
            scores.append(((1 / (1 + fault)) * mask).sum() / mask.sum())
        present = (1 / (1 + (self._LEAST_AREA / (area_F + 1e-3)) ** 4)).mean()
        lack_F = (self._QUIET_SHARE - (1 - salient_FHW).mean((1, 2))).clamp_min(0)
        quiet = (1 / (1 + (lack_F / self._QUIET_TOLERANCE).square())).mean()
        return (torch.stack(scores).mean() if scores else 1.0) * present * quiet

    def _flicker(self, frames_FCHW: Tensor, salient_FHW: Tensor) -> Tensor:
        """Mean squared change of the pixels that stay ground, in tolerances. [F - 1]."""
        quiet_FHW = (1 - salient_FHW[:-1]) * (1 - salient_FHW[1:])
        moved_FHW = frames_FCHW.diff(dim=0).square().sum(1) * quiet_FHW.square().square()
        return moved_FHW.sum((1, 2)) / (quiet_FHW.sum((1, 2)) + 1) / self._FLICKER**2


def _soft_abs(x: Tensor, softness: float) -> Tensor:
    return (x.square() + softness**2).sqrt() - softness


def _shown(seen: Measured, sprite: int) -> Tensor:
    """How far a sprite is there: 0 without ink, 1 at about its area, less when flooded. [F]."""
    share_F = seen.mass_SF[sprite] / AREAS[seen.asked.states[0][sprite].shape]
    x_F = (share_F / 0.75).clamp(0, 1)
    flood_F = (share_F - 1.5).clamp_min(0)
    return x_F.square() * (3 - 2 * x_F) / (1 + flood_F.square())


def _pairs(span: Span, length: int) -> tuple[slice, slice] | None:
    """Pixel frames `length` apart whose way between them the span's text governs, if any.

    The step into a frame follows the text of that frame.
    """
    first = max(span.start - 1, 0)
    if span.stop - first <= length:
        return None
    return slice(first, span.stop - length), slice(first + length, span.stop)


def _ways(from_F2: Tensor, state: SpriteState, num_frames: int) -> list[Tensor]:
    """Where the asked motion may lead from each point in `num_frames`: displacements [F, 2]."""
    signs = (1.0, -1.0) if state.bounces else (1.0,)
    ways = []
    for sign in signs:
        axes = []
        for axis, ((low, high), speed) in enumerate(
            zip(bounds(state.shape), state.velocity, strict=True)
        ):
            at_F = from_F2[:, axis]
            go = sign * speed * num_frames
            if state.bounces and speed:
                inside_F = at_F.clamp(low, high)
                phase_F = (inside_F + go - low).abs()
                axes.append(phase_F - (phase_F - (high - low)).clamp_min(0) * 2 + low - inside_F)
            else:
                axes.append(torch.full_like(at_F, go).minimum((high - at_F).clamp_min(0))
                            .maximum((low - at_F).clamp_max(0)))  # fmt: skip
        ways.append(torch.stack(axes, dim=1))
    return ways


def _miss(centre_F2: Tensor, first: slice, last: slice, state: SpriteState) -> Tensor:
    """Squared distance between where a sprite went and where it was asked to go. [pairs]."""
    went_F2 = centre_F2[last] - centre_F2[first]
    ways = _ways(centre_F2[first], state, last.start - first.start)
    return torch.stack([(went_F2 - way_F2).square().sum(1) for way_F2 in ways]).amin(0)


def _same_span(spans: Sequence[Span], length: int, device: torch.device) -> Tensor:
    """1 for pairs of frames `length` apart under one text, past its grace time. [F - length]."""
    stop = spans[-1].stop
    label = torch.full((stop,), -1, device=device)
    for index, span in enumerate(spans):
        label[span.start + (GRACE_PIXEL_FRAMES if index else 0) : span.stop] = index
    if stop <= length:
        return torch.zeros(0, device=device)
    return ((label[:-length] == label[length:]) & (label[length:] >= 0)).float()
