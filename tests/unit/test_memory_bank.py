"""MemFlow's bank, step by step beside a plain one: what is staged, kept, seen and given back."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_kvpo.config import MemoryConfig
from megatron_kvpo.model.memory_bank import MemoryBank, choose_frames, rank_slots
from megatron_kvpo.model.pages import PassPages
from megatron_kvpo.records import Prompt, RoutingPlan
from megatron_kvpo.rollout.sampler import generate_videos
from megatron_kvpo.rollout.stream import Stream, new_world
from megatron_kvpo.routing import plain_context
from tests.unit import small

ranks = small.ranks

STAGE_EACH = MemoryConfig(bank_frames=3, stage_blocks=1)
"""Frames 0, 3, 6, ...: the fourth enters at frame 12, so the bank chooses from there on."""

CAREFUL = dataclasses.replace(STAGE_EACH, reference_quirks=False)
SPARSE = dataclasses.replace(STAGE_EACH, sparse=True, sparse_frames=2)


def build(ranks, memory: MemoryConfig, *overrides: str) -> small.Small:
    """The small generator in a world with this memory."""
    tiny = small.build(ranks, *overrides)
    config, rows = tiny.config, 2 * tiny.config.routing.num_branches + 4
    world = new_world(tiny.model, config.stream, config.routing, rows, memory)
    return dataclasses.replace(tiny, world=world)


@pytest.fixture(scope="module")
def tiny(ranks):
    return build(ranks, STAGE_EACH)


@pytest.fixture(autouse=True)
def no_leak(tiny):
    yield
    assert tiny.world.pool.num_free == tiny.num_pages, "pages leaked"


class PlainBank:
    """One row's bank as the definition has it: lists of frames and their keys, layer by layer."""

    def __init__(self, memory: MemoryConfig, layers: int) -> None:
        self.memory, self.count = memory, 0
        self.staged: tuple[int, torch.Tensor, torch.Tensor] | None = None
        self.slots: list[list[tuple]] = [[] for _ in range(layers)]

    def stage(self, frame: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self.staged, self.count = (frame, key, value), self.count + 1

    def commit(self, text, row: int, zero_query: bool) -> None:
        size = self.memory.bank_frames
        for layer, slots in enumerate(self.slots):
            frame, key, value = self.staged
            entry = frame, key[layer], value[layer]
            if self.count <= size:
                self.slots[layer] = [*slots[: self.count - 1], entry]
                continue
            query = text.layers[layer][0][row] * (0 if zero_query else 1)
            scores = [
                (torch.einsum("xae,tae->xat", query, k) / k.shape[-1] ** 0.5).mean().item()
                for _, k, _ in slots
            ]
            best = sorted(range(size), key=lambda i: -scores[i])[: size - 1]  # sorted is stable
            self.slots[layer] = [*(slots[i] for i in best), entry]

    def frames(self, layer: int) -> list[int]:
        return [frame for frame, _, _ in self.slots[layer]]


@torch.no_grad()
def follow(tiny, texts, switch: int | None = None) -> list[PlainBank]:
    """Stream a few rows to the end, a plain bank beside each; compare after every first pass.

    The text of row 0 becomes that of the last row at frame `switch`.
    """
    memory, pool, layers = tiny.world.memory, tiny.world.pool, tiny.config.model.num_layers
    text = tiny.text(*texts)
    stream = Stream.begin(tiny.world, len(texts), text)
    plain = [PlainBank(memory, layers) for _ in texts]
    fresh = [False] * len(texts)
    latents = tiny.latents(tiny.config.stream.num_frames, len(texts))
    for block in range(tiny.config.stream.num_blocks):
        frame = 3 * block
        if frame == switch:
            changed = tiny.text(texts[-1])
            stream.part([0], changed).recache(changed, latents[:1, :frame])
            text = stream.text = tiny.text(texts[-1], *texts[1:])
            fresh[0] = memory.reference_quirks
            if fresh[0]:
                plain[0].commit(text, 0, True)
        due = block and (memory.reference_quirks or (block - 1) % memory.stage_blocks == 0)
        stream.velocity(latents[:, frame : frame + 3], 0.9)
        for row, bank in enumerate(plain):
            if due:
                bank.commit(text, row, fresh[row])
            compare(pool, stream.banks[row], bank)
        fresh = [False] * len(texts)
        before = [list(bank.slots) for bank in stream.banks]
        stream.velocity(latents[:, frame : frame + 3], 0.5)
        stream.commit(latents[:, frame : frame + 3])
        assert [bank.slots for bank in stream.banks] == before, "a later pass committed again"
        if block % memory.stage_blocks == 0:
            for row, bank in enumerate(plain):
                page = stream.tables[row].pages[frame]
                bank.stage(frame, pool.key[:, page].clone(), pool.value[:, page].clone())
    stream.release()
    return plain


def compare(pool, ours: MemoryBank, plain: PlainBank) -> None:
    for layer, slots in enumerate(plain.slots):
        assert len(ours.slots) == len(slots)
        for page, (frame, key, value) in zip(ours.slots, slots, strict=True):
            where = f"layer {layer}, frame {frame}"
            assert torch.equal(pool.key[layer, page], key), where
            assert torch.equal(pool.value[layer, page], value), where


@pytest.mark.parametrize("memory", [STAGE_EACH, CAREFUL], ids=["quirks", "careful"])
@pytest.mark.parametrize("switch", [None, 9, 15])
def test_the_bank_of_every_row_and_layer_is_the_plain_one(ranks, memory, switch):
    """Rows of other texts; a switch of one row of three while the bank fills, and once it chooses.

    The re-cache rewrites frames that are staged or in the bank: neither is refreshed.
    """
    tiny = build(ranks, memory, "stream.num_frames=30", "stream.resident_frames=12")
    banks = follow(tiny, small.TEXTS, switch)
    assert tiny.world.pool.num_free == tiny.num_pages
    kept = {tuple(bank.frames(layer)) for bank in banks for layer in range(2)}
    assert len(kept) > 1, "all rows and layers chose alike: the test shows little"


def test_each_staged_frame_is_committed_once_or_as_the_reference_does_at_every_block(ranks):
    """Staged at frames 0, 6, 12, 18, 24; from the fourth on repeats pile up duplicates."""
    sizes = ("stream.num_frames=30", "stream.resident_frames=12")
    for quirks in (False, True):
        memory = MemoryConfig(bank_frames=3, stage_blocks=2, reference_quirks=quirks)
        banks = follow(build(ranks, memory, *sizes), small.TEXTS[:2])
        held = [bank.frames(layer) for bank in banks for layer in range(2)]
        assert all(frames[-1] == 24 for frames in held)
        repeated = any(len(set(frames)) < 3 for frames in held)
        assert repeated == quirks, held


@torch.no_grad()
def test_without_a_bank_a_pass_reads_what_it_read_before(ranks):
    plain = small.build(ranks)
    stream = plain.streamed(15, rows=2)
    assert plain.world.memory == MemoryConfig()
    state, pages = plain.latents(3, 2, "noisy"), plain_context(15, plain.config.stream)
    read = torch.tensor([table.lookup(pages) for table in stream.tables])
    expected = plain.model(
        state, torch.full((2, 1), 500.0), range(15, 18), stream.text,
        PassPages(plain.world.pool, read),
    )  # fmt: skip
    assert torch.equal(stream.velocity(state, 0.5), expected)
    assert all(not bank.slots and bank.staged is None for bank in stream.banks)
    assert plain.num_pages == 10 * (21 + 3)
    stream.release()
    assert plain.world.pool.num_free == plain.num_pages


@pytest.mark.parametrize("memory", [STAGE_EACH, CAREFUL, SPARSE], ids=["quirks", "careful", "sma"])
def test_rows_with_other_texts_and_switches_stream_as_they_would_alone(ranks, memory):
    tiny, texts = build(ranks, memory), small.TEXTS
    prompts = [
        Prompt(segments=texts, switch_frames=(6, 15), index=0),
        Prompt(segments=texts[:1], index=1),
        Prompt(segments=texts[1:], switch_frames=(15,), index=2),
    ]
    together = generate_videos(tiny.world, tiny.encode, prompts, [0, 0, 4], 77)
    for row, (prompt, key) in enumerate(zip(prompts, [0, 0, 4], strict=True)):
        alone = generate_videos(tiny.world, tiny.encode, [prompt], [key], 77)
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-4)
    assert tiny.world.pool.num_free == tiny.num_pages
    plain = small.build(ranks)
    without = generate_videos(plain.world, plain.encode, prompts, [0, 0, 4], 77)
    assert torch.equal(without[:, :3], together[:, :3])
    assert not torch.equal(without[:, 3:6], together[:, 3:6]), "the bank changes nothing"


@torch.no_grad()
def test_a_branch_starts_with_the_prefixs_bank_and_leaves_it_as_it_was(tiny):
    prefix, pool = tiny.streamed(15), tiny.world.pool
    bank = prefix.banks[0]
    held, before = [*bank.slots, bank.staged], pool.key[:, [*bank.slots, bank.staged]].clone()
    used = tiny.num_pages - pool.num_free
    stream = prefix.fork(2, tiny.text(*small.TEXTS[:2]))
    assert [b.slots for b in stream.banks] == [bank.slots] * 2
    assert tiny.num_pages - pool.num_free == used, "a fork costs no page"
    stream.velocity(tiny.latents(3, 2, "own"), 0.9)
    stream.commit(tiny.latents(3, 2, "own"))
    stream.velocity(tiny.latents(3, 2, "own"), 0.9)
    slots = [b.slots for b in stream.banks]
    assert not set(slots[0][:2]) & {*slots[1], *bank.slots}, "rows write pages of their own"
    assert [*bank.slots, bank.staged] == held
    assert torch.equal(pool.key[:, held], before)
    stream.release()
    assert tiny.num_pages - pool.num_free == used
    prefix.release()
    assert pool.num_free == tiny.num_pages


@torch.no_grad()
def seen_pages(stream: Stream, state, routed=None) -> list[set[int]]:
    """Pages on which each row's velocity depends, found by spoiling one at a time."""
    pool = stream.world.pool
    plain = stream.velocity(state, 0.8, routed)
    found: list[set[int]] = [set() for _ in stream.tables]
    held = [p for t in stream.tables for p in t.pages.values()]
    for page in sorted({*held, *(p for bank in stream.banks for p in bank.slots)}):
        kept = pool.value[:, page].clone()
        pool.value[:, page] += 1
        moved = stream.velocity(state, 0.8, routed) != plain
        pool.value[:, page] = kept
        for row in moved.flatten(1).any(1).nonzero().flatten().tolist():
            found[row].add(page)
    return found


def test_a_routed_branch_keeps_sink_and_bank(tiny):
    routes = [(3, 5, 6, 8, 9), ()]
    prefix = tiny.streamed(15)
    stream = prefix.fork(2, tiny.text(*small.TEXTS[:2]))
    found = seen_pages(stream, tiny.latents(3, 2, "noisy"), routes)
    contexts = ([0, 1, 2, *routes[0], 14], [0, 1, 2, *range(9, 15)])
    for row, context in enumerate(contexts):
        slots = stream.banks[row].slots
        assert len(slots) == 3
        assert found[row] == {*stream.tables[row].lookup(context), *slots}
    stream.release()
    prefix.release()


def test_a_branch_routed_to_the_window_is_the_anchor_to_the_end(tiny):
    plan = RoutingPlan(
        fork_frame=12, num_blocks=1,
        routed_frames_G=((6, 7, 8, 9, 10), (3, 4, 5, 6, 7), (3, 5, 7, 9, 10)),
    )  # fmt: skip
    sampled = tiny.roll_out(plan, small.switching(15))
    latent = sampled.group.latent_NFCHW
    sampled.release()
    assert torch.equal(latent[0], latent[3])
    assert not torch.equal(latent[1], latent[3])


@pytest.mark.parametrize("memory", [STAGE_EACH, CAREFUL, SPARSE], ids=["quirks", "careful", "sma"])
@pytest.mark.parametrize("frames", [(), (12,), (15,), (18,), (6, 15)])
def test_the_anchor_has_energy_zero_with_a_bank_through_any_switch(ranks, memory, frames):
    tiny = build(ranks, memory, "routing.num_routed_blocks=3")
    tiny.stir("old", size=0.05)
    sampled = tiny.roll_out(prompt=small.switching(*frames) if frames else small.ONE)
    held = tiny.num_pages - tiny.world.pool.num_free
    energy = tiny.energies(sampled)
    assert energy[-1] == 0
    assert (energy[:-1] > 1e-3).all()
    assert torch.equal(tiny.energies(sampled), energy), "a replay moved the prefix's bank"
    assert tiny.num_pages - tiny.world.pool.num_free == held, "a replay kept pages"
    sampled.release()
    assert tiny.world.pool.num_free == tiny.num_pages


@pytest.mark.parametrize("memory", [STAGE_EACH, SPARSE], ids=["dense", "sma"])
def test_recompute_reads_the_bank_that_the_pass_read(ranks, memory):
    """Each block commits and a switch rewrites the window: the gradients must not notice."""
    found = []
    for recompute in ("false", "true"):
        tiny = build(ranks, memory, "routing.num_routed_blocks=3", f"model.recompute={recompute}")
        tiny.stir("current", "old", size=0.05)
        sampled = tiny.roll_out(prompt=small.switching(18))
        trained = tiny.policy.trained()
        with tiny.policy.acting("current"):
            energy = tiny.energies(sampled, "current", grad=True).sum()
            gradient = torch.autograd.grad(energy, list(trained.values()))
        found.append(dict(zip(trained, gradient, strict=True)))
        sampled.release()
        assert tiny.world.pool.num_free == tiny.num_pages
    assert any(gradient.any() for gradient in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_equal_scores_leave_the_lower_slot_first():
    score = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 2.0], [2.0, -0.0, 0.0], [1.0, 1.0, 3.0]])
    assert rank_slots(score).tolist() == [[0, 1, 2], [1, 2, 0], [0, 1, 2], [2, 0, 1]]
    assert rank_slots(score.T, dim=0).T.tolist() == rank_slots(score).tolist()


def test_sparse_attention_keeps_each_heads_best_frames_and_all_recent_ones():
    """Against one head and one row at a time; two candidates tie for the last place."""
    rng = torch.Generator().manual_seed(3)
    rows, heads, dim, tokens, count, keep = 2, 3, 4, 5, 5, 3
    query = torch.randn(6, rows, heads, dim, generator=rng)
    frames = torch.randn(rows, count + 2, tokens, heads, dim, generator=rng)
    frames[:, 3] = frames[:, 1]
    cached = frames.flatten(1, 2), 2 * frames.flatten(1, 2)
    key, value = choose_frames(query, cached, count, keep, tokens)
    assert torch.equal(value, 2 * key)
    for row in range(rows):
        for head in range(heads):
            mean = query[:, row, head].mean(0)
            scores = [(mean @ frames[row, f, :, head].mean(0)).item() for f in range(count)]
            scores[3] = scores[1]
            best = sorted(sorted(range(count), key=lambda f: -scores[f])[:keep])
            expected = torch.cat([frames[row, f, :, head] for f in (*best, 5, 6)])
            assert torch.equal(key[row, :, head], expected), (row, head)


def test_sparse_attention_to_as_many_frames_as_there_are_is_dense(ranks, tiny):
    def video(memory: MemoryConfig) -> torch.Tensor:
        other = build(ranks, memory)
        return generate_videos(other.world, other.encode, [small.switching(12)], [0], 4)

    dense = video(STAGE_EACH)
    assert torch.equal(video(dataclasses.replace(SPARSE, sparse_frames=6)), dense)
    assert torch.equal(video(SPARSE)[:, :3], dense[:, :3])
    assert not torch.equal(video(SPARSE)[:, 6:], dense[:, 6:])


def test_a_bank_admits_nothing_before_a_frame_is_staged(tiny):
    with pytest.raises(ValueError, match="0 frames are staged"):
        MemoryBank(tiny.world.pool).admit(3)
