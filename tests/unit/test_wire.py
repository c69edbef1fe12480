"""Clips as bytes: what comes back, and what is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from megatron_kvpo.records import Clip, Span
from megatron_kvpo.reward import wire


def clip_of(frames=5, height=4, width=6, seed=0) -> Clip:
    pixels = torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(seed))
    spans = (
        Span(start=0, stop=2, text='a "réd" 方\n'),
        Span(start=2, stop=frames, text="it falls", history=('a "réd" 方\n',)),
    )
    return Clip(frames_FCHW=pixels, spans=spans)


def same(a: list[Clip], b: list[Clip]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.frames_FCHW, y.frames_FCHW) and x.spans == y.spans
        for x, y in zip(a, b, strict=True)
    )


def test_float32_comes_back_bit_for_bit_in_order_and_with_its_texts():
    clips = [clip_of(seed=i, frames=3 + i) for i in range(12)]  # clip.10 sorts before clip.2
    clips[3].frames_FCHW[0, 0, 0] = torch.tensor([0.0, 1.0, 1e-45, 1 - 2**-24, -0.0, 0.1])
    back = wire.decode(wire.encode(clips))
    assert same(back, clips)
    assert all(clip.frames_FCHW.dtype == torch.float32 for clip in back)
    bits = [c[3].frames_FCHW.contiguous().view(torch.int32) for c in (back, clips)]
    assert torch.equal(*bits)  # also the sign of zero


def test_clips_cut_from_one_video_and_strided_ones_travel():
    video = clip_of(frames=9).frames_FCHW
    text = (Span(start=0, stop=5, text="a"),)
    clips = [Clip(frames_FCHW=cut, spans=text) for cut in (video[:5], video[2:7], video.flip(0)[:5],
                                                           video[:5].transpose(2, 3))]  # fmt: skip
    assert same(wire.decode(wire.encode(clips)), clips)


def test_uint8_rounds_to_the_nearest_of_255_and_is_a_quarter():
    clip = clip_of(frames=40)
    body = wire.encode([clip], "uint8")
    (back,) = wire.decode(body)
    assert torch.equal(back.frames_FCHW, (clip.frames_FCHW * 255).round() / 255)
    assert (back.frames_FCHW - clip.frames_FCHW).abs().max() <= 0.5 / 255 + 1e-6
    assert body == wire.encode([back], "uint8")
    assert len(body) < len(wire.encode([clip])) / 3


def test_a_body_is_what_the_library_reads():
    clip = clip_of()
    assert torch.equal(load(wire.encode([clip]))["clip.0"], clip.frames_FCHW)


def test_a_header_whose_length_begins_like_a_pickle_is_read():
    found = set()
    for extra in range(0, 600, 4):
        clip = Clip(
            frames_FCHW=torch.rand(1, 3, 2, 2), spans=(Span(start=0, stop=1, text="x" * extra),)
        )
        body = wire.encode([clip])
        found.add(body[:1])
        assert same(wire.decode(body), [clip])
    assert b"\x80" in found


def remade(
    change: Callable[[dict[str, Any], dict[str, Any]], Any], data: bytes | None = None
) -> bytes:
    """A good body of two clips, its header and its texts changed."""
    body = wire.encode([clip_of(), clip_of(seed=1)])
    (length,) = struct.unpack("<Q", body[:8])
    header = json.loads(body[8 : 8 + length])
    texts = json.loads(header["__metadata__"]["megatron_kvpo"])
    change(header, texts)
    if "megatron_kvpo" in header.get("__metadata__", {}):
        header["__metadata__"]["megatron_kvpo"] = json.dumps(texts)
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + (body[8 + length :] if data is None else data)


def entry(**said: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda header, _: header["clip.1"].update(said)


def span(**said: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda _, texts: texts["spans"][1][1].update(said)


def last(value: float) -> bytes:
    return remade(lambda header, texts: None, bytes(2876) + struct.pack("<f", value))


MALFORMED = {
    "nothing": (b"", r"0 bytes is something else or cut short"),
    "a pickle": (b"\x80\x04\x95" + bytes(40), r"a pickle, which is never read"),
    "a zip": (b"PK\x03\x04" + bytes(40), r"a zip archive"),
    "a long header": (struct.pack("<Q", 2**62) + b"{}", r"cut short"),
    "no json": (struct.pack("<Q", 8) + b"{abcdefg", r"header is not JSON"),
    "deep json": (struct.pack("<Q", 200001) + b'{"a":' + b"[" * 199996, r"header is not JSON"),
    "no metadata": (save({"clip.0": torch.rand(1, 3, 2, 2)}), r"no text 'megatron_kvpo'"),
    "no list": (remade(lambda h, t: t.update(spans={})), r"no list of spans"),
    "no version": (remade(lambda h, t: t.pop("version")), r"no version"),
    "another version": (remade(lambda h, t: t.update(version=2)), r"of version 2, .* version 1"),
    "no clips": (remade(lambda h, t: t.update(spans=[])), r"holds 0 clips"),
    "too few texts": (remade(lambda h, t: t["spans"].pop()), r"texts of 1 clips: \['clip.1'\]"),
    "another name": (remade(lambda h, t: h.update(x=h.pop("clip.1"))), r"\['clip.1', 'x'\] do not"),
    "dtype": (remade(entry(dtype="F64")), r"clip.1 is F64: send \['F32', 'U8'\]"),
    "rank": (remade(entry(shape=[15, 4, 6])), r"clip.1 is \[15, 4, 6\]: it must be \[F, 3, H, W\]"),
    "channels": (remade(entry(shape=[3, 5, 4, 6])), r"clip.1 is \[3, 5, 4, 6\]"),
    "empty": (remade(entry(shape=[0, 3, 4, 6])), r"none of them 0"),
    "negative": (remade(entry(shape=[-5, -3, 4, 6])), r"clip.1's shape must be .* whole numbers"),
    "fraction": (remade(entry(shape=[5.0, 3, 4, 6])), r"clip.1's shape must be"),
    "true": (remade(entry(shape=[5, 3, True, 24])), r"clip.1's shape must be"),
    "huge": (remade(entry(shape=[2**40, 3, 2**40, 2**40])), r"clip.1 needs \d+ bytes"),
    "offsets": (remade(entry(data_offsets=[0, 1440])), r"clip.1 begins at byte 0 .* not at 1440"),
    "one offset": (remade(entry(data_offsets=[0])), r"data_offsets are \[0\]"),
    "more keys": (remade(entry(more=1)), r"clip.1 must have dtype, shape and data_offsets"),
    "no entry": (remade(lambda h, t: h.update({"clip.1": 3})), r"clip.1 must have dtype"),
    "cut short": (remade(lambda h, t: None, bytes(100)), r"take 2880 bytes and the body has 100"),
    "too long": (remade(lambda h, t: None, bytes(2900)), r"take 2880 bytes and the body has 2900"),
    "nan": (last(float("nan")), r"clip.1 .*nan"),
    "inf": (last(float("inf")), r"to inf: pix"),
    "above 1": (last(1.01), r"from 0 to 1.01"),
    "below 0": (last(-0.5), r"from -0.5 to 0"),
    "spans": (remade(lambda h, t: t.update(spans=[1, 2])), r"clip.0's spans must be a list"),
    "no span": (remade(lambda h, t: t.update(spans=[[], []])), r"clip.0: spans \[\] must cover"),
    "gap": (remade(span(start=3)), r"clip.1: spans \[\(0, 2\), \(3, 5\)\] must cover"),
    "past the end": (remade(span(stop=6)), r"clip.1's span 1 is \[2, 6\)"),
    "empty span": (remade(span(stop=2)), r"clip.1's span 1 is \[2, 2\)"),
    "start": (remade(span(start="2")), r"clip.1's span 1 must be a list of whole numbers"),
    "text": (remade(span(text=None)), r"clip.1's span 1 must have a text"),
    "history": (remade(span(history="abc")), r"list of texts as its history"),
    "histories": (remade(span(history=["a", 1])), r"list of texts as its history"),
    "a list": (remade(lambda h, t: t["spans"][1].append([0, 5, "a"])), r"span 2 must have start"),
}  # fmt: skip


def test_the_body_that_the_others_are_changed_from_is_good():
    assert same(wire.decode(remade(lambda header, texts: None)), [clip_of(), clip_of(seed=1)])


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_body_is_refused_by_name(what):
    body, message = MALFORMED[what]
    with pytest.raises(ValueError, match=message):
        wire.decode(body)


def test_bounds_are_read_from_the_header_before_anything_is_allocated():
    with pytest.raises(ValueError, match=r"holds 2 clips: send at most 1"):
        wire.decode(remade(lambda header, texts: None), max_clips=1)
    with pytest.raises(ValueError, match=r"clip.0 has 120 pixels: send at most 119"):
        wire.decode(remade(lambda header, texts: None), max_pixels=119)
    with pytest.raises(ValueError, match=r"clip.1 has \d{37} pixels"):
        wire.decode(remade(entry(shape=[2**40, 3, 2**40, 2**40])), max_pixels=2**28)


@pytest.mark.parametrize("frames", ["float32", "uint8"])
def test_what_is_no_pixel_is_not_sent(frames):
    for value in (1.5, -0.1, float("nan")):
        clip = clip_of()
        clip.frames_FCHW[1, 2, 3, 4] = value
        with pytest.raises(ValueError, match=r"clip.1 has values from .*: pixels lie in \[0, 1\]"):
            wire.encode([clip_of(), clip], frames)
    with pytest.raises(ValueError, match="0 clips to send"):
        wire.encode([], frames)
