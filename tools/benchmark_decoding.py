"""What decoding adds to a video that streams: one after the other, or on a device beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_kvpo.config import RunConfig
from megatron_kvpo.model.wan_vae import WanVae
from megatron_kvpo.parallel.groups import Ranks
from megatron_kvpo.parallel.seeds import noise
from megatron_kvpo.parallel.transfer import current
from megatron_kvpo.rollout.live import LiveDecoder
from megatron_kvpo.training.parts import build_codec
from tools.benchmark_kernels import Call, call_times, median
from tools.generate_output import decoding_device

_MODULE = "tools.benchmark_passes"


def decoding(
    config: RunConfig, ranks: Ranks, decode_on: str | None, block_ms: float,
    next_block: Callable[[], Tensor], warmup: int, repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """Milliseconds of decoding a block alone, and of a block with it.

    Args:
        config: names the VAE.
        ranks: one, if `decode_on` is given.
        decode_on: another device; each block is decoded there while the next is made.
        block_ms: what a block takes without.
        next_block: makes the next block's latents [1, F, C, H, W].
        warmup: calls that do not count.
        repeats: calls that do.
    """
    codec = build_codec(config, ranks)
    assert isinstance(codec, WanVae)
    device = ranks.device if decode_on is None else decoding_device(decode_on, ranks)
    shape = (1, config.stream.block_frames, *config.model.frame_shape)
    latent_BFCHW = noise(shape, _MODULE, "decode", device=device)
    with codec.resident(device):
        with current(device):
            cache = codec.decode(latent_BFCHW)[1]
            call: Call = lambda: codec.decode(latent_BFCHW, cache)  # noqa: E731
            call_times(call, device, warmup)
            taken = median(call_times(call, device, repeats))
        if decode_on is None:
            return {"decode_ms": taken, "with_decode_ms": block_ms + taken}
        decoder = LiveDecoder(codec, device, beside=True)
        for _ in range(warmup):
            decoder.next_pixels(next_block())
        started = time.perf_counter()
        for _ in range(repeats):  # each waits for the pixels of the one before
            decoder.next_pixels(next_block())
        streamed = 1000 * (time.perf_counter() - started) / repeats
    return {"decode_ms": taken, "with_decode_ms": streamed, "decode_on": decode_on}
