"""Three-dimensional rotary embedding: time, height and width, by absolute latent frame."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_kvpo.parallel.transfer import to_device


class Rotary:
    """Tables of a model's grid. Pairs of a head lie in the order time, height, width."""

    def __init__(self, head_dim: int, grid: tuple[int, int], max_frames: int) -> None:
        """Head size, rows and columns of tokens in a frame, and the frames that are addressable."""
        side = head_dim // 6
        self.max_frames = max_frames
        self._frame = _phases(head_dim // 2 - 2 * side, max_frames)
        rows = _phases(side, grid[0])[:, None].expand(-1, grid[1], -1)
        columns = _phases(side, grid[1])[None].expand(grid[0], -1, -1)
        self._place = torch.cat([rows, columns], dim=-1).flatten(0, 1)
        self._made: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def table(self, frames: Sequence[int], device: torch.device) -> Tensor:
        """Unit rotations [2, L, E / 2] (cos, sin) of the tokens of these latent frames.

        ValueError when a frame lies past the table.
        """
        key = (tuple(frames), device)
        if key not in self._made:
            if frames and not 0 <= min(frames) <= max(frames) < self.max_frames:
                raise ValueError(
                    f"latent frames {min(frames)}..{max(frames)} leave the rotary table of "
                    f"{self.max_frames}: raise model.max_frames"
                )
            time = self._frame[list(frames)][:, None].expand(-1, len(self._place), -1)
            place = self._place[None].expand(len(frames), -1, -1)
            phase = torch.cat([time, place], dim=-1).flatten(0, 1)
            if len(self._made) > 256:
                self._made.clear()
            table = torch.stack([phase.cos(), phase.sin()]).float()
            self._made[key] = to_device(table, device)
        return self._made[key]


def _phases(pairs: int, positions: int) -> Tensor:
    """Position * 10000^(-i / pairs), [positions, pairs] in float64."""
    frequency = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))
    return torch.outer(torch.arange(positions, dtype=torch.float64), frequency)


def rotate(x_LBAE: Tensor, table_2LE: Tensor) -> Tensor:
    """Turn each interleaved pair of every head by its token's phase, in float32."""
    pairs = x_LBAE.float().view(*x_LBAE.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = table_2LE[:, :, None, None]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x_LBAE.dtype)
