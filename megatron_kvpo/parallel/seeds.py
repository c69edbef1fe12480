"""Random numbers from coordinates, never from rank or from the order of calls.

A noise is named by what it is for (run seed, update, prompt, block, denoising step, ...), so any
layout of ranks draws the same one and a replay needs no stored state.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megatron_kvpo.parallel.transfer import to_device


def _seed(coordinates: tuple[int | str, ...]) -> int:
    """64 bits of BLAKE2b over the typed, length-prefixed coordinates: ("1",) is not (1,)."""
    if not coordinates:
        raise ValueError("noise has 0 coordinates: name what it is for, at least the run's seed")
    digest = hashlib.blake2b(digest_size=8)
    for value in coordinates:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError(
                f"coordinate {value!r} of {coordinates} is a {type(value).__name__}: "
                "use whole numbers and strings"
            )
        text = str(value).encode()
        digest.update(f"{'i' if isinstance(value, int) else 's'}{len(text)}:".encode() + text)
    return int.from_bytes(digest.digest(), "little")


def generator(*coordinates: int | str) -> torch.Generator:
    """A CPU generator for these coordinates alone, at its start.

    Torch's Mersenne Twister keeps 32 bits of the seed: among 300,000 coordinates about ten pairs
    share a stream. ValueError for no coordinate or one that is neither int nor str.
    """
    return torch.Generator("cpu").manual_seed(_seed(coordinates))


def device_generator(device: torch.device, *coordinates: int | str) -> torch.Generator:
    """A generator of the device for these coordinates: fast there, and each kind draws its own."""
    own = generator(*coordinates)
    return own if device.type == "cpu" else torch.Generator(device).manual_seed(own.initial_seed())


def noise(
    shape: tuple[int, ...], *coordinates: int | str, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal float32 numbers of `shape`, the same for the same coordinates on any rank.

    Drawn on the CPU, then moved: CUDA's generator would give other numbers. The global generator
    is not touched. ValueError for no coordinate or one that is neither int nor str.
    """
    drawn = torch.randn(shape, generator=generator(*coordinates), dtype=torch.float32, device="cpu")
    return to_device(drawn, device)
