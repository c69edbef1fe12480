"""What becomes of videos when a codec and a text encoder have seen them: settings and identities.

A clip is so many latent frames of one file from one of its pixel frames on. Each is encoded by
itself, so that its latents depend on nothing but the file and the settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron_kvpo.data.clips import ClipSpec
from megatron_kvpo.data.embeddings import DTYPES, EmbeddingCache, text_key
from megatron_kvpo.model.codec import ShapesCodec
from megatron_kvpo.model.umt5 import UMT5Encoder
from megatron_kvpo.model.wan_vae import WanVae

Codec = ShapesCodec | WanVae


class TextEncoder(Protocol):
    """Texts to embeddings: cached ones, umT5, or the words of the shapes world."""

    text_dim: int
    text_length: int

    def encode(self, texts: Sequence[str]) -> Tensor:
        """`text_BXD`, float32 on the CPU, zeros past each text's end."""
        ...

    def require(self, texts: Sequence[str]) -> None:
        """Raise ValueError unless every text can be encoded."""
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
    sizes: tuple[tuple[int, int], ...]
    """Heights and widths of pixel frames: a file is cut to the nearest in proportions."""

    num_frames: tuple[int, ...]
    """Latent frames of a clip; a file too short for the first gives the first that it can fill."""

    starts: tuple[int, ...] = (0,)
    """Pixel frames (at `fps`) of each file at which a clip begins."""

    every: int | None = None
    """Further clips begin every so many pixel frames after the start, as far as the file goes."""

    fps: float | None = None
    """Pixel frames a second, by timestamps; None: as the file has them."""

    dtype: str = "float32"
    """Of the latents, a key of DTYPES: what they are rounded to."""

    def __post_init__(self) -> None:
        frames = list(self.num_frames)
        if not frames or min(frames) < 1 or frames != sorted(set(frames), reverse=True):
            raise ValueError(f"latent frames {frames} must be above 0 and fall, as 21 13 9")
        if not self.starts or min(self.starts) < 0 or len(set(self.starts)) != len(self.starts):
            raise ValueError(f"starts {list(self.starts)} must be different pixel frames from 0 on")
        if self.every is not None and (self.every < 1 or len(self.starts) > 1):
            raise ValueError(
                f"clips every {self.every} pixel frames from {list(self.starts)} on: use at least "
                "1, and one start"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"latents of {self.dtype} cannot be had: use {list(DTYPES)}")
        self.pixels(1, 1)

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
        fields["sizes"] = tuple((int(height), int(width)) for height, width in values["sizes"])
        return cls(**fields)

    def pixels(self, num_frames: int, temporal_stride: int, start: int | str = 0) -> ClipSpec:
        """The pixel frames of a clip of so many latent frames, as uint8: it waits decoded."""
        one = len(self.sizes) == 1
        return ClipSpec(
            num_pixel_frames=temporal_stride * (num_frames - 1) + 1, fps=self.fps, start=start,
            size=self.sizes[0] if one else None, buckets=() if one else self.sizes,
            dtype=torch.uint8,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)

    def differences(self, other: EncodingSpec) -> list[str]:
        """Each field that is another one there, with both values."""
        ours, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return [f"{k} {ours[k]}, not {theirs[k]}" for k in ours if ours[k] != theirs[k]]


def segments_of(
    shown: Sequence[tuple[int, str]], first: str, num_frames: int, temporal_stride: int
) -> list[tuple[int, int, str]]:
    """(first latent frame, one past the last, text) of a clip, covering it.

    `shown`: pixel frame in the clip and text, as clips.cut gives them. A text holds from the latent
    frame on that shows its first pixel frame; what begins first also tells what is before it, and
    `first`, the file's first text, a clip that ends before all of them.
    """
    begun = {
        -(-pixel // temporal_stride): text for pixel, text in shown if text
    }  # a later one wins
    firsts = sorted(frame for frame in begun if frame < num_frames)
    if not firsts:
        return [(0, num_frames, first)]
    edges = [0, *firsts[1:], num_frames]
    return [(edges[place], edges[place + 1], begun[frame]) for place, frame in enumerate(firsts)]


@torch.no_grad()
def encode_clip(codec: Codec, video_CFHW: Tensor, dtype: str, device: torch.device) -> Tensor:
    """latent_FCHW of one clip, float32 in [-1, 1] or uint8, rounded to `dtype`, on the device."""
    video = video_CFHW[None].to(device)
    if video.dtype == torch.uint8:  # as DALI normalises, bit for bit
        video = (video.float() - 127.5) * (1 / 127.5)
    return codec.encode(video)[0].to(DTYPES[dtype])


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
    text = json.dumps([spec.to_json(), told], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
