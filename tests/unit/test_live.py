"""A video that is watched while it streams is the video that evaluation makes."""

from __future__ import annotations

import pytest
import torch

from megatron_kvpo.records import Prompt
from megatron_kvpo.rollout.live import LiveVideo
from megatron_kvpo.rollout.sampler import generate_videos
from tests.unit import small

ranks = small.ranks
SWITCHES = (6, 15)
TEXTS = (*small.TEXTS[:2], small.TEXTS[0])


def watch(tiny: small.Small, num_frames: int, texts=TEXTS, switches=SWITCHES) -> torch.Tensor:
    video = LiveVideo(tiny.world, tiny.encode, texts[0], (9, 0, 4))
    blocks = []
    while video.frame < num_frames:
        if video.frame in switches:
            video.switch(texts[1 + switches.index(video.frame)])
        blocks.append(video.next_block())
    video.close()
    return torch.cat(blocks, dim=1)


@pytest.mark.parametrize("more", [(), ("memory.bank_frames=2", "memory.stage_blocks=2")])
def test_block_by_block_gives_the_bits_of_generate_videos(ranks, more):
    tiny = small.build(ranks, *more)
    prompt = Prompt(segments=TEXTS, switch_frames=SWITCHES, index=0)
    whole = generate_videos(tiny.world, tiny.encode, [prompt], [4], seed=9)
    watched = watch(tiny, whole.shape[1])
    assert torch.equal(watched, whole)
    assert tiny.world.pool.num_free == tiny.num_pages


def test_a_switch_leaves_what_was_shown_and_changes_what_comes(ranks):
    tiny = small.build(ranks)
    kept, switched = watch(tiny, 12, TEXTS[:1], ()), watch(tiny, 12, TEXTS[:2], (6,))
    assert torch.equal(kept[:, :6], switched[:, :6])
    assert not torch.equal(kept[:, 6:9], switched[:, 6:9])


def test_a_switch_before_the_first_block_is_the_first_prompt(ranks):
    tiny = small.build(ranks)
    late = LiveVideo(tiny.world, tiny.encode, TEXTS[1], (9, 0, 4))
    late.switch(TEXTS[0])
    assert torch.equal(late.next_block(), watch(tiny, 3, TEXTS[:1], ()))
    late.close()


def test_a_video_ends_where_the_rotary_table_does(ranks):
    tiny = small.build(ranks, "model.max_frames=18", "stream.num_frames=18",
                       "stream.resident_frames=18")  # fmt: skip
    with pytest.raises(ValueError, match=r"leave the rotary table of 18: raise model.max_frames"):
        watch(tiny, 21, TEXTS[:1], ())
