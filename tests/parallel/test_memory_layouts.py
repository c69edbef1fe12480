"""MemFlow's bank and its sparse attention choose alike, however heads and tokens are shared."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron_kvpo.config import MemoryConfig, ParallelConfig
from megatron_kvpo.parallel.groups import start_ranks, stop_ranks
from megatron_kvpo.records import Prompt
from megatron_kvpo.rollout.sampler import generate_videos
from megatron_kvpo.rollout.stream import new_world
from tests.ranks import on_ranks
from tests.unit import small

SPARSE = MemoryConfig(bank_frames=3, stage_blocks=1, sparse=True, sparse_frames=2)
DENSE = dataclasses.replace(SPARSE, sparse=False)

LAYOUTS = {
    "alone": (),
    "tensor": ("parallel.tensor=2",),
    "sequence": ("parallel.tensor=2", "parallel.sequence_parallel=true"),
    "context": ("parallel.context=2",),
}


def _stream(memory: MemoryConfig, *overrides: str) -> Tensor:
    parallel: ParallelConfig = small.config(*overrides).parallel
    ranks = start_ranks(parallel, "cpu")
    tiny = small.build(ranks, *overrides)
    world = new_world(tiny.model, tiny.config.stream, tiny.config.routing, 4, memory)
    prompts = [
        Prompt(segments=small.TEXTS, switch_frames=(6, 15), index=0),
        Prompt(segments=small.TEXTS[1:], switch_frames=(15,), index=1),
    ]
    found = generate_videos(world, tiny.encode, prompts, [0, 3], 77)
    stop_ranks()
    return found


def _videos(rank: int) -> dict[str, Tensor]:
    found = {name: _stream(SPARSE, *overrides) for name, overrides in LAYOUTS.items()}
    return {**found, "dense": _stream(DENSE)}


@pytest.mark.gloo
def test_sparse_memory_attention_is_the_same_video_on_every_layout(tmp_path):
    first, second = on_ranks(2, _videos, folder=tmp_path)
    for name in LAYOUTS:
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], first["alone"], rtol=1e-4, atol=1e-4)
    assert (first["dense"] - first["alone"]).abs().max() > 1e-2, "what is chosen changes nothing"
