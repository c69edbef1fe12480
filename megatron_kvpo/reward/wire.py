"""Clips as bytes, between a run and the process that scores them: one safetensors body.

Tensor `clip.<i>` is clip i's pixel frames [F, 3, H, W], float32 or uint8 (round(255 x)). The texts
stand in safetensors' own metadata, under `megatron_kvpo`: JSON with `version` and, for each clip,
its `spans`. Whatever arrives is checked before anything of its size is allocated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from megatron_kvpo.records import Clip, Span

VERSION = 1
"""Of this form. A body of another one is refused."""

MEDIA_TYPE = "application/safetensors"

Body = bytes | bytearray

_KEY = "megatron_kvpo"
_PREFIX = 8  # bytes of the header's length
_MAX_HEADER = 16 * 2**20
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "U8": np.dtype("u1")}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """What the header says of one clip's pixel frames."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


def encode(clips: Sequence[Clip], frames: Literal["float32", "uint8"] = "float32") -> bytes:
    """Clips of any device as one body. ValueError: none, or values that are no pixels."""
    if not clips:
        raise ValueError("there are 0 clips to send: give at least 1")
    tensors = {f"clip.{i}": _packed(f"clip.{i}", clip, frames) for i, clip in enumerate(clips)}
    texts = {"version": VERSION, "spans": [spans_to_json(clip.spans) for clip in clips]}
    return bytes(save(tensors, {_KEY: json.dumps(texts)}))


def _packed(name: str, clip: Clip, frames: Literal["float32", "uint8"]) -> Tensor:
    pixels = clip.frames_FCHW.detach().float()
    _check_values(name, pixels)
    if frames == "uint8":
        pixels = (pixels * 255).round().to(torch.uint8)
    # A copy of its own: clips may be cut from one video, which safetensors refuses to save.
    return torch.empty(pixels.shape, dtype=pixels.dtype).copy_(pixels)


def decode(
    body: Body, *, max_clips: int | None = None, max_pixels: int | None = None
) -> list[Clip]:
    """The clips of a body, float32 on the CPU.

    Args:
        body: what encode made.
        max_clips: most clips.
        max_pixels: most pixels F H W of a clip.

    Raises:
        ValueError: anything is not as encode makes it, or exceeds a bound; the text names it.
    """
    header, data_start = _header(body)
    texts = _texts(header)
    if not texts:
        raise ValueError("the body holds 0 clips: send at least 1")
    if max_clips is not None and len(texts) > max_clips:
        raise ValueError(f"the body holds {len(texts)} clips: send at most {max_clips} at once")
    names = [f"clip.{i}" for i in range(len(texts))]
    if sorted(header) != sorted(names):
        odd = sorted(set(header) ^ set(names))
        raise ValueError(f"the body has the texts of {len(texts)} clips: {odd[:5]} do not match")
    entries = [_entry(name, header[name], max_pixels) for name in names]
    _check_tiling(entries, len(body) - data_start)
    return [
        made_clip(entry.name, _frames(body, data_start, entry), spans)
        for entry, spans in zip(entries, texts, strict=True)
    ]


def made_clip(name: str, frames_FCHW: Tensor, spans: Any) -> Clip:
    """A clip of frames and what spans_to_json made. ValueError names the clip and the span."""
    num_pixel_frames = len(frames_FCHW)
    if not isinstance(spans, list):
        raise ValueError(f"{name}'s spans must be a list, not {str(spans)[:80]}")
    checked = [_span(one, num_pixel_frames, f"{name}'s span {i}") for i, one in enumerate(spans)]
    try:
        return Clip(frames_FCHW=frames_FCHW, spans=tuple(checked))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _header(body: Body) -> tuple[dict[str, Any], int]:
    """The header and where the tensors begin."""
    length = int.from_bytes(body[:_PREFIX], "little")
    stop = _PREFIX + length
    if len(body) <= _PREFIX or stop > len(body) or body[_PREFIX : _PREFIX + 1] != b"{":
        raise ValueError(f"the body of {len(body)} bytes is {_guess(body)}, not safetensors")
    if length > _MAX_HEADER:
        raise ValueError(f"the header takes {length} bytes: at most {_MAX_HEADER} are read")
    header = parse_json(bytes(body[_PREFIX:stop]), "the body's header")
    if not isinstance(header, dict):
        raise ValueError("the body's header is no table of tensors")
    return header, stop


def _guess(body: Body) -> str:
    """What a body that is not safetensors seems to be."""
    if body[:1] == b"\x80":
        return "a pickle, which is never read"
    if body[:4] == b"PK\x03\x04":
        return "a zip archive (torch.save's pickles are never read)"
    return "something else or cut short"


def _texts(header: dict[str, Any]) -> list[Any]:
    """Takes the metadata out of the header: each clip's spans."""
    metadata = header.pop("__metadata__", None)
    found = metadata.get(_KEY) if isinstance(metadata, dict) else None
    if not isinstance(found, str):
        raise ValueError(f"the body's __metadata__ has no text {_KEY!r}: encode clips with wire.py")
    texts = parse_json(found, f"metadata {_KEY!r}")
    if not isinstance(texts, dict) or type(texts.get("version")) is not int:
        raise ValueError(f"metadata {_KEY!r} has no version: encode clips with wire.py")
    if texts["version"] != VERSION:
        raise ValueError(
            f"the body is of version {texts['version']}, this side reads version {VERSION}: "
            "use the same release on both sides"
        )
    spans = texts.get("spans")
    if not isinstance(spans, list):
        raise ValueError(f"metadata {_KEY!r} has no list of spans")
    return spans


def parse_json(text: str | bytes, what: str) -> Any:
    """JSON from elsewhere. ValueError names `what`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON: {error}") from error


def _entry(name: str, said: Any, max_pixels: int | None) -> _Entry:
    if not isinstance(said, dict) or set(said) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} must have dtype, shape and data_offsets, not {str(said)[:80]}")
    dtype = _DTYPES.get(str(said["dtype"]))
    if dtype is None:
        raise ValueError(f"{name} is {str(said['dtype'])[:20]}: send {sorted(_DTYPES)}")
    shape = _counts(said["shape"], f"{name}'s shape")
    if len(shape) != 4 or shape[1] != 3 or 0 in shape:
        raise ValueError(f"{name} is {list(shape[:8])}: it must be [F, 3, H, W], none of them 0")
    pixels = shape[0] * shape[2] * shape[3]
    if max_pixels is not None and pixels > max_pixels:
        raise ValueError(f"{name} has {pixels} pixels: send at most {max_pixels} a clip")
    offsets = _counts(said["data_offsets"], f"{name}'s data_offsets")
    size = math.prod(shape) * dtype.itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise ValueError(f"{name} needs {size} bytes, its data_offsets are {list(offsets[:4])}")
    return _Entry(name=name, dtype=dtype, shape=shape, start=offsets[0], stop=offsets[1])


def _counts(values: Any, what: str) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(v) is not int or v < 0 for v in values):
        raise ValueError(f"{what} must be a list of whole numbers from 0, not {str(values)[:80]}")
    return tuple(values)


def _check_tiling(entries: Sequence[_Entry], size: int) -> None:
    """Raise ValueError if the tensors overlap, leave a gap or do not fill the body."""
    end = 0
    for entry in sorted(entries, key=lambda e: e.start):
        if entry.start != end:
            raise ValueError(f"{entry.name} begins at byte {entry.start} of the data, not at {end}")
        end = entry.stop
    if end != size:
        raise ValueError(f"the clips take {end} bytes and the body has {size} for them: cut short?")


def _frames(body: Body, data_start: int, entry: _Entry) -> Tensor:
    flat = np.frombuffer(body, entry.dtype, math.prod(entry.shape), data_start + entry.start)
    pixels = torch.from_numpy(flat.copy()).view(entry.shape)
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    _check_values(entry.name, pixels)
    return pixels


def _check_values(name: str, pixels: Tensor) -> None:
    low, high = (float(value) for value in pixels.aminmax())
    if not (low >= 0 and high <= 1):  # a nan is neither
        raise ValueError(f"{name} has values from {low:g} to {high:g}: pixels lie in [0, 1]")


def spans_to_json(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """Spans as plain tables."""
    return [{"start": s.start, "stop": s.stop, "text": s.text, "history": s.history} for s in spans]


def _span(said: Any, num_pixel_frames: int, name: str) -> Span:
    if not isinstance(said, dict) or not {"start", "stop", "text"} <= set(said):
        raise ValueError(f"{name} must have start, stop and text, not {str(said)[:80]}")
    start, stop = _counts([said["start"], said["stop"]], name)
    text, history = said["text"], said.get("history", [])
    if not isinstance(history, list) or not all(isinstance(t, str) for t in [text, *history]):
        raise ValueError(f"{name} must have a text, and a list of texts as its history")
    if not start < stop <= num_pixel_frames:
        raise ValueError(f"{name} is [{start}, {stop}): it must lie in the clip's "
                         f"{num_pixel_frames} pixel frames and not be empty")  # fmt: skip
    return Span(start=start, stop=stop, text=text, history=tuple(history))
