"""Rectified flow: noise levels, noisy state <-> clean latent <-> velocity, one sampler step.

    state = (1 - sigma) clean + sigma noise          velocity = noise - clean

so clean = state - sigma velocity. Everything is elementwise and deterministic: noise is an
argument, never drawn here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

from torch import Tensor

Level = TypeVar("Level", float, Tensor)

NUM_TIMESTEPS = 1000
"""The model's time runs from 0 (clean) to this (pure noise)."""


def sampler_sigmas(steps: Sequence[float], shift: float) -> tuple[float, ...]:
    """Noise level of each denoising step: sigma(s) = shift s / (1 + (shift - 1) s).

    Args:
        steps: Falling times in (0, 1], one per step.
        shift: Above 1 spends more steps at high noise; 1 leaves the steps as they are.

    Raises:
        ValueError: `shift` is not positive, or a step lies outside [0, 1].
    """
    if shift <= 0:
        raise ValueError(f"stream.shift is {shift}: it must be above 0 (1 shifts nothing)")
    outside = [s for s in steps if not 0 <= s <= 1]
    if outside:
        raise ValueError(f"steps {outside} lie outside [0, 1]: 1 is pure noise, 0 is clean")
    return tuple(shift * s / (1 + (shift - 1) * s) for s in steps)


def timestep(sigma: Level) -> Level:
    """The number the model's time embedding takes at noise level `sigma`: 1000 sigma."""
    return NUM_TIMESTEPS * sigma


def add_noise(clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """Noisy state (1 - sigma) clean + sigma noise; a tensor `sigma` must broadcast."""
    return (1 - sigma) * clean + sigma * noise


def clean_from_velocity(state: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    """Clean estimate z - sigma v of a state at noise level `sigma`."""
    return state - sigma * velocity


def next_state(
    kind: Literal["renoise", "euler"],
    state: Tensor,
    velocity: Tensor,
    clean: Tensor,
    sigma: float | Tensor,
    next_sigma: float | Tensor,
    noise: Tensor | None,
) -> Tensor:
    """State at `next_sigma` after one denoising step taken at `sigma`.

    `renoise` noises the clean estimate afresh, (1 - sigma') clean + sigma' noise; `euler` follows
    the ODE, z + (sigma' - sigma) v, and ignores `noise`.

    Raises:
        ValueError: `kind` is neither, or `renoise` was given no noise.
    """
    if kind == "euler":
        return state + (next_sigma - sigma) * velocity
    if kind != "renoise":
        raise ValueError(f"stream.sampler is {kind!r}: choose renoise or euler")
    if noise is None:
        raise ValueError("sampler renoise needs fresh noise at every step but the last; got None")
    return add_noise(clean, noise, next_sigma)
