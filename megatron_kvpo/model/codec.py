"""The latent codec of the shapes world: Wan's interface, small enough to decode on a laptop.

Latent 0 holds pixel frame 0; latent l > 0 holds the `temporal_stride` pixel frames that end at
pixel frame temporal_stride * l. So L latents are temporal_stride * (L - 1) + 1 pixel frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from megatron_kvpo.config import CodecConfig

_ROWS = 16
"""Videos that `decode_rows` decodes at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderCache:
    """What decoding the next latent frame needs of those before it."""

    last_latent_BCHW: Tensor
    """The newest decoded latent of each row."""

    def select(self, rows: Tensor) -> DecoderCache:
        """Fork or reorder: a cache whose rows are `rows` (whole numbers, repeats allowed)."""
        return DecoderCache(last_latent_BCHW=self.last_latent_BCHW[rows])


class _Residual(nn.Module):
    """x + conv(silu(conv(silu(x)))), 3x3, on [N, C, H, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden_NCHW: Tensor) -> Tensor:
        hidden: Tensor = self.first(functional.silu(hidden_NCHW))
        hidden = self.second(functional.silu(hidden))
        return hidden_NCHW + hidden


class ShapesCodec(nn.Module):
    """Pixel frames to normalised latents and back, causal in time.

    The encoder sees the pixel frames of one latent; the decoder sees a latent and the one before
    it. Past the start of a video the decoder sees zeros, the mean latent.
    """

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, config: CodecConfig, latent_channels: int) -> None:
        super().__init__()
        if config.spatial_stride != 4 or config.temporal_stride < 1 or config.width % 8:
            raise ValueError(
                f"codec.spatial_stride {config.spatial_stride} must be 4, codec.temporal_stride "
                f"{config.temporal_stride} at least 1, codec.width {config.width} a multiple of 8"
            )
        self.temporal_stride = config.temporal_stride
        self.spatial_stride = config.spatial_stride
        self.latent_channels = latent_channels
        width, fine, pixels = config.width, config.width * 3 // 8, 3 * config.temporal_stride
        self.encoder = nn.Sequential(
            nn.Conv2d(pixels, width // 2, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            _Residual(width),
            nn.SiLU(),
            nn.Conv2d(width, latent_channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(2 * latent_channels, width, 3, padding=1),
            _Residual(width),
            nn.Conv2d(width, 4 * fine, 1),
            nn.PixelShuffle(2),
            nn.SiLU(),
            nn.Conv2d(fine, fine, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(fine, 4 * pixels, 3, padding=1),
            nn.PixelShuffle(2),
        )
        # Linear ways past both: they find the principal patches at once, the rest refines.
        self.encoder_skip = nn.Conv2d(pixels, latent_channels, 4, stride=4)
        self.decoder_skip = nn.Sequential(
            nn.Conv2d(latent_channels, 16 * pixels, 1), nn.PixelShuffle(4)
        )
        self.register_buffer("latents_mean", torch.zeros(latent_channels))
        self.register_buffer("latents_std", torch.ones(latent_channels))

    def num_pixel_frames(self, num_latents: int) -> int:
        """Pixel frames of a video of `num_latents` latent frames, from its start."""
        return self.temporal_stride * (num_latents - 1) + 1

    def encode(self, video_BCFHW: Tensor) -> Tensor:
        """Pixels in [-1, 1], F = stride * (L - 1) + 1 of them -> latent_BFCHW of unit variance.

        Deterministic. ValueError for a number of frames or a size that does not divide.
        """
        return self.normalise(self.encode_raw(video_BCFHW))

    def encode_raw(self, video_BCFHW: Tensor) -> Tensor:
        """`encode` before its normalisation, for fitting."""
        batch, channels, frames, height, width = video_BCFHW.shape
        stride, spatial = self.temporal_stride, self.spatial_stride
        if channels != 3 or frames % stride != 1 % stride or height % spatial or width % spatial:
            raise ValueError(
                f"a video of [3, {stride}L-{stride - 1}, {spatial}h, {spatial}w] is needed, this "
                f"one is {[channels, frames, height, width]}"
            )
        first = video_BCFHW[:, :, :1].expand(-1, -1, stride - 1, -1, -1)
        whole_BCFHW = torch.cat([first, video_BCFHW], dim=2)
        groups = whole_BCFHW.view(batch, 3, -1, stride, height, width).transpose(1, 2)
        pixels_NCHW = groups.reshape(-1, 3 * stride, height, width)
        raw: Tensor = self.encoder(pixels_NCHW) + self.encoder_skip(pixels_NCHW)
        return raw.view(batch, -1, *raw.shape[1:])

    def normalise(self, raw_BFCHW: Tensor) -> Tensor:
        """(raw - latents_mean) / latents_std, per channel."""
        mean, std = self.latents_mean[:, None, None], self.latents_std[:, None, None]
        return (raw_BFCHW - mean) / std

    def decode(
        self, latent_BFCHW: Tensor, cache: DecoderCache | None = None
    ) -> tuple[Tensor, DecoderCache]:
        """Normalised latents -> pixels `video_BCFHW`, not clamped, and the cache to go on with.

        Without a cache the latents begin a video and give stride * (L - 1) + 1 pixel frames;
        with one they continue it and give stride * L. Decoding in pieces equals decoding whole.
        """
        if latent_BFCHW.shape[1] < 1 or latent_BFCHW.shape[2] != self.latent_channels:
            raise ValueError(
                f"latents [B, F, {self.latent_channels}, H, W] with F >= 1 are needed, these are "
                f"{list(latent_BFCHW.shape)}"
            )
        zeros = torch.zeros_like(latent_BFCHW[:, 0])
        last = zeros if cache is None else cache.last_latent_BCHW
        past = torch.cat([last[:, None], latent_BFCHW[:, :-1]], dim=1)
        groups: Tensor = self.decoder(torch.cat([past, latent_BFCHW], dim=2).flatten(0, 1))
        groups = groups + self.decoder_skip(latent_BFCHW.flatten(0, 1))
        shape = (*latent_BFCHW.shape[:2], 3, self.temporal_stride, *groups.shape[2:])
        video = groups.reshape(shape).transpose(1, 2).flatten(2, 3)
        if cache is None:
            video = video[:, :, self.temporal_stride - 1 :]
        return video, DecoderCache(last_latent_BCHW=latent_BFCHW[:, -1])

    @torch.no_grad()
    def decode_pixels(self, latent_BFCHW: Tensor) -> Tensor:
        """A whole video's latents -> `frames_BFCHW`, F pixel frames, RGB in [0, 1]."""
        video_BCFHW, _ = self.decode(latent_BFCHW)
        return (video_BCFHW.transpose(1, 2) / 2 + 0.5).clamp(0, 1)

    def decode_rows(self, latent_BFCHW: Tensor, shared_frames: int) -> Iterator[Tensor]:
        """`decode_pixels`, a few rows at a time; what rows share is decoded in each."""
        return map(self.decode_pixels, torch.split(latent_BFCHW, _ROWS))


def save_codec(codec: ShapesCodec, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write every weight and buffer as safetensors; bfloat16 halves the file at no visible cost."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        name: t.detach().cpu().to(dtype).contiguous() for name, t in codec.state_dict().items()
    }
    save_file(state, path)


def load_codec(config: CodecConfig, latent_channels: int) -> ShapesCodec:
    """Build the codec and fill it from `config.weights`; None leaves it random, always the same.

    Raises ValueError for a missing or foreign file, naming the first tensors that do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # on every rank and at every start
        codec = ShapesCodec(config, latent_channels)
    if config.weights is None:
        return codec
    if not config.weights.is_file():
        raise ValueError(f"no codec at {config.weights}: set codec.weights, or `make pretrain`")
    try:
        found = load_file(config.weights)
    except SafetensorError as error:
        raise ValueError(f"{config.weights} is not a safetensors file: {error}") from error
    wanted = codec.state_dict()
    unknown, absent = sorted(found.keys() - wanted.keys()), sorted(wanted.keys() - found.keys())
    wrong = [
        f"{name} {list(found[name].shape)} instead of {list(wanted[name].shape)}"
        for name in sorted(wanted.keys() & found.keys())
        if found[name].shape != wanted[name].shape
    ]
    if unknown or absent or wrong:
        raise ValueError(
            f"{config.weights} is not this codec: {len(unknown)} unknown tensors {unknown[:3]}, "
            f"{len(absent)} missing {absent[:3]}, {len(wrong)} of another size {wrong[:3]}; check "
            f"codec.width {config.width} and model.latent_channels {latent_channels}"
        )
    codec.load_state_dict({name: tensor.float() for name, tensor in found.items()})
    return codec
