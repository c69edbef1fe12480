"""Videos on paper and in files: rows of pixel frames drawn without resampling, GIF and MP4.

A filmstrip file is an .npz with frames uint8 [R, F, H, W, 3], labels [R], window [2] or [0] and
caption. R counts rows (prompts, or sequences of a group), F pixel frames.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

Frames = npt.NDArray[np.uint8]

INK, GREY, BLUE, GREEN, ORANGE, RED, VIOLET = (
    "#30363d", "#8a94a3", "#2f6fdb", "#2e9e6b", "#e08a1e", "#c8453b", "#7b57c2",
)  # fmt: skip
COLOURS = {"before": GREY, "after": BLUE, "real": GREEN, "anchor": GREEN}
DPI = 110
_WIDTH_PX = 1296
_LEAST_WIDTH_PX = 1000
_MARGIN_PX = 84
_GAP_PX = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Filmstrips:
    """Videos to be shown as rows of frames."""

    frames_RFHWC: Frames
    """RGB, F pixel frames."""

    labels: tuple[str, ...]
    """Of each row: its prompt, or `branch 3: 4, 7, 9` with the latent frames it was routed to."""

    window: tuple[int, int] | None = None
    """[start, stop) pixel frames generated under routing."""

    caption: str = ""
    """Prompt of all rows, where they share one."""

    def __post_init__(self) -> None:
        shape = self.frames_RFHWC.shape
        if self.frames_RFHWC.dtype != np.uint8 or len(shape) != 5 or shape[-1] != 3:
            raise ValueError(
                f"filmstrips are uint8 [rows, frames, height, width, 3], not "
                f"{self.frames_RFHWC.dtype} {list(shape)}"
            )
        if len(self.labels) != shape[0] or 0 in shape:
            raise ValueError(f"{len(self.labels)} labels for filmstrips {list(shape)}: one a row")

    def save(self, path: Path) -> None:
        """Write as .npz, with the folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        window = np.array(self.window or (), dtype=np.int64)
        np.savez_compressed(path, frames=self.frames_RFHWC, labels=np.array(self.labels),
                            window=window, caption=np.array(self.caption))  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> Filmstrips | None:
        """Read what `save` wrote, or None if it is not there."""
        if not path.is_file():
            return None
        with np.load(path) as file:
            window = [int(edge) for edge in file["window"]]
            return cls(
                frames_RFHWC=file["frames"],
                labels=tuple(str(label) for label in file["labels"]),
                window=(window[0], window[1]) if window else None,
                caption=str(file["caption"]),
            )


def comparison_figure(
    columns: Sequence[Mapping[str, Filmstrips]], num_shown: int = 12, max_rows: int = 8
) -> Figure:
    """A band per prompt with its caption below; in it one strip per entry of each column.

    `[{"before": b, "after": a}]` draws after under before, `[{"before": b}, {"after": a}]` beside.
    ValueError if the entries do not hold the same prompts in the same order.
    """
    every = [strips for column in columns for strips in column.values()]
    labels = every[0].labels
    if any(strips.labels != labels for strips in every):
        raise ValueError("filmstrips of different prompts cannot be compared: save the same ones")
    num_frames = min(strips.frames_RFHWC.shape[1] for strips in every)
    chosen = _spread(0, num_frames, num_shown)
    beside = len(columns) > 1
    paper = _Paper(_MARGIN_PX // 4 if beside else _MARGIN_PX)
    room = (_WIDTH_PX - paper.margin) // len(columns) - (24 if beside else 8)
    for row, label in enumerate(labels[:max_rows]):
        top, bottom = paper.y, paper.y
        for c, column in enumerate(columns):
            paper.y, x = top, paper.margin + c * (room + 24)
            for k, (name, strips) in enumerate(column.items()):
                if beside and row == 0:
                    paper.text(x, name, COLOURS.get(name, INK), bold=True)
                strip = _strip(strips.frames_RFHWC[row], chosen, room)
                if row == 0 and k == 0:
                    paper.numbers(x, strip.shape[1], chosen)
                if not beside:
                    paper.side_label(name, strip.shape[0], COLOURS.get(name, INK))
                paper.image(x, strip)
            bottom = max(bottom, paper.y)
        paper.y = bottom
        paper.text(paper.margin, textwrap.shorten(label, 150), INK)
        paper.y += 12
    return paper.figure()


def branches_figure(strips: Filmstrips, num_shown: int = 12, max_rows: int = 10) -> Figure:
    """The sequences of one group from shortly before the fork; the routed stretch is underlined."""
    num_frames = strips.frames_RFHWC.shape[1]
    start, stop = strips.window or (0, 0)
    chosen = _spread(max(0, start - (stop - start) // 2), num_frames, num_shown)
    paper = _Paper(_MARGIN_PX)
    if strips.caption:
        paper.text(paper.margin, textwrap.shorten(strips.caption, 150), INK)
    room = _WIDTH_PX - paper.margin - 8
    for row, label in enumerate(strips.labels[:max_rows]):
        head, _, routed = label.partition(":")
        strip = _strip(strips.frames_RFHWC[row], chosen, room)
        if row == 0:
            paper.numbers(paper.margin, strip.shape[1], chosen)
        colour = COLOURS.get(head.strip(), BLUE)
        paper.side_label(head.strip(), strip.shape[0], colour)
        paper.image(paper.margin, strip)
        inside = [i for i, frame in enumerate(chosen) if start <= frame < stop]
        if inside and routed.strip():
            each = (strip.shape[1] + _GAP_PX) / len(chosen)
            paper.bar(paper.margin + inside[0] * each, len(inside) * each - _GAP_PX, ORANGE)
        if routed.strip():
            words = f"attends to latent frames {routed.strip()}"
            paper.text(paper.margin, textwrap.shorten(words, 150), GREY)
        paper.y += 8
    return paper.figure()


class _Paper:
    """Pictures and words at whole pixels, top to bottom; made a figure when the height is known."""

    def __init__(self, margin: int) -> None:
        self.margin = margin
        self.y = 10
        self._images: list[tuple[int, int, Frames]] = []
        self._texts: list[tuple[float, float, str, dict[str, Any]]] = []
        self._bars: list[tuple[float, float, float, str]] = []

    def image(self, x: int, pixels_HWC: Frames) -> None:
        self._images.append((x, self.y, pixels_HWC))
        self.y += pixels_HWC.shape[0] + 4

    def text(self, x: float, words: str, colour: str, bold: bool = False) -> None:
        style = {
            "color": colour,
            "fontsize": 9,
            "va": "top",
            "weight": "bold" if bold else "normal",
        }
        self._texts.append((x, self.y, words, style))
        self.y += 18

    def side_label(self, words: str, height: int, colour: str) -> None:
        style = {"color": colour, "fontsize": 9, "va": "center", "ha": "right", "weight": "bold"}
        self._texts.append((self.margin - 8, self.y + height / 2, words, style))

    def numbers(self, x: float, width: int, chosen: Sequence[int]) -> None:
        each = (width + _GAP_PX) / len(chosen)
        style = {"color": GREY, "fontsize": 7, "va": "top", "ha": "center"}
        for i, frame in enumerate(chosen):
            centre = x + (i + 0.5) * each - _GAP_PX / 2
            self._texts.append((centre, self.y, str(frame), style))
        self.y += 14

    def bar(self, x: float, width: float, colour: str) -> None:
        self._bars.append((x, self.y - 2, width, colour))
        self.y += 5

    def figure(self) -> Figure:
        reach = [x + pixels.shape[1] for x, _, pixels in self._images]
        width, height = min(_WIDTH_PX, max([_LEAST_WIDTH_PX, *reach]) + 8), self.y + 8
        figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        for x, y, pixels in self._images:
            figure.figimage(pixels, xo=x, yo=height - y - pixels.shape[0], origin="upper")
        for left, top, words, style in self._texts:
            figure.text(left / width, 1 - top / height, words, **style)
        for left, top, length, colour in self._bars:
            corner = (left / width, 1 - (top + 4) / height)
            figure.add_artist(Rectangle(corner, length / width, 4 / height, color=colour, lw=0))
        return figure


def write_video(path: Path, frames_FHWC: Frames, fps: int = 16, scale: int = 1) -> None:
    """Write .gif (looping) or .mp4 (H.264), each pixel enlarged `scale` times.

    ValueError for another suffix or frames that are not uint8 [F, H, W, 3].
    """
    if frames_FHWC.dtype != np.uint8 or frames_FHWC.ndim != 4 or frames_FHWC.shape[-1] != 3:
        raise ValueError(
            f"a video is uint8 [frames, height, width, 3], not {frames_FHWC.dtype} "
            f"{list(frames_FHWC.shape)}"
        )
    large = frames_FHWC.repeat(scale, axis=1).repeat(scale, axis=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        pictures = [Image.fromarray(frame) for frame in large]
        pictures[0].save(path, save_all=True, append_images=pictures[1:], loop=0,
                         duration=round(1000 / fps))  # fmt: skip
    elif path.suffix == ".mp4":
        _write_mp4(path, large, fps)
    else:
        raise ValueError(f"no way to write a {path.suffix or path.name} video: use .gif or .mp4")


def _write_mp4(path: Path, frames_FHWC: Frames, fps: int) -> None:
    _, height, width, _ = frames_FHWC.shape
    odd = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))  # chroma is halved: sides must be even
    even = np.pad(frames_FHWC, odd, mode="edge")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "16"})
        stream.width, stream.height, stream.pix_fmt = even.shape[2], even.shape[1], "yuv420p"
        for frame in even:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def grid_video(frames_RFHWC: Frames, columns: int = 4, gap: int = 2) -> Frames:
    """Rows of videos as one: [R, F, H, W, 3] -> [F, H', W', 3] on white, `columns` to a line."""
    count, frames, height, width, _ = frames_RFHWC.shape
    columns = min(columns, count)
    lines = -(-count // columns)
    shape = (frames, lines * (height + gap) - gap, columns * (width + gap) - gap, 3)
    page: Frames = np.full(shape, 255, dtype=np.uint8)
    for r in range(count):
        y, x = (r // columns) * (height + gap), (r % columns) * (width + gap)
        page[:, y : y + height, x : x + width] = frames_RFHWC[r]
    return page


def _strip(frames_FHWC: Frames, chosen: Sequence[int], room_px: int) -> Frames:
    """The chosen frames side by side with white gaps, enlarged a whole number of times."""
    _, height, width, _ = frames_FHWC.shape
    scale = max(1, (room_px // len(chosen) - _GAP_PX) // width)
    gap: Frames = np.full((height * scale, _GAP_PX, 3), 255, dtype=np.uint8)
    pieces: list[Frames] = []
    for frame in chosen:
        pieces += [frames_FHWC[frame].repeat(scale, axis=0).repeat(scale, axis=1), gap]
    return np.concatenate(pieces[:-1], axis=1)


def _spread(start: int, stop: int, count: int) -> list[int]:
    """At most `count` whole numbers from `start` to `stop` - 1, both included, evenly spaced."""
    return [int(i) for i in np.linspace(start, stop - 1, min(count, stop - start)).round()]
