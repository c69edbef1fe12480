"""A video's decoder on a second GPU, while the first is busy with the next block."""

from __future__ import annotations

import pytest
import torch

from megatron_kvpo.model.wan_vae import WanVae
from megatron_kvpo.rollout.live import LiveDecoder
from tests.unit.test_wan_vae import CHANNELS, tiny

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices"),
]


def test_a_second_gpu_decodes_to_the_same_bits_beside_the_first():
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    vae = WanVae(tiny().to(torch.bfloat16))
    rng = torch.Generator(first).manual_seed(0)
    noise = [torch.randn(1, 3, CHANNELS, 8, 8, generator=rng, device=first) for _ in range(4)]
    large = torch.randn(8192, 8192, device=first, dtype=torch.bfloat16)
    with vae.resident(first):
        alone = LiveDecoder(vae, first)
        expected = [alone.next_pixels(block) for block in noise]
    with vae.resident(second):
        beside, found = LiveDecoder(vae, second, beside=True), []
        for block in noise:
            for _ in range(20):
                large @ large  # the block's latents come after this
            found.append(beside.next_pixels(block * 2 / 2))
        found.append(beside.last_pixels())
    assert found[0] is None
    for got, wanted in zip(found[1:], expected, strict=True):
        assert got is not None
        assert wanted is not None
        assert not got.is_cuda
        assert torch.equal(got, wanted.cpu())
    assert torch.cuda.current_device() == 0
