"""What becomes of a folder of videos when a codec and a text encoder have seen it, clip by clip.

A clip is so many latent frames of one file from one of its pixel frames on. Each is decoded and
encoded by itself, so that its latents depend on nothing but the file and the settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import av
import torch
from torch import Tensor, nn

from megatron_kvpo import log
from megatron_kvpo.data.embeddings import DTYPES, EmbeddingCache, text_key
from megatron_kvpo.data.video import Backend, ClipSpec, decode_file, probe_file
from megatron_kvpo.model.codec import ShapesCodec
from megatron_kvpo.model.umt5 import UMT5Encoder
from megatron_kvpo.model.wan_vae import WanVae
from megatron_kvpo.world import pixel_start

Codec = ShapesCodec | WanVae

logger = log.get_logger(__name__)

MANIFEST = "manifest.jsonl"

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


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoClip:
    """Where a clip is found and what it is told in."""

    index: int
    """Its place in the data set: file times starts plus start."""

    file: str
    """As the manifest of its folder names it."""

    start: int
    """First pixel frame that is taken."""

    told: tuple[tuple[int, str], ...]
    """(pixel frame of the file, text) from where each text holds; the first is 0."""


def list_clips(folder: Path, starts: Sequence[int]) -> list[VideoClip]:
    """The clips that folder/manifest.jsonl promises, by index.

    A line is {"file": ..., "segments": [texts], "switch_frames": [latent frames of the file]}.
    ValueError for lines that are not, and if there is none.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"no manifest at {path}: write one JSON object a line with a key 'file'")
    clips = []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, line in enumerate(lines):
        file, told = _entry(line, f"{path} line {number + 1}")
        for place, start in enumerate(starts):
            index = number * len(starts) + place
            clips.append(VideoClip(index=index, file=file, start=start, told=told))
    if not clips:
        raise ValueError(f"{path} names 0 videos: write one JSON object a line with a key 'file'")
    return clips


def _entry(line: str, where: str) -> tuple[str, tuple[tuple[int, str], ...]]:
    try:
        entry = json.loads(line)
        texts, switches = entry["segments"], entry.get("switch_frames", [])
        begins = [0, *(pixel_start(int(frame)) for frame in switches)]
        told = tuple(zip(begins, map(str, texts), strict=True))
        return str(entry["file"]), told
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{where}: {line[:80]!r} is no JSON object with 'file', 'segments' (texts) and a "
            "latent frame in 'switch_frames' for each segment but the first"
        ) from error


def segments_of(
    clip: VideoClip, num_frames: int, pixel_stride: int, temporal_stride: int
) -> list[tuple[int, int, str]]:
    """(first latent frame, one past the last, text) of what the clip shows, covering it.

    A text holds from the latent frame on that shows its first pixel frame.
    """
    begun: dict[int, str] = {}
    for begin, text in clip.told:
        pixel = max(0, -(-(begin - clip.start) // pixel_stride))
        begun[(pixel + temporal_stride - 1) // temporal_stride] = text  # a later one wins
    firsts = sorted(frame for frame in begun if frame < num_frames)
    stops = [*firsts[1:], num_frames]
    return [(a, b, begun[a]) for a, b in zip(firsts, stops, strict=True)]


def pixel_stride(path: Path, fps: float | None) -> int:
    """Every how many pixel frames of a file one is taken, for `fps` a second.

    ValueError for a file whose rate is no whole multiple of it.
    """
    if fps is None:
        return 1
    try:
        with av.open(str(path)) as container:
            rate = container.streams.video[0].average_rate if container.streams.video else None
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{path} cannot be opened ({error})") from error
    stride = round(float(rate) / fps) if rate else 0
    if not rate or stride < 1 or abs(float(rate) / (stride * fps) - 1) > RATE_TOLERANCE:
        raise ValueError(
            f"{path} has {float(rate or 0):g} pixel frames a second, no multiple of {fps:g}: "
            "convert it, or take the frames as they are"
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
            told = segments_of(clip, num_frames, spec.stride, self.temporal_stride)
            return Decoded(clip=clip, video_CFHW=video, segments=told,
                           num_bytes=path.stat().st_size)  # fmt: skip
        raise ValueError(reasons[-1])

    def told(self, clip: VideoClip, num_frames: int) -> list[tuple[int, int, str]]:
        """`segments_of` a clip of so many latent frames."""
        stride = pixel_stride(self.folder / clip.file, self.spec.fps)
        return segments_of(clip, num_frames, stride, self.temporal_stride)

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
