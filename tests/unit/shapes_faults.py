"""Ways to spoil a clip of the shapes world, each with a strength, for the tests of the rewards."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_kvpo.world import BACKGROUND, Scene, positions


def ground() -> Tensor:
    return torch.tensor(BACKGROUND).view(3, 1, 1) / 255


def blur(x_FCHW: Tensor, sigma: float) -> Tensor:
    if sigma == 0:
        return x_FCHW
    steps = torch.arange(-8.0, 9)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    padded = torch.nn.functional.pad(x_FCHW, (8, 8, 8, 8), mode="replicate")
    rows = torch.nn.functional.conv2d(padded, kernel[:, :, None], groups=3)
    return torch.nn.functional.conv2d(rows, kernel[..., None], groups=3)


def fade(x_FCHW: Tensor, share: float) -> Tensor:
    return ground() + (1 - share) * (x_FCHW - ground())


def brighten(x_FCHW: Tensor, share: float) -> Tensor:
    return (ground() + (1 + share) * (x_FCHW - ground())).clamp(0, 1)


def saturate(x_FCHW: Tensor, share: float) -> Tensor:
    grey = x_FCHW.mean(1, keepdim=True)
    return (grey + (1 + share) * (x_FCHW - grey)).clamp(0, 1)


def wash_out(x_FCHW: Tensor, share: float) -> Tensor:
    return saturate(x_FCHW, -share)


def noise(x_FCHW: Tensor, sigma: float) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return (x_FCHW + sigma * torch.randn(x_FCHW.shape, generator=generator)).clamp(0, 1)


def ghost(x_FCHW: Tensor, share: float) -> Tensor:
    copy = fade(torch.roll(x_FCHW, (11, 13), dims=(2, 3)), 1 - share)
    return torch.maximum(x_FCHW, copy)


PICTURE_FAULTS = [
    (blur, [0, 0.4, 0.6, 0.8, 1.1, 1.5, 2.0, 3.0]),
    (fade, [0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8]),
    (brighten, [0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0]),
    (saturate, [0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0]),
    (wash_out, [0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0]),
    (noise, [0, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3]),
    (ghost, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8]),
]


def jittered(scene: Scene, amplitude: float) -> np.ndarray:
    path = positions(scene)
    return path + amplitude * np.random.default_rng(5).standard_normal(path.shape)


def slowed(scene: Scene, share: float) -> np.ndarray:
    times = np.arange(scene.num_pixel_frames) * (1 - share)
    return positions(scene)[:, np.rint(times).astype(int)] if share == 0 else _at(scene, times)


def hastened(scene: Scene, share: float) -> np.ndarray:
    times = np.minimum(np.arange(scene.num_pixel_frames) * (1 + share), scene.num_pixel_frames - 1)
    return _at(scene, times)


def _at(scene: Scene, times: np.ndarray) -> np.ndarray:
    path, grid = positions(scene), np.arange(scene.num_pixel_frames)
    return np.stack([[np.interp(times, grid, axis) for axis in p.T] for p in path]).swapaxes(1, 2)


def shuffled(scene: Scene, share: float) -> np.ndarray:
    order = np.arange(scene.num_pixel_frames)
    rng = np.random.default_rng(3)
    chosen = rng.permutation(len(order))[: int(share * len(order))]
    order[chosen] = rng.permutation(order[chosen])
    return positions(scene)[:, order]


def frozen(scene: Scene, share: float) -> np.ndarray:
    """The last share of each segment stands still, the next begins where it would have been."""
    order = np.arange(scene.num_pixel_frames)
    for a, b in zip(scene.starts, (*scene.starts[1:], scene.num_pixel_frames), strict=True):
        hold = a + round((1 - share) * (b - a))
        order[hold:b] = max(hold - 1, a)
    return positions(scene)[:, order]


def teleporting(scene: Scene, distance: float) -> np.ndarray:
    path = positions(scene)
    middle = scene.num_pixel_frames // 3
    path[:, middle:] += np.where(path[:, :1] > 16, -1, 1) * distance / np.sqrt(2)
    return path


MOTION_FAULTS = [
    (jittered, [0, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0]),
    (slowed, [0, 0.1, 0.25, 0.4, 0.6, 0.8, 1.0]),
    (hastened, [0, 0.1, 0.25, 0.5, 0.75, 1.0]),
    (shuffled, [0, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0]),
    (frozen, [0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0]),
    (teleporting, [0, 1, 2, 4, 6, 8]),
]
