"""Wan 2.1's frozen VAE: diffusers' modules and encoder, streaming, a decoder state to fork.

The first latent is 1 pixel frame, each next 4, so L latents are 4L - 3. diffusers keeps the state
of its causal convolutions inside the model while it decodes one video; here the state is a value
of its own, so streams can run side by side, pause, and branch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_kvpo.model.frozen import fill, read_pickle, read_safetensors, resident
from megatron_kvpo.model.vae_decoder import Feature, arrange, decode_latents, latents_at_once

ORIGINAL_FILE = "Wan2.1_VAE.pth"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
TEMPORAL_STRIDE = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderCache:
    """What decoding the next latent frame needs of those before it. Never changed once made."""

    features: tuple[Feature, ...]
    """One of each causal convolution of the decoder, in the order in which they run."""

    def select(self, rows: Tensor | slice) -> DecoderCache:
        """Fork or reorder: a cache whose rows are `rows` (whole numbers, repeats allowed)."""
        return DecoderCache(features=tuple(
            f[rows] if isinstance(f, Tensor) else f for f in self.features
        ))  # fmt: skip

    def fork(self, num_rows: int) -> DecoderCache:
        """One row's state for `num_rows` branches, shared, not copied. ValueError for more rows."""
        if self.num_rows != 1:
            raise ValueError(f"a cache of {self.num_rows} rows cannot be shared: select one first")
        return DecoderCache(features=tuple(
            f.expand(num_rows, *f.shape[1:]) if isinstance(f, Tensor) else f for f in self.features
        ))  # fmt: skip

    @property
    def num_rows(self) -> int:
        """Rows of the batch that it continues."""
        return next(len(f) for f in self.features if isinstance(f, Tensor))

    @property
    def num_bytes(self) -> int:
        """Bytes of its own; a forked cache counts its shared rows once."""
        held = {f.untyped_storage().data_ptr(): f for f in self.features if isinstance(f, Tensor)}
        return sum(f.untyped_storage().nbytes() for f in held.values())


class WanVae:
    """Pixel frames to normalised latents and back, causal in time. Frozen; idle on the CPU.

    It computes where its input lies: the weights come for the call (or for a `resident` block) and
    leave after it. The interface is that of ShapesCodec.
    """

    temporal_stride = TEMPORAL_STRIDE

    def __init__(self, vae: Any, max_rows: int | None = None) -> None:
        """Wrap a diffusers AutoencoderKLWan; `load_wan_vae` builds one.

        `max_rows` bounds how many rows run at once. ValueError for a VAE that is not Wan 2.1's.
        """
        check_config(vae.config)
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows {max_rows} must be at least 1")
        self.spatial_stride = 2 ** (len(vae.config["dim_mult"]) - 1)
        self.latent_channels: int = vae.config["z_dim"]
        self.latents_mean = torch.tensor(vae.config["latents_mean"])
        self.latents_std = torch.tensor(vae.config["latents_std"])
        self.dtype: torch.dtype = vae.dtype
        self.max_rows = max_rows
        self._vae = vae.requires_grad_(False).eval()
        arrange(vae.decoder)

    def num_pixel_frames(self, num_latents: int) -> int:
        """Pixel frames of a video of `num_latents` latent frames, from its start."""
        return self.temporal_stride * (num_latents - 1) + 1

    def resident(self, device: torch.device | str) -> AbstractContextManager[None]:
        """Keep the weights on `device` across several calls."""
        return resident(self._vae, device)

    def normalise(self, raw_BFCHW: Tensor) -> Tensor:
        """(raw - latents_mean) / latents_std, per channel, float32."""
        mean, std = self._statistics(raw_BFCHW.device)
        return (raw_BFCHW.float() - mean) / std

    @torch.no_grad()
    def encode(self, video_BCFHW: Tensor) -> Tensor:
        """Pixels in [-1, 1], F = 4L - 3 of them -> float32 latent_BFCHW: the posterior's mean.

        ValueError for a number of frames or a size that does not divide.
        """
        rows, channels, frames, height, width = video_BCFHW.shape
        spatial, stride = self.spatial_stride, self.temporal_stride
        if rows < 1 or channels != 3 or frames % stride != 1 or height % spatial or width % spatial:
            raise ValueError(
                f"videos [B, 3, {stride}L-{stride - 1}, {spatial}h, {spatial}w] are needed, these "
                f"are {list(video_BCFHW.shape)}"
            )
        with self.resident(video_BCFHW.device):
            raw = [self._encode_rows(video_BCFHW[part]) for part in self._chunks(rows)]
        return self.normalise(torch.cat(raw))

    def _encode_rows(self, video_BCFHW: Tensor) -> Tensor:
        slots = _empty_slots(self._vae.encoder)
        video, first = video_BCFHW.to(self.dtype), 1  # pixel frame 0 is a latent of its own
        later = torch.split(video[:, :, first:], self.temporal_stride, dim=2)
        pieces = [video[:, :, :first], *later]
        hidden = [self._vae.encoder(p, feat_cache=slots, feat_idx=[0]) for p in pieces if p.numel()]
        moments: Tensor = self._vae.quant_conv(torch.cat(hidden, dim=2))
        return moments[:, : self.latent_channels].transpose(1, 2)

    @torch.no_grad()
    def decode(
        self, latent_BFCHW: Tensor, cache: DecoderCache | None = None
    ) -> tuple[Tensor, DecoderCache]:
        """Normalised latents -> pixels `video_BCFHW` in [-1, 1], and the cache to go on with.

        Without a cache the latents begin a video and give 4F - 3 pixel frames; with one they
        continue it and give 4F. Decoding in pieces equals decoding whole.
        """
        self._check_latents(latent_BFCHW)
        if cache is not None and cache.num_rows != len(latent_BFCHW):
            raise ValueError(f"a cache of {cache.num_rows} rows for {len(latent_BFCHW)} latents")
        start = cache or DecoderCache(features=tuple(_empty_slots(self._vae.decoder)))
        videos, ends = [], []
        with self.resident(latent_BFCHW.device):
            for rows in self._chunks(len(latent_BFCHW)):
                slots = list(start.select(rows).features)
                videos.append(torch.cat(list(self._pieces(latent_BFCHW[rows], slots)), dim=2))
                ends.append(slots)
        features = tuple(_join(parts) for parts in zip(*ends, strict=True))
        return torch.cat(videos), DecoderCache(features=features)

    def decode_pixels(self, latent_BFCHW: Tensor) -> Tensor:
        """A whole video's latents -> `frames_BFCHW`, F pixel frames, float32 RGB in [0, 1]."""
        return self.decode_branches(latent_BFCHW, 0)

    def decode_branches(self, latent_BFCHW: Tensor, shared_frames: int) -> Tensor:
        """`decode_pixels` of rows that share their first `shared_frames` latents: these run once.

        With F latents and B rows, shared + B (F - shared) latents are decoded instead of B F.
        ValueError if the rows differ in what they are said to share.
        """
        parts = list(self.decode_rows(latent_BFCHW, shared_frames))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.no_grad()
    def decode_rows(self, latent_BFCHW: Tensor, shared_frames: int) -> Iterator[Tensor]:
        """The same, `max_rows` rows at a time: pixels of all of them need not fit in memory."""
        self._check_latents(latent_BFCHW)
        num_rows, num_latents = latent_BFCHW.shape[:2]
        if not 0 <= shared_frames <= num_latents:
            raise ValueError(f"shared_frames {shared_frames} must lie in [0, {num_latents}]")
        prefix_BFCHW = latent_BFCHW[:1, :shared_frames]
        if not bool((latent_BFCHW[:, :shared_frames] == prefix_BFCHW).all()):
            raise ValueError(f"the rows differ within their first {shared_frames} latent frames")
        height, width = (self.spatial_stride * n for n in latent_BFCHW.shape[-2:])
        shape = (self.num_pixel_frames(num_latents), 3, height, width)
        slots, done = _empty_slots(self._vae.decoder), 0
        with self.resident(latent_BFCHW.device):
            begun_1FCHW = torch.empty(1, *shape, device=latent_BFCHW.device)
            if shared_frames:
                done = self._write(begun_1FCHW, prefix_BFCHW, slots, 0)
            trunk = DecoderCache(features=tuple(slots))
            for rows in self._chunks(num_rows):
                tails = latent_BFCHW[rows, shared_frames:]
                frames_BFCHW = torch.empty(len(tails), *shape, device=latent_BFCHW.device)
                frames_BFCHW[:, :done] = begun_1FCHW[:, :done]
                branch = trunk.fork(len(tails)) if shared_frames else trunk
                self._write(frames_BFCHW, tails, list(branch.features), done)
                yield frames_BFCHW

    def _write(
        self, frames_BFCHW: Tensor, latent_BFCHW: Tensor, slots: list[Feature], done: int
    ) -> int:
        """Decode into `frames_BFCHW` from pixel frame `done` on; the pixel frames done by then."""
        for piece in self._pieces(latent_BFCHW, slots):
            count = piece.shape[2]
            pixels = (piece.float().transpose(1, 2) / 2 + 0.5).clamp_(0, 1)
            frames_BFCHW[:, done : done + count] = pixels
            done += count
        return done

    def _pieces(self, latent_BFCHW: Tensor, slots: list[Feature]) -> Iterator[Tensor]:
        """Pixels [B, 3, 1 or 4 a latent, H, W] of a few latents at a time; `slots` move on."""
        mean, std = self._statistics(latent_BFCHW.device)
        raw = (latent_BFCHW.float() * std + mean).to(self.dtype).transpose(1, 2)
        for part in torch.split(raw, latents_at_once(raw.shape[2], slots, len(raw)), dim=2):
            hidden_BFHWC = self._vae.post_quant_conv(part).permute(0, 2, 3, 4, 1)
            pixels_BFHWC = decode_latents(self._vae.decoder, hidden_BFHWC, slots)
            yield pixels_BFHWC.permute(0, 4, 1, 2, 3).clamp(-1, 1).contiguous()

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        mean, std = self.latents_mean.to(device), self.latents_std.to(device)
        return mean[:, None, None], std[:, None, None]

    def _chunks(self, num_rows: int) -> list[slice]:
        step = self.max_rows or max(num_rows, 1)
        return [slice(start, start + step) for start in range(0, num_rows, step)]

    def _check_latents(self, latent_BFCHW: Tensor) -> None:
        if min(latent_BFCHW.shape[:2]) < 1 or latent_BFCHW.shape[2] != self.latent_channels:
            raise ValueError(
                f"latents [B, F, {self.latent_channels}, H, W] with B, F >= 1 are needed, these "
                f"are {list(latent_BFCHW.shape)}"
            )


def _empty_slots(coder: nn.Module) -> list[Feature]:
    """One slot a causal convolution; those without a kernel in time never fill theirs."""
    return [None] * sum(isinstance(module, nn.Conv3d) for module in coder.modules())


def _join(parts: tuple[Feature, ...]) -> Feature:
    """One convolution's feature of all rows, from those of its chunks."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if not tensors:
        return parts[0]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def check_config(config: dict[str, Any]) -> None:
    """Raise ValueError for options of a VAE that is not Wan 2.1's."""
    found = {
        "is_residual": bool(config.get("is_residual")),
        "patch_size": config.get("patch_size") or 1,
        "temporal stride": 2 ** sum(config["temperal_downsample"]),
        "latents_mean": len(config["latents_mean"]),
        "latents_std": len(config["latents_std"]),
    }
    wanted = {
        "is_residual": False, "patch_size": 1, "temporal stride": TEMPORAL_STRIDE,
        "latents_mean": config["z_dim"], "latents_std": config["z_dim"],
    }  # fmt: skip
    wrong = [f"{name} {found[name]}, not {wanted[name]}" for name in wanted
             if found[name] != wanted[name]]  # fmt: skip
    if wrong:
        raise ValueError(f"not a VAE of Wan 2.1 (Wan 2.2's is another): {'; '.join(wrong)}")


def find_wan_vae(folder: Path) -> tuple[Path, dict[str, Any] | None]:
    """The file of weights of a VAE that load_wan_vae takes, and diffusers' config or None.

    ValueError where there is none.
    """
    original = folder / ORIGINAL_FILE
    if original.is_file():
        return original, None
    inner = folder / "vae" if (folder / "vae").is_dir() else folder
    path = inner / "config.json"
    kind = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if kind.get("_class_name") != "AutoencoderKLWan":
        raise ValueError(
            f"{folder} holds no Wan VAE: it needs {ORIGINAL_FILE}, or config.json of an "
            f"AutoencoderKLWan and {WEIGHTS_FILE}, directly or in vae/"
        )
    if not (inner / WEIGHTS_FILE).is_file():
        raise ValueError(f"{inner} lacks {WEIGHTS_FILE}: only safetensors are read")
    return inner / WEIGHTS_FILE, kind


def load_wan_vae(
    folder: Path, *, dtype: torch.dtype = torch.bfloat16, max_rows: int | None = None
) -> WanVae:
    """Load a VAE from Wan's diffusers folder, its vae/ subfolder, or Wan's own folder.

    Raises ValueError for missing files, an unsafe pickle, a VAE that is not Wan 2.1's, and
    missing, extra or misshapen tensors.
    """
    from diffusers import AutoencoderKLWan

    original, kind = find_wan_vae(folder)
    if kind is None:
        tensors, config = _read_original(original)
    else:
        tensors, config = read_safetensors([original]), kind
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(config)
    check_config(vae.config)
    fill(vae, tensors, dtype, original)
    return WanVae(vae, max_rows)


def _read_original(path: Path) -> tuple[Iterable[tuple[str, Tensor]], dict[str, Any]]:
    """Wan's own file by diffusers' names, and what its tensors say of diffusers' config."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    state = read_pickle(path)
    try:
        sizes = {
            "base_dim": state["encoder.conv1.weight"].shape[0],
            "z_dim": state["conv2.weight"].shape[0],
        }
    except KeyError as error:
        raise ValueError(f"{path} is not Wan 2.1's VAE: {error.args[0]} is missing") from error
    renamed: dict[str, Tensor] = convert_wan_vae_to_diffusers(state)
    return renamed.items(), {"_class_name": "AutoencoderKLWan", **sizes}
