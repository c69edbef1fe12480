"""Videos that are continued: the given frames are the prefix, in latents and in pages."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_kvpo.config import CodecConfig, load_config
from megatron_kvpo.model.codec import load_codec
from megatron_kvpo.records import Prompt
from megatron_kvpo.rollout.live import LiveVideo
from megatron_kvpo.rollout.replay import Push, replay
from megatron_kvpo.rollout.sampler import generate_videos
from megatron_kvpo.rollout.sizing import run_pages
from megatron_kvpo.rollout.stream import World
from megatron_kvpo.routing import draw_plan, legal_forks
from megatron_kvpo.training.alarms import check_start
from megatron_kvpo.training.continuation import Beginnings
from megatron_kvpo.world import pixel_start, render, scene_from_texts
from tests.unit import small
from tests.unit.test_stages import run_update

pytest.importorskip("nvidia.dali")

from megatron_kvpo.data.encoding import codec_fingerprint
from megatron_kvpo.data.prompts import load_prompts
from megatron_kvpo.data.shapes import write_continuations, write_dataset
from megatron_kvpo.data.video import ClipSpec, decode_file
from megatron_kvpo.rollout.group import roll_out_group

ranks = small.ranks
GIVEN = 9
EXAMPLES = Path(__file__).parents[2] / "examples" / "shapes"


def continuing(frames: int = GIVEN, *switches: int, index: int = 0) -> Prompt:
    plain = small.switching(*switches, index=index)
    return dataclasses.replace(plain, video=Path("clip.mp4"), video_frames=frames)


def given_to(tiny: small.Small, name: str = "video"):
    """A beginning of random latents."""

    def begin(prompt: Prompt):
        return tiny.latents(prompt.video_frames, name=name) if prompt.video else None

    return begin


def rolled(tiny: small.Small, prompt: Prompt, begin, fork: int = 12):
    with tiny.policy.acting("old"):
        return roll_out_group(tiny.world, tiny.encode, prompt, tiny.plan(fork),
                              tiny.noises(prompt), tiny.stages.sequences, None, begin)  # fmt: skip


def pages_of(sampled) -> dict[int, list[torch.Tensor]]:
    """Keys and values of the prefix by latent frame."""
    pool, table = sampled.prefix.world.pool, sampled.prefix.tables[0]
    return {f: [held[:, page].clone() for held in (pool.key, pool.value)]
            for f, page in table.pages.items()}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(ranks):
    return small.build(ranks)


@pytest.fixture(autouse=True)
def no_leak(tiny):
    yield
    assert tiny.world.pool.num_free == tiny.num_pages, "pages leaked"


def assert_same_pages(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(a, b) for f in ours for a, b in zip(ours[f], theirs[f], strict=True))


@pytest.mark.parametrize("switches", [(), (6,), (9,), (6, 12, 15)])
@pytest.mark.parametrize("more", [(), ("stream.context_noise=0.1",),
                                  ("memory.bank_frames=3", "memory.stage_blocks=1")])  # fmt: skip
def test_frames_that_were_generated_once_and_are_given_give_the_same_group(ranks, switches, more):
    """Bit for bit, pages too: a clean pass does not ask where a block comes from."""
    tiny = small.build(ranks, *more)
    plain = rolled(tiny, small.switching(*switches), lambda _: None)
    pages, latent = pages_of(plain), plain.group.latent_NFCHW
    plain.release()
    again = rolled(tiny, continuing(GIVEN, *switches), lambda _: latent[:1, :GIVEN])
    assert_same_pages(pages_of(again), pages)
    again.release()
    assert torch.equal(again.group.latent_NFCHW, latent)
    assert torch.equal(again.group.trajectory.velocity_NPTFCHW,
                       plain.group.trajectory.velocity_NPTFCHW)  # fmt: skip


def test_all_branches_begin_with_the_video_and_what_comes_depends_on_it(tiny):
    begin, other = given_to(tiny), given_to(tiny, "another")
    groups = []
    for beginning in (begin, other):
        sampled = rolled(tiny, continuing(), beginning)
        sampled.release()
        groups.append(sampled.group.latent_NFCHW)
    for latent, beginning in zip(groups, (begin, other), strict=True):
        video = beginning(continuing())
        assert torch.equal(latent[:, :GIVEN], video.expand(4, -1, -1, -1, -1))
        assert len({tuple(row.flatten().tolist()) for row in latent[:, 12:]}) == 4
    assert not torch.equal(groups[0][:, GIVEN:12], groups[1][:, GIVEN:12])


def test_pages_of_given_frames_are_those_of_clean_passes_by_hand(tiny):
    """The fork at the end of the video: the whole prefix is given."""
    prompt = continuing(12)
    video = given_to(tiny)(prompt)
    sampled = rolled(tiny, prompt, lambda _: video)
    found = pages_of(sampled)
    sampled.release()
    with tiny.policy.acting("old"):
        stream = small.Stream.begin(tiny.world, 1, tiny.text(prompt.segments[0]))
        for block in video.split(3, dim=1):
            stream.commit(block)
    by_hand = {f: [held[:, page] for held in (tiny.world.pool.key, tiny.world.pool.value)]
               for f, page in stream.tables[0].pages.items()}  # fmt: skip
    assert found.keys() == set(range(12))
    assert_same_pages(found, by_hand)
    stream.release()


def test_forks_inside_the_video_are_left_out_and_the_rest_stays_uniform(tiny):
    stream, routing = tiny.config.stream, tiny.config.routing
    assert legal_forks(stream, routing) == [12, 15]
    assert legal_forks(stream, routing, 12) == [12, 15]
    assert legal_forks(stream, routing, 15) == [15]
    drawn = {draw_plan(stream, routing, (0, u, 0), 15).fork_frame for u in range(20)}
    assert drawn == {15}
    for update in range(20):
        assert draw_plan(stream, routing, (0, update, 0)) == draw_plan(
            stream, routing, (0, update, 0), GIVEN
        )
    with pytest.raises(ValueError, match=r"first 18 .* fork is 15\. Lower 'video_frames' .* 15"):
        legal_forks(stream, routing, 18)
    with pytest.raises(ValueError, match=r"given up to latent frame 15 and cannot fork at 12"):
        rolled(tiny, continuing(15), given_to(tiny))
    with pytest.raises(ValueError, match=r"continues clip.mp4, and nothing encodes it here"):
        tiny.roll_out(prompt=continuing())


def test_an_update_runs_with_the_alarms_on(ranks):
    """Given and generated prefixes in one update; anchor energy 0, ratio 1, the weights move."""
    tiny = small.build(ranks, "policy.groups_per_update=3")
    prompts = [continuing(15), continuing(12, 15, index=1), small.PROMPTS[2]]
    stages = tiny.stages
    stages.prompts.prompts, stages.begin = tuple(prompts), given_to(tiny)
    groups = stages.explore(0)
    by_index = {sampled.group.prompt.index: sampled for sampled in groups}
    assert by_index[0].group.plan.fork_frame == 15
    for index in (0, 1):
        prompt, latent = prompts[index], by_index[index].group.latent_NFCHW
        given = stages.begin(prompt)
        assert torch.equal(latent[:, : prompt.video_frames], given.expand(4, -1, -1, -1, -1))
    energies = stages.energies(0, groups, "old")
    figures = check_start(tiny.config.alarms, stages, 0, groups, energies, energies)
    assert figures["anchor_energy"] == figures["prefix_pages"] == 0
    for sampled in groups:
        sampled.release()
    update = run_update(tiny, 0)
    torch.testing.assert_close(update.ratio_PG, torch.ones_like(update.ratio_PG))
    assert update.norm > 0
    assert tiny.world.pool.num_free == tiny.num_pages


def test_the_anchor_an_evaluation_and_a_live_video_are_one(tiny):
    """And a batch may hold given rows of two lengths beside generated ones."""
    begin = given_to(tiny)
    prompts = [continuing(9, 12), continuing(15, index=1), small.PROMPTS[2]]
    together = generate_videos(tiny.world, tiny.encode, prompts, [4, 4, 4], 9, begin)
    for row, prompt in enumerate(prompts):
        alone = generate_videos(tiny.world, tiny.encode, [prompt], [4], 9, begin)[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)
        assert torch.equal(together[row, : prompt.video_frames],
                           alone[: prompt.video_frames])  # fmt: skip
    prompt, given = prompts[0], begin(prompts[0])
    whole = generate_videos(tiny.world, tiny.encode, [prompt], [4], 9, begin)
    assert torch.equal(whole[:, :9], given)
    video = LiveVideo(tiny.world, tiny.encode, prompt.segments[0], (9, 0, 4))
    blocks = [video.show(block) for block in given.split(3, dim=1)]
    with pytest.raises(ValueError, match=r"are no block \[1, 3, 4, 4, 4\]"):
        video.show(given)
    while video.frame < 21:
        if video.frame == 12:
            video.switch(prompt.segments[1])
        blocks.append(video.next_block())
    video.close()
    assert torch.equal(torch.cat(blocks, dim=1), whole)


@pytest.mark.parametrize("given", [3, 12, 15])
def test_the_pool_of_a_run_still_holds(ranks, given):
    tiny = small.build(ranks, "stream.num_frames=30", "stream.resident_frames=21")
    config, prompt = tiny.config, continuing(given, 15, 24)
    begin, count = given_to(tiny), tiny.config.routing.num_branches + 1
    pages = run_pages(config.stream, config.routing, config.memory, [prompt], [prompt], groups=1,
                      sequences=count, videos=2)  # fmt: skip
    world = World(tiny.model, tiny.model.new_pool(pages), config.stream, config.routing,
                  config.memory)  # fmt: skip
    tight = dataclasses.replace(tiny, world=world)
    for fork in legal_forks(config.stream, config.routing, given):
        sampled = rolled(tight, prompt, begin, fork)
        with tight.policy.acting("current"):
            push = Push(weight_B=torch.ones(count))
            replay(sampled, tight.encode, tight.noises(prompt), config.energy, range(count),
                   push=push)  # fmt: skip
        sampled.release()
    tiny.policy.optimizer.zero_grad()
    generate_videos(world, tiny.encode, [prompt] * 2, [0, 1], 5, begin)
    assert world.pool.num_free == pages


def test_a_prompt_names_its_video_whole_or_not_at_all():
    base = {"segments": ("a",), "index": 3}
    for more in (
        {"video": Path("v")},
        {"video_frames": 3},
        {"video": Path("v"), "video_frames": -3},
    ):
        with pytest.raises(ValueError, match=r"prompt 3 takes .* give both"):
            Prompt(**base, **more)
    with pytest.raises(ValueError, match=r"names clip 2 of None"):
        Prompt(**base, clip=2)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips") / "clips"
    write_dataset(folder, 2, 3, num_latent_frames=12, size=32)
    return folder


def test_a_file_is_encoded_at_the_generators_size_and_refused_if_it_cannot_be(tiny, clips):
    config = small.config("codec.width=8").codec
    codec = load_codec(config, 4)
    beginnings = Beginnings(tiny.config.model, codec, torch.device("cpu"))
    prompt = dataclasses.replace(continuing(), video=clips / "00001.mp4")
    beginnings.check([prompt, small.ONE])
    begin = beginnings.shared(())
    assert begin(small.ONE) is None
    pixels = decode_file(prompt.video, ClipSpec(num_pixel_frames=45, size=(16, 16)))
    whole = codec.encode(pixels[None])  # causal: the first frames do not ask for the rest
    torch.testing.assert_close(begin(prompt), whole[:, :GIVEN], rtol=1e-5, atol=1e-5)
    assert torch.equal(begin(prompt), begin(prompt))
    long = dataclasses.replace(prompt, video_frames=15)
    with pytest.raises(ValueError, match=r"prompt 0 .*00001.mp4, of which 15 .* too short: 45"):
        beginnings.check([long])
    for video, message in ((clips / "gone.mp4", "no such file"), (clips, "a folder: name a video")):
        with pytest.raises(ValueError, match=message):
            beginnings.check([dataclasses.replace(prompt, video=video)])


def test_a_rate_is_taken_by_timestamps_from_files_and_must_be_that_of_a_cache(
    tiny, clips, monkeypatch
):
    codec = load_codec(small.config("codec.width=8").codec, 4)
    half = Beginnings(tiny.config.model, codec, torch.device("cpu"), 8.0)
    video = clips / "00001.mp4"  # 45 pixel frames, 16 a second
    prompt = dataclasses.replace(continuing(6), video=video)
    half.check([prompt])
    pixels = decode_file(video, ClipSpec(num_pixel_frames=21, size=(16, 16), stride=2))
    assert torch.equal(half.shared(())(prompt), codec.encode(pixels[None]))
    plain = Beginnings(tiny.config.model, codec, torch.device("cpu"))
    assert not torch.equal(half.shared(())(prompt), plain.shared(())(prompt))
    long = dataclasses.replace(prompt, video_frames=9)
    plain.check([long])
    with pytest.raises(ValueError, match=r"of which 9 .* too short: 2.812 s, more than 4.000 s"):
        half.check([long])
    spec = SimpleNamespace(codec=codec_fingerprint(codec), fps=16.0)
    cache = SimpleNamespace(spec=spec)
    monkeypatch.setattr("megatron_kvpo.training.continuation.LatentCache", lambda _: cache)
    with pytest.raises(ValueError, match=r"holds 16 pixel frames a second, data.video_fps is 8: e"):
        half.check([dataclasses.replace(prompt, clip=0)])
    with pytest.raises(ValueError, match=r"data.video_fps is 0.0: it must be above 0"):
        small.config("data.video_fps=0")


def test_clips_that_are_written_lead_to_their_switch_and_are_the_same_each_time(tmp_path):
    written = [write_continuations(tmp_path / name, 3, 8, GIVEN) for name in ("a.jsonl", "b.jsonl")]
    assert written[0] == written[1]
    prompts = load_prompts(tmp_path / "a.jsonl")
    assert len(prompts) == 3
    for prompt in prompts:
        assert GIVEN in prompt.switch_frames
        assert prompt.video.is_file()
        twin = tmp_path / "b" / prompt.video.name
        assert prompt.video.read_bytes() == twin.read_bytes()
        scene = scene_from_texts(prompt.segments, [0, *map(pixel_start, prompt.switch_frames)], 81)
        count = pixel_start(GIVEN)
        video = decode_file(prompt.video, ClipSpec(num_pixel_frames=count, size=(32, 32)))
        real = torch.from_numpy(render(scene, 32)[:count]).permute(3, 0, 1, 2) / 127.5 - 1
        assert (video - real).square().mean().sqrt() < 0.1, "the texts tell another video"
    with pytest.raises(ValueError, match="exists: delete it"):
        write_continuations(tmp_path / "a.jsonl", 3, 8, GIVEN)
    with pytest.raises(ValueError, match=r"found only 0 of 1 scenes that switch at latent frame 7"):
        write_continuations(tmp_path / "c.jsonl", 1, 8, 7)


@pytest.mark.parametrize("name", ["prompts_continue", "prompts_continue_heldout"])
def test_the_examples_clips_are_there(name):
    config = load_config(EXAMPLES / "continue.yaml")
    codec = load_codec(CodecConfig(), config.model.latent_channels)
    prompts = load_prompts(EXAMPLES / f"{name}.jsonl")
    assert {prompt.video_frames for prompt in prompts} == {12}
    Beginnings(config.model, codec, torch.device("cpu")).check(prompts)
