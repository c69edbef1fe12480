"""Prompts that continue a video: its first frames as latents, from a file or a cache of latents."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from megatron_kvpo.config import ModelConfig
from megatron_kvpo.data.encoding import codec_fingerprint, encode_clip
from megatron_kvpo.data.latents import LatentCache
from megatron_kvpo.data.video import ClipSpec, decode_file, probe_file
from megatron_kvpo.model.codec import ShapesCodec
from megatron_kvpo.model.wan_vae import WanVae
from megatron_kvpo.parallel.collect import from_first
from megatron_kvpo.parallel.groups import Axis
from megatron_kvpo.records import Prompt
from megatron_kvpo.rollout.sampler import Beginning

_KEPT = 256
"""Beginnings that are remembered, on the CPU."""

_PROBES = 4
"""Files that are probed at once."""


class Beginnings:
    """What prompts begin with. Encoded when it is first asked for, then remembered."""

    def __init__(
        self, model: ModelConfig, codec: ShapesCodec | WanVae, device: torch.device,
        fps: float | None = None,
    ) -> None:  # fmt: skip
        """`fps`: pixel frames a second, by timestamps; None takes a file's as they stand."""
        self._model, self._codec, self._device, self._fps = model, codec, device, fps
        self._kept: OrderedDict[tuple[Path | None, int | None, int], Tensor] = OrderedDict()
        self._caches: dict[Path, LatentCache] = {}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError for a file that is missing, damaged or too short, or an unfit cache."""
        continued = [prompt for prompt in prompts if prompt.video is not None]
        with ThreadPoolExecutor(_PROBES) as pool:
            list(pool.map(self._check, continued))

    def shared(self, axes: Sequence[Axis]) -> Beginning:
        """A prompt -> clean latents [1, F, C, H, W] of its first `video_frames`, or None.

        The ranks along `axes` ask for the same prompts in the same order: the first of them
        decodes and encodes, so that all have the same bits.
        """
        speaks = all(axis.rank == 0 for axis in axes)

        def begin(prompt: Prompt) -> Tensor | None:
            if prompt.video is None:
                return None
            shape = (1, prompt.video_frames, *self._model.frame_shape)
            found = self._latent(prompt) if speaks else torch.empty(shape, device=self._device)
            return from_first(found, axes)

        return begin

    def _latent(self, prompt: Prompt) -> Tensor:
        key = prompt.video, prompt.clip, prompt.video_frames
        if key not in self._kept:
            self._kept[key] = self._cached(prompt) if self._is_cached(prompt) else (
                self._encoded(prompt).cpu())  # fmt: skip
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key].to(self._device)

    def _encoded(self, prompt: Prompt) -> Tensor:
        assert prompt.video is not None
        video_CFHW = decode_file(prompt.video, self._pixels(prompt))
        return encode_clip(self._codec, video_CFHW, "float32", self._device)[None]

    def _cached(self, prompt: Prompt) -> Tensor:
        cache, clip = self._cache(prompt)
        return cache.latent(clip)[None, : prompt.video_frames].contiguous()

    def _pixels(self, prompt: Prompt) -> ClipSpec:
        """The pixel frames of a prompt's beginning, at the generator's size."""
        size = self._model.pixel_size(self._codec.spatial_stride)
        count = self._codec.num_pixel_frames(prompt.video_frames)
        return ClipSpec(num_pixel_frames=count, size=size, fps=self._fps)

    @staticmethod
    def _is_cached(prompt: Prompt) -> bool:
        return prompt.clip is not None

    def _cache(self, prompt: Prompt) -> tuple[LatentCache, int]:
        """The cache that a prompt names, opened once, and the clip."""
        assert prompt.video is not None
        assert prompt.clip is not None
        if prompt.video not in self._caches:
            cache = LatentCache(prompt.video)
            own = codec_fingerprint(self._codec)
            if cache.spec.codec != own:
                raise ValueError(
                    f"{prompt.video} was encoded by codec {cache.spec.codec}, this run decodes "
                    f"with {own}: encode the videos with the codec of this recipe"
                )
            if None not in (self._fps, cache.spec.fps) and cache.spec.fps != self._fps:
                raise ValueError(
                    f"{prompt.video} holds {cache.spec.fps:g} pixel frames a second, "
                    f"data.video_fps is {self._fps:g}: encode the videos at that rate"
                )
            self._caches[prompt.video] = cache
        return self._caches[prompt.video], prompt.clip

    def _check(self, prompt: Prompt) -> None:
        where = f"prompt {prompt.index} continues {prompt.video}"
        if self._is_cached(prompt):
            cache, clip = self._cache(prompt)
            frames, *shape = cache.line(clip).shape
            if frames < prompt.video_frames or tuple(shape) != self._model.frame_shape:
                raise ValueError(
                    f"{where}, whose clip {clip} has {frames} latent frames of {shape}: "
                    f"{prompt.video_frames} of {list(self._model.frame_shape)} are needed"
                )
            return
        assert prompt.video is not None
        if prompt.video.is_dir():
            raise ValueError(f"{where}, a folder: name a video file, or a cache's 'clip' too")
        try:
            probe_file(prompt.video, self._pixels(prompt))
        except ValueError as error:
            raise ValueError(
                f"{where}, of which {prompt.video_frames} latent frames cannot be had: {error}"
            ) from error
