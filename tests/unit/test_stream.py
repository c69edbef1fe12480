"""What a block sees, bit by bit: windows, routes, eviction, re-cache, and many rows at once."""

from __future__ import annotations

import pytest
import torch

from megatron_kvpo.model.pages import PassPages
from megatron_kvpo.records import Prompt
from megatron_kvpo.rollout.sampler import denoise_block, generate_videos
from megatron_kvpo.rollout.stream import Stream, new_world
from megatron_kvpo.routing import plain_context
from tests.unit import small

ranks = small.ranks


@pytest.fixture(scope="module")
def tiny(ranks):
    return small.build(ranks)


@pytest.fixture(autouse=True)
def no_leak(tiny):
    """Whatever a test streams and releases leaves the pool as it was."""
    yield
    assert tiny.world.pool.num_free == tiny.num_pages, "pages leaked"


@torch.no_grad()
def seen_frames(stream: Stream, state, routed=None) -> list[set[int]]:
    """Cached frames on which each row's velocity depends, found by spoiling one at a time."""
    pool = stream.world.pool
    plain = stream.velocity(state, 0.8, routed)
    found: list[set[int]] = [set() for _ in stream.tables]
    for frame in sorted(stream.tables[0].pages):
        pages = sorted({table.pages[frame] for table in stream.tables})
        for held in (pool.key, pool.value):
            kept = held[:, pages].clone()
            held[:, pages] += 1
            moved = stream.velocity(state, 0.8, routed) != plain
            held[:, pages] = kept
            for row in moved.flatten(1).any(1).nonzero().flatten().tolist():
                found[row].add(frame)
    assert torch.equal(stream.velocity(state, 0.8, routed), plain)
    return found


@pytest.mark.parametrize("frame", [0, 3, 6, 12, 18])
def test_a_block_sees_the_sink_and_the_newest_frames_and_nothing_else(tiny, frame):
    stream = tiny.streamed(frame) if frame else Stream.begin(tiny.world, 1, tiny.text())
    seen = seen_frames(stream, tiny.latents(3, 1, "noisy"))
    assert seen == [set(plain_context(frame, tiny.config.stream))]
    stream.release()


def test_a_branch_sees_its_routed_frames_and_none_outside_its_plan(tiny):
    routes = [(3, 5, 6, 8, 9), (4, 6, 7, 9, 10), ()]
    prefix = tiny.streamed(12)
    stream = prefix.fork(3, tiny.text(*[small.TEXTS[0]] * 3))
    seen = seen_frames(stream, tiny.latents(3, 3, "noisy"), routes)
    assert seen == [
        {0, 1, 2, 3, 5, 6, 8, 9, 11}, {0, 1, 2, 4, 6, 7, 9, 10, 11},
        {0, 1, 2, *range(6, 12)},
    ]  # fmt: skip
    stream.commit(tiny.latents(3, 3, "own"), routes)
    seen = seen_frames(stream, tiny.latents(3, 3, "noisy"), routes)
    for row, route in enumerate(routes[:2]):
        assert seen[row] == {0, 1, 2, *route, 14}, "recent is the branch's own newest frame"
    seen = seen_frames(stream, tiny.latents(3, 3, "noisy"))
    assert seen == [{0, 1, 2, *range(9, 15)}] * 3, "the window rolls on normally"
    stream.release()
    prefix.release()


@torch.no_grad()
def test_routing_the_plain_window_is_the_anchor_bit_for_bit(tiny):
    window, other = (6, 7, 8, 9, 10), (3, 4, 5, 8, 9)
    prefix = tiny.streamed(12)
    stream = prefix.fork(3, tiny.text(*[small.TEXTS[0]] * 3))
    routed = [window, other, ()]
    record = denoise_block(stream, lambda step: noisy(tiny, step).expand(3, -1, -1, -1, -1), routed)
    stream.commit(record.clean, routed)
    for states in (record.states, record.velocities, [record.clean]):
        assert all(torch.equal(state[0], state[2]) for state in states)
    assert not torch.equal(record.velocities[0][1], record.velocities[0][2])
    pages = [table.lookup(range(12, 15)) for table in stream.tables]
    for held in (tiny.world.pool.key, tiny.world.pool.value):
        assert torch.equal(held[:, pages[0]], held[:, pages[2]])
        assert not torch.equal(held[:, pages[1]], held[:, pages[2]])
    stream.release()
    prefix.release()


def noisy(tiny, step: int) -> torch.Tensor:
    return tiny.latents(3, 1, f"noise {step}")


def test_the_clean_pass_reads_the_routed_frames_too(tiny):
    prefix = tiny.streamed(12)
    text = tiny.text(*small.TEXTS[:1] * 2)
    keys = []
    for routed in ([(3, 4, 5, 6, 7), ()], None):
        stream = prefix.fork(2, text)
        stream.commit(tiny.latents(3).expand(2, -1, -1, -1, -1), routed)
        pages = [table.lookup(range(12, 15)) for table in stream.tables]
        keys.append(tiny.world.pool.key[:, pages].clone())
        stream.release()
    prefix.release()
    routed, plain = keys
    assert torch.equal(routed[0], plain[0]), "keys of the first layer come before any attention"
    assert not torch.equal(routed[1, 0], plain[1, 0])
    assert torch.equal(routed[1, 1], plain[1, 1])


def test_a_route_into_a_frame_that_left_is_refused(ranks):
    tiny = small.build(ranks, "stream.resident_frames=15")
    stream = tiny.streamed(18)
    assert sorted(stream.tables[0].pages) == [0, 1, 2, *range(6, 18)]
    with pytest.raises(ValueError, match=r"latent frames \[5\] have left the cache"):
        stream.velocity(tiny.latents(3), 0.8, [(5, 6, 7, 8, 9)])
    stream.release()
    assert tiny.world.pool.num_free == tiny.num_pages


def test_fewer_resident_frames_change_no_number_of_a_plain_stream(ranks, tiny):
    lean = small.build(ranks, "stream.resident_frames=12")
    prompts = [small.ONE, small.switching(15, index=3)]
    videos = [generate_videos(t.world, t.encode, prompts, [0, 1], 9) for t in (tiny, lean)]
    assert torch.equal(*videos)


def test_velocity_leaves_nothing_behind(tiny):
    stream = tiny.streamed(9)
    before = tiny.world.pool.key.clone(), tiny.world.pool.num_free, dict(stream.tables[0].pages)
    with torch.no_grad():
        stream.velocity(tiny.latents(3), 0.5)
    assert torch.equal(before[0], tiny.world.pool.key)
    assert before[1:] == (tiny.world.pool.num_free, stream.tables[0].pages)
    assert stream.frame == 9
    stream.release()


@torch.no_grad()
@pytest.mark.parametrize("bank", [0, 2])
def test_a_pass_that_only_fills_leaves_what_a_whole_one_leaves(ranks, bank):
    """The last block's output is not computed; of the others nothing is left out."""
    tiny = small.build(ranks, f"memory.bank_frames={bank}")
    pool, filled = tiny.world.pool, []
    stream = tiny.streamed(12, rows=2)
    context = torch.tensor([t.lookup(plain_context(12, tiny.config.stream)) for t in stream.tables])
    free = [pool.take() for _ in range(6)]
    for fills in (False, True):
        pages = PassPages(
            pool, context, torch.tensor(free).view(2, 3), num_memory=3, fills_only=fills
        )
        pool.key[:, free], pool.value[:, free] = 7.0, 7.0
        out = tiny.model(tiny.latents(3, 2), torch.zeros(2, 1), range(12, 15), stream.text, pages)
        assert out.numel() == (0 if fills else tiny.latents(3, 2).numel())
        filled.append((pool.key[:, free].clone(), pool.value[:, free].clone()))
    for whole, only in zip(*filled, strict=True):
        assert torch.equal(whole, only)
        assert not (only == 7.0).all(dim=(2, 3, 4)).any(), "a page was left as it was"
    for page in free:
        pool.drop(page)
    stream.release()
    assert pool.num_free == tiny.num_pages


@torch.no_grad()
def test_a_switch_of_many_rows_goes_in_parts_of_a_blocks_tokens(ranks):
    tiny = small.build(ranks)
    latent, seen, model = tiny.latents(15, 6), [], tiny.model.forward
    texts = tiny.text(*[small.TEXTS[n % 2] for n in range(6)])
    stream = tiny.streamed(15, rows=6)

    def counted(latent_BFCHW, *rest):
        seen.append(tuple(latent_BFCHW.shape[:2]))
        return model(latent_BFCHW, *rest)

    tiny.model.forward = counted
    stream.recache(texts, latent)
    tiny.model.forward = model
    assert seen == [(2, 12)] * 3  # 6 rows of 3 frames are 18 frames
    for row in range(6):
        alone = tiny.streamed(15, rows=6)
        text = texts.select(torch.tensor([row]))
        alone.part([row], text).recache(text, latent[row : row + 1])
        for frame in range(3, 15):
            ours, theirs = (t.tables[row].pages[frame] for t in (stream, alone))
            torch.testing.assert_close(tiny.world.pool.key[:, ours], tiny.world.pool.key[:, theirs])
        alone.release()
    stream.release()


def test_only_a_single_row_forks(tiny):
    stream = tiny.streamed(3, rows=2)
    with pytest.raises(ValueError, match="stream of 1 row forks, this one has 2"):
        stream.fork(3, stream.text)
    stream.release()


def test_a_branch_does_not_write_into_its_siblings_or_its_prefix(tiny):
    prefix = tiny.streamed(12)
    pages = prefix.tables[0].lookup(range(12))
    before = tiny.world.pool.key[:, pages].clone()
    stream = prefix.fork(2, tiny.text(*small.TEXTS[:1] * 2))
    stream.commit(tiny.latents(3, 2, "own"))
    stream.recache(tiny.text(*small.TEXTS[:2]), tiny.latents(15, 2))
    assert torch.equal(tiny.world.pool.key[:, pages], before)
    own = [table.lookup(range(3, 15)) for table in stream.tables]
    assert not set(own[0]) & set(own[1])
    stream.release()
    prefix.release()


def shift_in_text(tiny, frame: int) -> tuple[Stream, dict[int, tuple], torch.Tensor]:
    """A stream that switched its text at `frame`; its pages and their keys from before."""
    stream = tiny.streamed(frame)
    pool, pages = tiny.world.pool, stream.tables[0].pages
    before = {f: (pool.key[:, p].clone(), pool.value[:, p].clone()) for f, p in pages.items()}
    stream.recache(tiny.text(small.TEXTS[1]), tiny.latents(frame))
    return stream, before, pool.key


@pytest.mark.parametrize("frame", [3, 6, 9, 12, 15, 18])
def test_a_switch_rewrites_the_last_window_and_keeps_the_sink(tiny, frame):
    """Frames [f - 12, f) but the sink; before frame 15 there are fewer."""
    stream, before, _ = shift_in_text(tiny, frame)
    pool, table = tiny.world.pool, stream.tables[0]
    assert sorted(table.pages) == sorted(before) == list(range(frame))
    rewritten = set(range(max(3, frame - 12), frame))
    for f, (key, value) in before.items():
        now = pool.key[:, table.pages[f]], pool.value[:, table.pages[f]]
        assert torch.equal(now[1], value) == (f not in rewritten), f
        assert torch.equal(now[0], key) == (f not in rewritten), f
    assert stream.frame == frame
    stream.release()


@pytest.mark.parametrize("frame", [6, 9, 12, 15, 18])
@torch.no_grad()
def test_a_switch_is_one_pass_of_all_twelve_frames_that_see_sink_and_last_nine(tiny, frame):
    """As the definition has it: the sink's frames, where among the twelve, are queries too."""
    stream, _, _ = shift_in_text(tiny, frame)
    pool, first = tiny.world.pool, max(0, frame - 12)
    seen_from = max(3, frame - 9)
    manual = tiny.streamed(frame)
    sink = torch.tensor([manual.tables[0].lookup(range(3))])
    own = torch.tensor([[pool.take() for _ in range(first, frame)]])
    pages = PassPages(pool, sink, own, seen_from - first)
    tiny.model(tiny.latents(frame)[:, first:], torch.zeros(1, 1), range(first, frame),
               tiny.text(small.TEXTS[1]), pages)  # fmt: skip
    for f in range(max(3, first), frame):
        ours, theirs = stream.tables[0].pages[f], int(own[0, f - first])
        torch.testing.assert_close(pool.key[:, ours], pool.key[:, theirs], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pool.value[:, ours], pool.value[:, theirs], rtol=1e-5, atol=1e-5)
    for page in own.flatten().tolist():
        pool.drop(page)
    manual.release()
    stream.release()


@torch.no_grad()
def test_the_oldest_frames_of_a_switch_are_queries_only(tiny):
    """Spoiling frames f - 12 .. f - 10 moves their own pages and no others."""
    frame, rewritten = 18, range(6, 18)
    pool, keys = tiny.world.pool, []
    for spoil in (False, True):
        stream, latent = tiny.streamed(frame), tiny.latents(frame).clone()
        if spoil:
            latent[:, 6:9] += 1
        stream.recache(tiny.text(small.TEXTS[1]), latent)
        keys.append(pool.value[:, stream.tables[0].lookup(rewritten)].clone())
        stream.release()
    moved = (keys[0] != keys[1]).flatten(2).any(2)[1]
    assert moved.tolist() == [f < 9 for f in rewritten]


@pytest.mark.parametrize("frame", [6, 9, 12, 18])
def test_after_a_switch_a_block_still_sees_its_plain_window(tiny, frame):
    stream, _, _ = shift_in_text(tiny, frame)
    seen = seen_frames(stream, tiny.latents(3, 1, "noisy"))
    assert seen == [set(plain_context(frame, tiny.config.stream))]
    stream.release()


def test_rows_with_different_switches_stream_as_they_would_alone(tiny):
    texts = small.TEXTS
    prompts = [
        Prompt(segments=texts, switch_frames=(6, 15), index=0),
        Prompt(segments=texts[:1], index=1),
        Prompt(segments=texts[1:], switch_frames=(12,), index=2),
        Prompt(segments=texts[1:], switch_frames=(15,), index=2),
    ]
    together = generate_videos(tiny.world, tiny.encode, prompts, [0, 0, 4, 5], 77)
    for row, (prompt, key) in enumerate(zip(prompts, [0, 0, 4, 5], strict=True)):
        alone = generate_videos(tiny.world, tiny.encode, [prompt], [key], 77)
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-4)
    assert together.shape == (4, 21, 4, 4, 4)


def test_a_videos_noise_is_named_by_seed_prompt_and_key(tiny):
    def make(seed: int, index: int, key: int) -> torch.Tensor:
        prompt = Prompt(segments=small.TEXTS[:1], index=index)
        return generate_videos(tiny.world, tiny.encode, [prompt], [key], seed)

    first = make(1, 0, 0)
    assert torch.equal(make(1, 0, 0), first)
    for coordinates in ((2, 0, 0), (1, 1, 0), (1, 0, 1)):
        assert not torch.equal(make(*coordinates), first)


def test_a_switched_text_changes_what_follows_and_nothing_before(tiny):
    plain = generate_videos(tiny.world, tiny.encode, [small.ONE], [0], 3)
    switched = generate_videos(tiny.world, tiny.encode, [small.switching(12)], [0], 3)
    assert torch.equal(plain[:, :12], switched[:, :12])
    assert (plain[:, 12:] != switched[:, 12:]).flatten(2).any(2).all()


def test_a_cache_of_the_window_alone_takes_late_switches_and_gives_the_same_bits(ranks):
    """A re-cache asks frames that have left such a cache; they must not stay in it afterwards."""
    outputs = []
    for resident in ("12", "21"):
        tiny = small.build(ranks, "stream.num_frames=21", f"stream.resident_frames={resident}")
        world = new_world(tiny.model, tiny.config.stream, tiny.config.routing, rows=1)
        stream = Stream.begin(world, 1, tiny.text(small.TEXTS[0]))
        latents = tiny.latents(21)
        for frame in range(0, 21, 3):
            if frame in (6, 15, 18):
                stream.recache(tiny.text(small.TEXTS[frame % 2]), latents[:, :frame])
            stream.commit(latents[:, frame : frame + 3])
        outputs.append(stream.velocity(tiny.latents(3, name="next"), 0.9375))
        stream.release()
        assert world.pool.num_free == world.pool.key.shape[1]
    assert torch.equal(*outputs)
