"""Fit the shapes codec on videos."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_kvpo.model.codec import ShapesCodec

LATENT_NOISE = 0.1
"""Standard deviation of the noise on normalised latents: the decoder must bear a generator."""

TAIL_LIMIT = 4.0
TAIL_WEIGHT = 0.1
"""A small cost on latents beyond 4 standard deviations, which a few-step generator hits badly."""

GRADIENT_WEIGHT = 0.5
CROP_LATENTS = 5
"""Length of a training clip. Any run of pixel frames is a video; short ones show more of them."""

STATISTICS_BATCHES = 16


def fit_codec(
    codec: ShapesCodec,
    videos: Tensor | Iterator[Tensor],
    *,
    steps: int,
    lr: float = 5e-3,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
    seed: int = 0,
    log_every: int = 50,
) -> dict[str, list[float]]:
    """Train in place; returns the curve: step, loss, psnr (dB, with latent noise), lr.

    `videos` is uint8 [N, F, H, W, 3], moved to `device` once and cut into clips of 5 latents that
    begin anywhere; or an iterator of float batches `video_BCFHW` in [-1, 1] that does not end
    before `steps` + 16 of them. Latents are normalised per channel over each batch while training;
    at the end latents_mean and latents_std are measured on 16 more batches (of whole videos) and
    the curve gains its last row: psnr without noise, through encode and decode. Raises ValueError
    for videos of another form, or a loss that is not finite.
    """
    codec.to(device).train()
    crop = codec.num_pixel_frames(CROP_LATENTS)
    batches = _batches(videos, batch_size, crop, torch.device(device), seed)
    noise = torch.Generator(device=device).manual_seed(seed)
    optimizer = torch.optim.Adam(codec.parameters(), lr=lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, steps))
    curve: dict[str, list[float]] = {"step": [], "loss": [], "psnr": [], "lr": []}
    for step in range(steps):
        video_BCFHW = next(batches)
        output_BCFHW, tails = _reconstruct(codec, video_BCFHW, noise)
        loss = reconstruction_loss(output_BCFHW, video_BCFHW) + TAIL_WEIGHT * tails
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % log_every == 0 or step == steps - 1:
            if not math.isfinite(loss.item()):
                raise ValueError(f"the codec's loss is {loss.item()} at step {step}: lower lr {lr}")
            rate = float(optimizer.param_groups[0]["lr"])
            _append(curve, step, loss.item(), psnr(output_BCFHW, video_BCFHW), rate)
    if isinstance(videos, Tensor):
        stride = codec.temporal_stride
        longest = (videos.shape[1] - 1) // stride * stride + 1
        batches = _batches(videos, 16, longest, torch.device(device), seed + 1)
    _append(curve, steps, *_finish(codec, batches), 0.0)
    return curve


def reconstruction_loss(output_BCFHW: Tensor, video_BCFHW: Tensor) -> Tensor:
    """Mean |d| + 4 mean d^2 + weighted mean |difference of d between neighbours in a frame|.

    The last term asks for the edges of the original (arXiv 1511.05440 has the idea).
    """
    error = output_BCFHW - video_BCFHW
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 4 * error.square().mean() + GRADIENT_WEIGHT * edges


def psnr(output: Tensor, target: Tensor) -> float:
    """Peak signal to noise ratio in dB of pixels in [-1, 1], so the peak is 2."""
    error = (output.detach().clamp(-1, 1) - target).square().mean().item()
    return 10 * math.log10(4 / max(error, 1e-12))


def _append(curve: dict[str, list[float]], *row: float) -> None:
    for name, value in zip(curve, row, strict=True):
        curve[name].append(value)


def _reconstruct(
    codec: ShapesCodec, video_BCFHW: Tensor, noise: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Through latents normalised over this batch and noised; and how far those reach out."""
    raw = codec.encode_raw(video_BCFHW)
    std, mean = torch.std_mean(raw, dim=(0, 1, 3, 4), keepdim=True)
    latent = (raw - mean) / (std + 1e-4)
    tails = (latent.abs() - TAIL_LIMIT).relu().square().mean()
    draw = torch.randn(latent.shape, generator=noise, device=latent.device)
    return codec.decode(latent + LATENT_NOISE * draw)[0], tails


@torch.no_grad()
def _finish(codec: ShapesCodec, batches: Iterator[Tensor]) -> tuple[float, float]:
    """Set the latent statistics; loss and PSNR of the codec as it will be used."""
    codec.eval()
    kept = [next(batches) for _ in range(STATISTICS_BATCHES)]
    raw = torch.cat([codec.encode_raw(video) for video in kept])
    std, mean = torch.std_mean(raw, dim=(0, 1, 3, 4))
    codec.latents_mean.copy_(mean)
    codec.latents_std.copy_(std + 1e-4)
    losses, errors = [], []
    for video in kept:
        output, _ = codec.decode(codec.encode(video))
        losses.append(reconstruction_loss(output, video).item())
        errors.append((output.clamp(-1, 1) - video).square().mean().item())
    error = max(sum(errors) / len(errors), 1e-12)
    return sum(losses) / len(losses), 10 * math.log10(4 / error)


def _batches(
    videos: Tensor | Iterator[Tensor], batch_size: int, crop: int, device: torch.device, seed: int
) -> Iterator[Tensor]:
    """Float batches on the device; without end for a tensor, in clips of `crop` pixel frames."""
    if not isinstance(videos, Tensor):
        for batch in videos:
            yield batch.to(device)
        raise ValueError("the videos ran out: give the fit an iterator without end")
    if videos.dtype != torch.uint8 or videos.ndim != 5 or videos.shape[-1] != 3:
        raise ValueError(
            f"videos must be uint8 [N, F, H, W, 3], not {videos.dtype} {list(videos.shape)}"
        )
    if videos.shape[1] < crop:
        raise ValueError(f"videos of {videos.shape[1]} pixel frames are below the {crop} of a clip")
    videos = videos.to(device)
    draw = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(len(videos), (batch_size, 1), generator=draw)
        starts = torch.randint(videos.shape[1] - crop + 1, (batch_size, 1), generator=draw)
        clips = videos[rows.to(device), (starts + torch.arange(crop)).to(device)]
        yield clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def _cosine(step: int, steps: int) -> float:
    """Warm-up over the first 2 %, then half a cosine down to 0."""
    warm = max(1, steps // 50)
    return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1.0)))
