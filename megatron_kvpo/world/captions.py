"""What is said in the shapes world: one grammar that writes captions and reads them."""

from __future__ import annotations

import difflib
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

COLOURS = {
    "red": (208, 48, 48),
    "yellow": (208, 208, 48),
    "green": (48, 208, 48),
    "cyan": (48, 208, 208),
    "blue": (48, 48, 208),
    "purple": (208, 48, 208),
}
"""Six corners of a cube that ends well inside [0, 255]: fading and overshooting both show."""

MOTIONS = {
    "moves left": (-1, 0),
    "moves right": (1, 0),
    "rises": (0, -1),
    "falls": (0, 1),
    "stays still": (0, 0),
    "bounces sideways": (1, 0),
    "bounces vertically": (0, 1),
}
"""Verb phrase -> direction (x, y). A bouncing sprite may begin either way along it."""

SPEEDS = {"slowly": 0.2, "": 0.4, "quickly": 0.8}
STILL = "stays still"

SHAPES = ("square", "circle", "triangle", "cross")

PLACES = {
    f"{row} {column}": (x, y)
    for y, row in ((0.0, "top"), (0.5, "middle"), (1.0, "bottom"))
    for x, column in ((0.0, "left"), (0.5, "centre"), (1.0, "right"))
}
"""Where a sprite begins -> share of the way between the walls (x, y)."""

WORDS = tuple(
    sorted(
        {"a", "the", "it", "and", "at", "turns", *COLOURS, *SHAPES, *filter(None, SPEEDS)}
        | {word for phrase in (*MOTIONS, *PLACES) for word in phrase.split()}
    )
)
"""Every word a caption can hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpriteState:
    """What one sprite is and does during a segment."""

    shape: str
    colour: str
    motion: str
    speed: str = ""
    place: str = ""
    """Where it begins, of PLACES; empty if that was not said."""

    def __post_init__(self) -> None:
        for value, known in ((self.shape, SHAPES), (self.colour, COLOURS), (self.motion, MOTIONS),
                             (self.speed, SPEEDS), (self.place, ("", *PLACES))):  # fmt: skip
            if value not in known:
                raise ValueError(f"{value!r} is unknown here: choose one of {list(known)}")
        if self.motion == STILL and self.speed:
            raise ValueError(f"a sprite that {STILL} has no speed, not {self.speed!r}")

    @property
    def bounces(self) -> bool:
        """Whether it reflects at the walls; else it stops there."""
        return self.motion.startswith("bounces")

    @property
    def velocity(self) -> tuple[float, float]:
        """Units per pixel frame, before any wall. Of a bouncing sprite: one of both ways."""
        x, y = MOTIONS[self.motion]
        return x * SPEEDS[self.speed], y * SPEEDS[self.speed]


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentSpec:
    """All sprites of one segment, what earlier segments said of them included."""

    sprites: tuple[SpriteState, ...]


def caption(segments: Sequence[SegmentSpec]) -> list[str]:
    """Tell segments in words: the first names everything, later ones what changes.

    Raises:
        ValueError: a later segment changes nothing, or the sprites are not the same ones.
    """
    texts = [" and ".join(f"{_introduction(s)} {_action(s)}" for s in segments[0].sprites)]
    for before, now in itertools.pairwise(segments):
        if [s.shape for s in before.sprites] != [s.shape for s in now.sprites]:
            raise ValueError(f"sprites change their shape between {before} and {now}")
        clauses = [
            _change(old, new, "it" if len(now.sprites) == 1 else f"the {new.shape}")
            for old, new in zip(before.sprites, now.sprites, strict=True)
            if old != new
        ]
        if not clauses:
            raise ValueError(f"segment {len(texts)} changes nothing: there is nothing to tell")
        texts.append(" and ".join(clauses))
    return texts


def _introduction(sprite: SpriteState) -> str:
    place = f" at the {sprite.place}" if sprite.place else ""
    return f"a {sprite.colour} {sprite.shape}{place}"


def _action(sprite: SpriteState) -> str:
    return f"{sprite.motion} {sprite.speed}".rstrip()


def _change(old: SpriteState, new: SpriteState, subject: str) -> str:
    parts = [f"turns {new.colour}"] if new.colour != old.colour else []
    if (new.motion, new.speed) != (old.motion, old.speed):
        parts.append(_action(new))
    return f"{subject} {' and '.join(parts)}"


def parse_captions(texts: Sequence[str]) -> list[SegmentSpec]:
    """Read the texts of a video's segments in order; the inverse of `caption`.

    Raises:
        ValueError: a word outside WORDS (the nearest is named) or a sentence it cannot read.
    """
    return list(_parse(tuple(texts)))


@functools.lru_cache(maxsize=4096)
def _parse(texts: tuple[str, ...]) -> tuple[SegmentSpec, ...]:
    segments: list[SegmentSpec] = []
    for text in texts:
        sprites = list(segments[-1].sprites) if segments else []
        subject = -1
        for clause in " ".join(_words(text)).split(" and "):
            words = clause.split()
            if not segments and words[:1] == ["a"] and len(words) >= 4:
                sprites.append(_read_introduction(words, text))
                continue
            subject, rest = _read_subject(words, sprites, subject, text)
            if len(rest) == 2 and rest[0] == "turns" and rest[1] in COLOURS:
                sprites[subject] = replace(sprites[subject], colour=rest[1])
            else:
                motion, speed = _read_action(rest, text)
                sprites[subject] = replace(sprites[subject], motion=motion, speed=speed)
        segments.append(SegmentSpec(sprites=tuple(sprites)))
    return tuple(segments)


def _words(text: str) -> list[str]:
    words = [word.strip(",.;:!") for word in text.lower().split()]
    for word in words:
        if word not in WORDS:
            close = difflib.get_close_matches(word, WORDS, n=1, cutoff=0.0)
            raise ValueError(
                f"unknown word {word!r} in {text!r}: did you mean {close[0]!r}? "
                f"The words are {', '.join(WORDS)}"
            )
    return words


def _read_introduction(words: list[str], text: str) -> SpriteState:
    """A red square [at the top left] moves right."""
    rest, place = words[3:], ""
    if rest[:2] == ["at", "the"]:
        place, rest = " ".join(rest[2:4]), rest[4:]
    motion, speed = _read_action(rest, text)
    if words[1] not in COLOURS or words[2] not in SHAPES or place not in ("", *PLACES):
        raise _unreadable(" ".join(words), text)
    return SpriteState(colour=words[1], shape=words[2], motion=motion, speed=speed, place=place)


def _read_subject(
    words: list[str], sprites: list[SpriteState], current: int, text: str
) -> tuple[int, list[str]]:
    """Which sprite a clause speaks of, and the words after that. No subject: the last one."""
    shapes = [sprite.shape for sprite in sprites]
    if words[:1] == ["it"] and len(sprites) == 1:
        return 0, words[1:]
    if words[:1] == ["the"] and len(words) > 1 and words[1] in shapes:
        return shapes.index(words[1]), words[2:]
    if words and words[0] not in ("a", "it", "the") and current >= 0:
        return current, words
    raise _unreadable(" ".join(words), text)


def _read_action(words: list[str], text: str) -> tuple[str, str]:
    speed = words[-1] if words and words[-1] in SPEEDS else ""
    motion = " ".join(words[:-1] if speed else words)
    if motion not in MOTIONS or (motion == STILL and speed):
        raise _unreadable(" ".join(words), text)
    return motion, speed


def _unreadable(clause: str, text: str) -> ValueError:
    return ValueError(
        f"cannot read {clause!r} in {text!r}: write like 'a red square at the top left moves "
        "right slowly and a green circle falls' first, then like 'it turns blue and falls' or "
        "'the square rises'"
    )
