"""The pool of a run: what rollout, replay and evaluation take is what was counted, and no less."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_kvpo.config import MemoryConfig
from megatron_kvpo.rollout.replay import Push, replay
from megatron_kvpo.rollout.sampler import generate_videos
from megatron_kvpo.rollout.sizing import branch_pages, run_pages, video_pages
from megatron_kvpo.rollout.stream import World
from megatron_kvpo.routing import legal_forks
from tests.unit import small

ranks = small.ranks

NO_BANK, BANK = MemoryConfig(), MemoryConfig(bank_frames=3, stage_blocks=1)
PLAIN, INSIDE, MANY = small.ONE, small.switching(18), small.switching(6, 15, 18, 24)
LONG = ("stream.num_frames=30", "stream.resident_frames=21")


class Lowest:
    """The least number of free pages that was ever seen."""

    def __init__(self, pool, monkeypatch) -> None:
        self.free, take = pool.num_free, pool.take

        def taken() -> int:
            page = take()
            self.free = min(self.free, pool.num_free)
            return page

        monkeypatch.setattr(pool, "take", taken)


def worlds(ranks, memory: MemoryConfig, prompt, monkeypatch) -> tuple[small.Small, Lowest]:
    """A world with just the pages that a run of this one prompt asks for."""
    tiny = small.build(ranks, *LONG)
    config, count = tiny.config, tiny.config.routing.num_branches + 1
    pages = run_pages(config.stream, config.routing, memory, [prompt], [prompt],
                      groups=1, sequences=count, videos=2)  # fmt: skip
    pool = tiny.model.new_pool(pages)
    world = World(tiny.model, pool, config.stream, config.routing, memory)
    return dataclasses.replace(tiny, world=world), Lowest(world.pool, monkeypatch)


@pytest.mark.parametrize("memory", [NO_BANK, BANK], ids=["plain", "bank"])
@pytest.mark.parametrize("prompt", [PLAIN, INSIDE, MANY], ids=["plain", "inside", "many"])
def test_a_group_fits_and_uses_what_was_counted(ranks, memory, prompt, monkeypatch):
    tiny, lowest = worlds(ranks, memory, prompt, monkeypatch)
    tiny.stir("current", "old")
    total = tiny.world.pool.num_free
    for fork in legal_forks(tiny.config.stream, tiny.config.routing):
        sampled = tiny.roll_out(tiny.plan(fork), prompt)
        rows = range(len(sampled.group.sequences))
        noises = tiny.noises(prompt)
        with tiny.policy.acting("current"):
            replay(sampled, tiny.encode, noises, tiny.config.energy, rows)
            push = Push(weight_B=torch.ones(len(rows)))
            replay(sampled, tiny.encode, noises, tiny.config.energy, rows, push=push)
        sampled.release()
        assert tiny.world.pool.num_free == total
    slack = 3 if memory is NO_BANK else total // 3
    assert lowest.free <= slack, f"{lowest.free} of {total} pages were never used"


@pytest.mark.parametrize("prompt", [PLAIN, INSIDE, MANY], ids=["plain", "inside", "many"])
def test_videos_keep_their_window_only(ranks, prompt, monkeypatch):
    tiny = small.build(ranks, *LONG)
    stream = tiny.config.stream
    pages = 2 * video_pages(stream, NO_BANK, [prompt])
    assert pages <= 2 * (stream.window_frames + stream.sink_frames)
    world = World(tiny.model, tiny.model.new_pool(pages), stream, tiny.config.routing, NO_BANK)
    lowest = Lowest(world.pool, monkeypatch)
    tight = generate_videos(world, tiny.encode, [prompt] * 2, [0, 1], 5)
    assert lowest.free == 0
    assert torch.equal(tight, generate_videos(tiny.world, tiny.encode, [prompt] * 2, [0, 1], 5))


def test_the_recipe_of_the_paper_fits_an_h100():
    """147 frames, P = 5, 8 branches and the anchor, 287 MB a page: no switch in the window."""
    config = small.config("stream.num_frames=147", "stream.resident_frames=33",
                          "routing.num_routed_blocks=5", "routing.num_branches=8",
                          "routing.fork_chunks=8", "model.max_frames=256")  # fmt: skip
    quiet = dataclasses.replace(PLAIN, switch_frames=(), segments=PLAIN.segments)
    assert branch_pages(config.stream, config.routing, [quiet]) == 15
    pages = run_pages(config.stream, config.routing, NO_BANK, [quiet], [], groups=1, sequences=9,
                      videos=0)  # fmt: skip
    assert pages == 33 + 9 * 15
    assert pages * 0.287 < 49
    assert branch_pages(config.stream, config.routing, [small.switching(27, 72)]) == 24
