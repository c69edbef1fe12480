"""What becomes of a folder of videos when a codec and a text encoder have seen it, clip by clip.

A clip is so many latent frames of one file from one of its pixel frames on. Each is decoded and
encoded by itself, so that its latents depend on nothing but the file and the settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import av
import torch
from torch import Tensor, nn

from megatron_kvpo import log
from megatron_kvpo.data.embeddings import DTYPES, EmbeddingCache, text_key
from megatron_kvpo.data.video import ClipSpec, decode_file, probe_file
from megatron_kvpo.model.codec import ShapesCodec
from megatron_kvpo.model.umt5 import UMT5Encoder
from megatron_kvpo.model.wan_vae import WanVae
from megatron_kvpo.world import pixel_start

Codec = ShapesCodec | WanVae
Backend = Literal["cpu", "gpu"]
Unit = Literal["pixel_frame", "s"]

logger = log.get_logger(__name__)

MANIFEST = "manifest.jsonl"
EXAMPLES = (
    '{"file": "a.mp4", "caption": "a cat"}',
    '{"file": "a.mp4", "segments": ["a cat", "it runs"], "switch_frames": [9]} (latent frames)',
    '{"file": "a.mp4", "segments": [{"text": "a cat", "start_s": 0}, ...]} (or '
    "start_pixel_frame, start_latent_frame)",
)
"""Lines of a manifest."""

_NEAR = 1e-3
"""Pixel frames that a time may be past one and still mean it."""

_PROBES = 4
"""Files that are probed at once."""

RATE_TOLERANCE = 0.02
"""A file's rate may be so far, relatively, from a whole multiple of the wanted one."""


class TextEncoder(Protocol):
    """Texts to embeddings: cached ones, umT5, or the words of the shapes world."""

    text_dim: int
    text_length: int

    def encode(self, texts: Sequence[str]) -> Tensor:
        """`text_BXD`, float32 on the CPU, zeros past each text's end."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodingSpec:
    """What all clips of a data set have in common: equal ones give equal latents."""

    codec: str
    """Of the weights: `codec_fingerprint`."""

    text: str
    """Of the text encoder: `text_identity`."""

    text_dim: int
    text_length: int
    size: tuple[int, int]
    """Pixel frames are resized to this height and width."""

    num_frames: tuple[int, ...]
    """Latent frames of a clip; a file too short for the first gives the first that it can fill."""

    starts: tuple[int, ...] = (0,)
    """Pixel frames of each file at which a clip begins."""

    fps: float | None = None
    """Pixel frames a second that are taken; None: as the file has them."""

    dtype: str = "float32"
    """Of the latents, a key of DTYPES: what they are rounded to."""

    def __post_init__(self) -> None:
        frames = list(self.num_frames)
        if not frames or min(frames) < 1 or frames != sorted(set(frames), reverse=True):
            raise ValueError(f"latent frames {frames} must be above 0 and fall, as 21 13 9")
        if not self.starts or min(self.starts) < 0 or len(set(self.starts)) != len(self.starts):
            raise ValueError(f"starts {list(self.starts)} must be different pixel frames from 0 on")
        if self.dtype not in DTYPES or (self.fps is not None and self.fps <= 0):
            raise ValueError(
                f"latents of {self.dtype} at {self.fps} pixel frames a second cannot be had: use "
                f"{list(DTYPES)} and a rate above 0"
            )

    @classmethod
    def of(cls, codec: Codec, encoder: TextEncoder, **settings: Any) -> EncodingSpec:
        """The spec of what these two make, with the other fields as given."""
        return cls(codec=codec_fingerprint(codec), text=text_identity(encoder),
                   text_dim=encoder.text_dim, text_length=encoder.text_length,
                   **settings)  # fmt: skip

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EncodingSpec:
        """Back from a mapping of `dataclasses.asdict` that went through JSON."""
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**fields)

    def differences(self, other: EncodingSpec) -> list[str]:
        """Each field that is another one there, with both values."""
        ours, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return [f"{k} {ours[k]}, not {theirs[k]}" for k in ours if ours[k] != theirs[k]]


class Told(NamedTuple):
    """A text and where in its file it begins."""

    begin: float
    text: str
    unit: Unit = "pixel_frame"


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoClip:
    """Where a clip is found and what it is told in."""

    index: int
    """Its place in the data set: file times starts plus start."""

    file: str
    """As the manifest of its folder names it."""

    start: int
    """First pixel frame that is taken."""

    told: tuple[Told, ...]
    """In order; what begins first also tells what is before it."""


def list_clips(folder: Path, starts: Sequence[int]) -> list[VideoClip]:
    """The clips that folder/manifest.jsonl promises, by index.

    A line is as EXAMPLES. ValueError for lines that are not, and if there is none.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"no manifest at {path}: write one JSON object a line, as {EXAMPLES[0]}")
    clips = []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, line in enumerate(lines):
        file, told = _entry(line, f"{path} line {number + 1}")
        for place, start in enumerate(starts):
            index = number * len(starts) + place
            clips.append(VideoClip(index=index, file=file, start=start, told=told))
    if not clips:
        raise ValueError(f"{path} names 0 videos: write one JSON object a line, as {EXAMPLES[0]}")
    return clips


def _entry(line: str, where: str) -> tuple[str, tuple[Told, ...]]:
    try:
        entry = json.loads(line)
        told = _texts(entry)
        if any(b.begin <= a.begin or a.unit != b.unit for a, b in itertools.pairwise(told)):
            raise ValueError("segments must follow each other, in one unit")
        if not told or not all(part.text.strip() for part in told):
            raise ValueError("a text is empty")
        return str(entry["file"]), tuple(told)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{where}: {line[:80]!r} is no video that is told in texts ({error}): write "
            f"{' or '.join(EXAMPLES)}"
        ) from error


def _texts(entry: Mapping[str, Any]) -> list[Told]:
    if "segments" not in entry:
        return [Told(0.0, str(entry["caption" if "caption" in entry else "text"]))]
    found, switches = entry["segments"], entry.get("switch_frames", [])
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        return [_told(segment) for segment in found]
    begins = [0, *(pixel_start(int(frame)) for frame in switches)]
    if len(begins) != len(found):
        raise ValueError(f"{len(found)} texts and {len(switches)} switch_frames")
    return [Told(float(begin), text) for begin, text in zip(begins, found, strict=True)]


def _told(segment: Mapping[str, Any]) -> Told:
    text = str(segment["text"])
    if "start_s" in segment:
        return Told(float(segment["start_s"]), text, "s")
    if "start_latent_frame" in segment:
        return Told(float(pixel_start(int(segment["start_latent_frame"]))), text)
    return Told(float(segment["start_pixel_frame"]), text)


def segments_of(
    clip: VideoClip, num_frames: int, pixel_stride: int, temporal_stride: int, rate: float = 0.0
) -> list[tuple[int, int, str]]:
    """(first latent frame, one past the last, text) of what the clip shows, covering it.

    A text holds from the latent frame on that shows its first pixel frame. `rate`: pixel frames a
    second of the file, for texts that begin at seconds.
    """
    begun: dict[int, str] = {}
    for told in clip.told:
        begin = told.begin if told.unit == "pixel_frame" else told.begin * rate
        pixel = max(0, math.ceil((begin - clip.start) / pixel_stride - _NEAR))
        begun[(pixel + temporal_stride - 1) // temporal_stride] = told.text  # a later one wins
    firsts = sorted(frame for frame in begun if frame < num_frames)
    if not firsts:  # told in nothing but what comes later
        return [(0, num_frames, clip.told[0].text)]
    firsts[0], first = 0, begun[firsts[0]]
    texts = [first, *(begun[frame] for frame in firsts[1:])]
    return list(zip(firsts, [*firsts[1:], num_frames], texts, strict=True))


def frame_rate(path: Path) -> float:
    """Pixel frames a second of a file. ValueError for one that has none."""
    try:
        with av.open(str(path)) as container:
            rate = container.streams.video[0].average_rate if container.streams.video else None
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{path} cannot be opened ({error})") from error
    if not rate:
        raise ValueError(f"{path} does not say how many pixel frames a second it has")
    return float(rate)


def pixel_stride(path: Path, fps: float | None) -> int:
    """Every how many pixel frames of a file one is taken, for `fps` a second.

    ValueError for a file whose rate is no whole multiple of it.
    """
    if fps is None:
        return 1
    rate = frame_rate(path)
    stride = round(rate / fps)
    if stride < 1 or abs(rate / (stride * fps) - 1) > RATE_TOLERANCE:
        raise ValueError(
            f"{path} has {rate:g} pixel frames a second, no multiple of {fps:g}: convert it, or "
            "take the frames as they are"
        )
    return stride


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """A clip's pixels and what it is told in."""

    clip: VideoClip
    video_CFHW: Tensor
    segments: list[tuple[int, int, str]]
    """As `segments_of` gives them, in latent frames."""

    num_bytes: int
    """Of the file."""


class ClipReader:
    """Decodes clips, each by itself, through the graph of data/video.py."""

    def __init__(
        self, folder: Path, spec: EncodingSpec, temporal_stride: int, backend: Backend = "cpu"
    ) -> None:
        self.folder, self.spec, self.backend = folder, spec, backend
        self.temporal_stride = temporal_stride

    def pixels(self, clip: VideoClip, num_frames: int) -> ClipSpec:
        """Which pixel frames `num_frames` latent frames of a clip need."""
        return ClipSpec(
            num_pixel_frames=self.temporal_stride * (num_frames - 1) + 1, size=self.spec.size,
            start=clip.start, stride=pixel_stride(self.folder / clip.file, self.spec.fps),
        )  # fmt: skip

    def read(self, clip: VideoClip) -> Decoded:
        """The longest clip of spec.num_frames that the file holds. ValueError if it holds none."""
        path, reasons = self.folder / clip.file, []
        for num_frames in self.spec.num_frames:
            spec = self.pixels(clip, num_frames)
            try:
                video = decode_file(path, spec, self.backend)
            except (ValueError, OSError, av.FFmpegError) as error:
                reasons.append(str(error))
                continue
            return Decoded(clip=clip, video_CFHW=video, segments=self.told(clip, num_frames),
                           num_bytes=path.stat().st_size)  # fmt: skip
        raise ValueError(reasons[-1])

    def told(self, clip: VideoClip, num_frames: int) -> list[tuple[int, int, str]]:
        """`segments_of` a clip of so many latent frames."""
        path = self.folder / clip.file
        rate = frame_rate(path) if any(told.unit == "s" for told in clip.told) else 0.0
        stride = pixel_stride(path, self.spec.fps)
        return segments_of(clip, num_frames, stride, self.temporal_stride, rate)

    def usable(self, clips: Sequence[VideoClip]) -> dict[int, int]:
        """Latent frames of every clip that can be decoded, by its index. Probes each file."""
        with ThreadPoolExecutor(_PROBES) as pool:
            found = list(pool.map(self._fitting, clips))
        return {clip.index: frames for clip, frames in zip(clips, found, strict=True) if frames}

    def _fitting(self, clip: VideoClip) -> int | None:
        """The most latent frames that a file fills; None if it fills none, or is no video."""
        for num_frames in self.spec.num_frames:
            try:
                probe_file(self.folder / clip.file, self.pixels(clip, num_frames))
            except (ValueError, OSError, av.FFmpegError) as error:
                if num_frames == self.spec.num_frames[-1]:
                    logger.warning("clip %d, %s, is left out: %s", clip.index, clip.file, error)
                continue
            return num_frames
        return None


@torch.no_grad()
def encode_clip(codec: Codec, video_CFHW: Tensor, dtype: str, device: torch.device) -> Tensor:
    """latent_FCHW of one clip in [-1, 1], rounded to `dtype`, on the device."""
    return codec.encode(video_CFHW[None].to(device))[0].to(DTYPES[dtype])


def text_tokens(encoder: TextEncoder, text: str) -> Tensor:
    """[tokens, D]: a text's embedding without its padding; bfloat16 if that loses nothing."""
    text_XD = encoder.encode([text])[0]
    filled = text_XD.ne(0).any(dim=1).nonzero()
    tokens_XD = text_XD[: int(filled[-1]) + 1 if len(filled) else 0]
    narrow_XD = tokens_XD.bfloat16()
    return narrow_XD if torch.equal(narrow_XD.float(), tokens_XD) else tokens_XD.contiguous()


def codec_fingerprint(codec: Codec) -> str:
    """32 hex digits of a codec's class, type and weights, its latents' mean and deviation too."""
    module = codec if isinstance(codec, nn.Module) else codec._vae
    tensors = {**module.state_dict(), "mean": codec.latents_mean, "std": codec.latents_std}
    digest = hashlib.sha256(type(codec).__name__.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def text_identity(encoder: TextEncoder) -> str:
    """A name for what makes the embeddings; another encoder has another."""
    if isinstance(encoder, EmbeddingCache):
        return encoder.manifest.encoder
    if isinstance(encoder, UMT5Encoder):
        return encoder.identity
    return f"{type(encoder).__name__} {encoder.text_dim} x {encoder.text_length}"


def text_name(spec: EncodingSpec, text: str) -> str:
    """Under which name a text's embedding is stored."""
    return text_key(spec.text, text)


def data_fingerprint(
    spec: EncodingSpec, clips: Mapping[int, tuple[str, int, Sequence[Sequence[Any]]]]
) -> str:
    """Names a data set: its spec, and of each clip (file, bytes of it, segments), by index."""
    told = [[index, file, size, [list(part) for part in segments]]
            for index, (file, size, segments) in sorted(clips.items())]  # fmt: skip
    text = json.dumps([dataclasses.asdict(spec), told], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
