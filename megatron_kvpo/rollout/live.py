"""One video that streams while it is watched: block after block, a new prompt at any block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_kvpo.model.causal_wan import TextKeys
from megatron_kvpo.parallel.transfer import current
from megatron_kvpo.rollout.sampler import (
    TextEncoder,
    admit,
    block_noise,
    encode_texts,
    extend,
)
from megatron_kvpo.rollout.stream import Stream, World


class LiveVideo:
    """A video without an end.

    The same prompts, noises and switches as `generate_videos` give the same latents, if nothing is
    added in the pass that fills the cache (stream.context_noise 0).

    video = LiveVideo(world, encode, "a red square moves right", (seed, 0, 0))
    latent_BFCHW = video.next_block()
    video.switch("it turns blue")
    """

    def __init__(
        self, world: World, encode: TextEncoder, prompt: str, coordinates: tuple[int | str, ...]
    ) -> None:
        """Begin a video. `coordinates` name its noises, but for the latent frame."""
        self._world, self._encode, self._coordinates = world, encode, coordinates
        with torch.no_grad():
            window = world.stream.window_frames
            self._stream = Stream.begin(world, 1, self._text(prompt), resident=window)
        self._latents: list[Tensor] = []

    @property
    def frame(self) -> int:
        """Latent frames done: the first of the next block."""
        return self._stream.frame

    @torch.no_grad()
    def next_block(self) -> Tensor:
        """Generate the next block: clean latents [1, F, C, H, W].

        Raises:
            ValueError: the video has reached model.max_frames.
        """
        world, frame = self._world, self.frame
        config, model = world.stream, world.model
        draw = block_noise(
            model.model_config, config, (*self._coordinates, frame), model.spec.ranks.device
        )
        clean = extend(self._stream, draw, (*self._coordinates, frame)).clean
        self._latents.append(clean)
        return clean

    @torch.no_grad()
    def show(self, clean_BFCHW: Tensor) -> Tensor:
        """Let the next block be this one, of a video that is continued; it is returned.

        Raises:
            ValueError: these are not the latents of one block.
        """
        shape = (1, self._world.stream.block_frames, *self._world.model.model_config.frame_shape)
        if tuple(clean_BFCHW.shape) != shape:
            raise ValueError(f"latents {list(clean_BFCHW.shape)} are no block {list(shape)}")
        admit(self._stream, clean_BFCHW, (*self._coordinates, self.frame))
        self._latents.append(clean_BFCHW)
        return clean_BFCHW

    @torch.no_grad()
    def switch(self, prompt: str) -> None:
        """Go on under another prompt from the next block; what the window holds is re-cached."""
        text = self._text(prompt)
        if self._latents:
            self._stream.recache(text, torch.cat(self._latents, dim=1))
        else:
            self._stream.text = text

    def close(self) -> None:
        """Give the video's pages back."""
        self._stream.release()

    def _text(self, prompt: str) -> TextKeys:
        return encode_texts(self._world.model, self._encode, [prompt])


class LiveDecoder:
    """Pixels of one video as its latents come, on the generator's device or beside it on another.

    With a device of its own the decoder gives each block one call late: it decodes while the next
    block is made, and a block takes as long as the slower of the two.
    """

    def __init__(self, codec: Any, device: torch.device, *, beside: bool = False) -> None:
        """`codec`: a WanVae or ShapesCodec, whose weights are there. `beside`: another device."""
        self._codec, self._device, self._beside = codec, device, beside
        self._cache: Any = None
        self._waiting: Tensor | None = None

    @torch.no_grad()
    def next_pixels(self, latent_BFCHW: Tensor) -> Tensor | None:
        """Pixel frames [F, 3, H, W] in [0, 1] of these latents.

        Beside the generator those of the call before, in host memory; None at the first.
        """
        done = self.last_pixels()
        with current(self._device):
            latent_BFCHW = latent_BFCHW.to(self._device, non_blocking=True)
            video_BCFHW, self._cache = self._codec.decode(latent_BFCHW, self._cache)
            pixels_FCHW: Tensor = (video_BCFHW[0].transpose(0, 1).float() / 2 + 0.5).clamp(0, 1)
        if not self._beside:
            return pixels_FCHW
        self._waiting = pixels_FCHW
        return done

    def last_pixels(self) -> Tensor | None:
        """What the last call has left behind, waited for."""
        done, self._waiting = self._waiting, None
        if done is None:
            return None
        with current(self._device):
            return done.cpu()  # before more is asked of the device: a copy waits for that, too
