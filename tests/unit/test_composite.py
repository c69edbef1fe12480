"""Which frames and texts reach the rewards, and how their scores are put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from megatron_kvpo.config import RewardConfig, StreamConfig
from megatron_kvpo.records import Clip, Prompt, RolloutGroup, RoutingPlan, Trajectory
from megatron_kvpo.reward import composite
from megatron_kvpo.reward.composite import Scorer, clip_of
from megatron_kvpo.world import pixel_start, render, sample_scene

NUM_LATENT = 21
STREAM = StreamConfig(num_frames=NUM_LATENT, first_chunk_frames=9, chunk_frames=6)
PROMPT = Prompt(
    segments=("a red square moves right", "it turns blue and falls", "it rises quickly"),
    switch_frames=(9, 15),
)


def decode(latent_BFCHW: Tensor) -> Tensor:
    """Each pixel frame shows the number of its latent frame (as hundredths), or what it holds."""
    pixels = torch.cat([latent_BFCHW[:, :1], latent_BFCHW[:, 1:].repeat_interleave(4, 1)], 1)
    return pixels[:, :, :1].expand(-1, -1, 3, -1, -1) / 100


def numbered(num_rows: int) -> Tensor:
    """Latents that hold 100 * row + frame, the row only from the fork at 9 on."""
    latent = torch.arange(NUM_LATENT).float().view(1, -1, 1, 1, 1).repeat(num_rows, 1, 2, 4, 4)
    latent[:, 9:] += 100 * torch.arange(num_rows).view(-1, 1, 1, 1, 1)
    return latent


def group_of(latent_NFCHW: Tensor, fork: int = 9, prompt: Prompt = PROMPT) -> RolloutGroup:
    empty = torch.zeros(len(latent_NFCHW), 1, 1, 1, 1, 1, 1)
    return RolloutGroup(
        prompt=prompt,
        plan=RoutingPlan(fork_frame=fork, num_blocks=2, routed_frames_G=()),
        latent_NFCHW=latent_NFCHW,
        trajectory=Trajectory(state_NPTFCHW=empty, velocity_NPTFCHW=empty),
        sequences=tuple(range(len(latent_NFCHW))),
    )


def decode_rows(latent_BFCHW: Tensor, shared_frames: int) -> Iterator[Tensor]:
    for part in latent_BFCHW.split(16):
        yield decode(part)


class Spy:
    """Scores a clip by its mean pixel, times its place, and remembers what it saw."""

    def __init__(self, *components: str) -> None:
        self.components, self.seen, self.calls = components, list[Clip](), 0

    def score(self, clips: Sequence[Clip]) -> Tensor:
        self.seen += clips
        self.calls += 1
        means_B = torch.stack([clip.frames_FCHW.mean() for clip in clips])
        return torch.stack([(1 + k) * means_B for k in range(len(self.components))])


@pytest.fixture
def spies(monkeypatch: pytest.MonkeyPatch) -> dict[str, Spy]:
    made: dict[str, Spy] = {}

    def build(names: Sequence[str], config: RewardConfig, device: str) -> list[Spy]:
        return [made.setdefault(name, Spy(name)) for name in names]

    monkeypatch.setattr(composite, "build_rewards", build)
    return made


def config(**changes: object) -> RewardConfig:
    values = {"weights": {"one": 1.0, "two": 3.0}, "held_out": ("three",)} | changes
    return RewardConfig(**values)  # type: ignore[arg-type]


def mean_pixel(start: int, stop: int, row: int = 0) -> float:
    """Mean over pixel frames [start, stop) of what `numbered` and `decode` show."""
    latents = [(p + 3) // 4 for p in range(start, stop)]
    return sum(f + 100 * row * (f >= 9) for f in latents) / len(latents) / 100


def test_a_clip_carries_the_texts_that_govern_its_pixel_frames() -> None:
    frames = torch.zeros(pixel_start(NUM_LATENT), 3, 4, 4)
    clip = clip_of(frames, PROMPT, 20, 60)
    assert [(s.start, s.stop) for s in clip.spans] == [(0, 13), (13, 37), (37, 40)]
    assert [s.text for s in clip.spans] == list(PROMPT.segments)
    assert [s.history for s in clip.spans] == [(), PROMPT.segments[:1], PROMPT.segments[:2]]
    late = clip_of(frames, PROMPT, 57, 81)
    assert [(s.start, s.stop, s.text) for s in late.spans] == [(0, 24, PROMPT.segments[2])]


def test_a_segment_that_the_video_does_not_reach_is_left_out() -> None:
    clip = clip_of(torch.zeros(pixel_start(12), 3, 4, 4), PROMPT, 0, 45)
    assert [(s.start, s.stop) for s in clip.spans] == [(0, 33), (33, 45)]


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 5), (0, 82)])
def test_a_clip_outside_the_video_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="81 pixel frames"):
        clip_of(torch.zeros(81, 3, 4, 4), PROMPT, start, stop)


def test_local_is_the_forks_chunk_and_global_the_mean_over_segments(spies: dict[str, Spy]) -> None:
    scorer = Scorer(config(global_clip_pixel_frames=20), STREAM, decode_rows)
    (table,) = scorer.score_groups([group_of(numbered(3))])
    assert table.components == ("one", "two")
    assert table.weights == (1.0, 3.0)
    assert table.local_KN.dtype == torch.float32
    # chunk [9, 15) is pixel frames [33, 57); segments [0, 33), [33, 57), [57, 81)
    local = [mean_pixel(33, 57, row) for row in range(3)]
    torch.testing.assert_close(table.local_KN, torch.tensor([local, local]))
    cuts = [(6, 26), (35, 55), (59, 79)]
    mean = [sum(mean_pixel(a, b, row) for a, b in cuts) / 3 for row in range(3)]
    torch.testing.assert_close(table.global_KN, torch.tensor([mean, mean]))
    assert "three" in spies
    assert not spies["three"].seen  # held out of training


def test_clips_stay_inside_the_video(spies: dict[str, Spy]) -> None:
    Scorer(config(global_clip_pixel_frames=60), STREAM, decode_rows).score_groups(
        [group_of(numbered(1))]
    )
    assert [len(c.frames_FCHW) for c in spies["one"].seen] == [24, 60, 60, 60]
    spies.clear()
    Scorer(config(global_clip_pixel_frames=500), STREAM, decode_rows).score_groups(
        [group_of(numbered(1))]
    )
    assert [len(c.frames_FCHW) for c in spies["one"].seen][1:] == [81]  # three of one clip


def test_a_clip_before_the_fork_is_scored_once(spies: dict[str, Spy]) -> None:
    Scorer(config(global_clip_pixel_frames=20), STREAM, decode_rows).score_groups(
        [group_of(numbered(20))]
    )
    before = [c for c in spies["one"].seen if c.frames_FCHW.max() < 0.09]
    assert len(before) == 1
    assert len(spies["one"].seen) == 1 + 3 * 20


def test_every_row_is_decoded_once(spies: dict[str, Spy]) -> None:
    rows = 0

    def counting(latent_BFCHW: Tensor, shared_frames: int) -> Iterator[Tensor]:
        nonlocal rows
        rows += len(latent_BFCHW)
        return decode_rows(latent_BFCHW, shared_frames)

    Scorer(config(), STREAM, counting).score_groups([group_of(numbered(9))] * 2)
    assert rows == 18


def test_tables_do_not_depend_on_what_is_scored_together() -> None:
    scorer = Scorer(
        RewardConfig(weights={"visual_quality": 1.0, "text_alignment": 2.0}), STREAM, pixel_rows
    )
    groups = [real_group(seed, rows=20) for seed in range(2)]
    together = scorer.score_groups(groups)
    for group, table in zip(groups, together, strict=True):
        (alone,) = scorer.score_groups([group])
        assert torch.equal(alone.local_KN, table.local_KN)
        halves = [scorer.score_groups([group_of(part, prompt=group.prompt)])[0]
                  for part in torch.split(group.latent_NFCHW, 7)]  # fmt: skip
        assert torch.equal(torch.cat([t.local_KN for t in halves], 1), table.local_KN)
        assert torch.equal(torch.cat([t.global_KN for t in halves], 1), table.global_KN)
        assert not torch.equal(table.local_KN[:, 0], table.local_KN[:, 1])


def pixels_in(latent_BFCHW: Tensor) -> Tensor:
    """Latents of 4 x RGB channels hold the pixels themselves."""
    pixels = latent_BFCHW.unflatten(2, (4, 3)).flatten(1, 2)
    return pixels[:, 3:]


def pixel_rows(latent_BFCHW: Tensor, shared_frames: int) -> list[Tensor]:
    return [pixels_in(latent_BFCHW)]


def real_group(seed: int, rows: int) -> RolloutGroup:
    scene = sample_scene(seed, pixel_start(NUM_LATENT), (33,))
    frames = torch.from_numpy(render(scene)).permute(0, 3, 1, 2).float() / 255
    padded = torch.cat([frames[:1].expand(3, -1, -1, -1), frames])
    latent = padded.reshape(1, NUM_LATENT, 12, 32, 32).repeat(rows, 1, 1, 1, 1)
    fade = 1 - 0.02 * torch.arange(rows).view(-1, 1, 1, 1, 1)
    latent[:, 9:] *= fade
    return group_of(latent, prompt=Prompt(segments=tuple(scene.captions), switch_frames=(9,)))


def test_whole_videos_are_scored_with_held_out_rewards(spies: dict[str, Spy]) -> None:
    scorer = Scorer(config(), STREAM, decode_rows)
    other = Prompt(segments=("a green circle falls",))
    scores = scorer.score_videos(numbered(20), [PROMPT] * 19 + [other])
    assert sorted(scores) == ["one", "three", "two"]
    expected = torch.tensor([mean_pixel(0, 81, row) for row in range(20)])
    for values in scores.values():
        torch.testing.assert_close(values, expected)
    assert [len(c.spans) for c in spies["three"].seen] == [3] * 19 + [1]


def test_the_composite_is_the_weighted_mean_of_what_is_trained() -> None:
    scorer = Scorer(RewardConfig(weights={"visual_quality": 1.0, "motion_quality": 3.0}),
                    STREAM, decode_rows)  # fmt: skip
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    scores = {"visual_quality": one, "motion_quality": two, "temporal_consistency": 9 * one}
    torch.testing.assert_close(scorer.composite(scores), torch.tensor([0.25, 0.75]))
    with pytest.raises(ValueError, match="motion_quality"):
        scorer.composite({"visual_quality": torch.ones(2)})


def test_scoring_builds_no_graph() -> None:
    scorer = Scorer(RewardConfig(weights={"visual_quality": 1.0}), STREAM, pixel_rows)
    group = real_group(0, rows=2)
    group.latent_NFCHW.requires_grad_(True)
    (table,) = scorer.score_groups([group])
    assert not table.local_KN.requires_grad
    assert not scorer.score_videos(group.latent_NFCHW, [group.prompt] * 2)[
        "visual_quality"
    ].requires_grad


def test_rows_that_share_a_prefix_may_be_decoded_together_a_few_at_a_time(
    spies: dict[str, Spy],
) -> None:
    asked = []

    def few(latent_BFCHW: Tensor, shared_frames: int) -> Iterator[Tensor]:
        asked.append((shared_frames, latent_BFCHW.shape[1]))
        for part in latent_BFCHW.split(2):
            yield decode(part)

    group = group_of(numbered(5), fork=12)
    (plain,) = Scorer(config(), STREAM, decode_rows).score_groups([group])
    (found,) = Scorer(config(), STREAM, few).score_groups([group])
    assert torch.equal(found.local_KN, plain.local_KN)
    assert torch.equal(found.global_KN, plain.global_KN)
    assert asked == [(12, 21)]
    lost = Scorer(config(), STREAM, lambda latent, _: [decode(latent[1:])])
    with pytest.raises(ValueError, match="decode returned 2 videos for 3 rows"):
        lost.score_videos(numbered(3), [PROMPT] * 3)
    with pytest.raises(ValueError, match="decode returned 4 videos for 5 rows"):
        lost.score_groups([group])


def test_latents_behind_the_last_clip_are_not_decoded(spies: dict[str, Spy]) -> None:
    asked = []

    def counting(latent_BFCHW: Tensor, shared_frames: int) -> Iterator[Tensor]:
        asked.append((shared_frames, latent_BFCHW.shape[1]))
        return decode_rows(latent_BFCHW, shared_frames)

    one = Prompt(segments=("a red square moves right",))
    short = config(global_clip_pixel_frames=10)
    (table,) = Scorer(short, STREAM, counting).score_groups([group_of(numbered(2), 9, one)])
    assert asked == [(9, 15)]  # the fork's chunk ends at 15, the middle of 21 is before
    assert table.global_KN[0].tolist() == pytest.approx([mean_pixel(35, 45, r) for r in range(2)])
    Scorer(short, STREAM, counting).score_groups([group_of(numbered(2), 18, one)])
    assert asked[1] == (18, 21)


def test_judges_elsewhere_are_asked_before_any_answers(spies: dict[str, Spy]) -> None:
    """Three components of one judge in one request a decoded part; the rest is built here."""
    happened = []

    class Elsewhere:
        components = ("one", "three", "extra")
        spy, lost = Spy(*components), 0

        def submit(self, clips: Sequence[Clip], names: Sequence[str]) -> Callable[[], Tensor]:
            found = self.spy.score(clips)[[self.components.index(name) for name in names]]
            happened.append((len(clips), *names))

            def answer() -> Tensor:
                happened.append("answer")
                return found[:, self.lost :]

            return answer

    scorer = Scorer(config(global_clip_pixel_frames=20), STREAM, decode_rows, [Elsewhere()])
    assert list(spies) == ["two"]
    group = group_of(numbered(20))
    sent = [scorer.send_group(group), scorer.send_group(group)]
    # The clip before the fork, and each row's three; what is held out is not asked for.
    assert happened == [(1 + 16 * 3, "one"), (4 * 3, "one")] * 2
    first, second = (part.collect() for part in sent)
    assert happened[4:] == ["answer"] * 4
    assert torch.equal(first.local_KN, second.local_KN)
    (plain,) = Scorer(config(global_clip_pixel_frames=20), STREAM, decode_rows).score_groups(
        [group]
    )
    assert torch.equal(first.local_KN, plain.local_KN)
    assert torch.equal(first.global_KN, plain.global_KN)
    scores = scorer.score_videos(group.latent_NFCHW, [PROMPT] * 20)
    torch.testing.assert_close(scores["three"], 2 * scores["one"])
    assert happened[-4:-2] == [(16, "one", "three"), (4, "one", "three")]
    Elsewhere.lost = 1
    with pytest.raises(ValueError, match=r"scores \[1, 48\] of \('one',\) do not fit 49 clips"):
        scorer.score_groups([group])


def test_inference_mode_frames_are_scored() -> None:
    group = real_group(0, rows=1)
    with torch.inference_mode():
        frames = pixels_in(group.latent_NFCHW * 1.0)
    weights = RewardConfig(weights={"visual_quality": 1.0})
    scorer = Scorer(weights, STREAM, lambda latent, shared: [frames])
    assert scorer.score_videos(group.latent_NFCHW, [group.prompt])["visual_quality"] > 0.85


def test_bad_input_is_refused(spies: dict[str, Spy]) -> None:
    scorer = Scorer(config(), STREAM, decode_rows)
    with pytest.raises(ValueError, match="2 prompts for 3 videos"):
        scorer.score_videos(numbered(3), [PROMPT] * 2)
    with pytest.raises(ValueError, match="fork frame 24"):
        scorer.score_groups([group_of(numbered(2), fork=24)])
    short = Scorer(config(), STREAM, lambda latent, shared: [decode(latent)[:, 1:]])
    with pytest.raises(ValueError, match="81 RGB pixel frames"):
        short.score_groups([group_of(numbered(2))])


def test_unknown_and_absent_components_are_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="did you mean 'motion_quality'"):
        Scorer(RewardConfig(weights={"motion_qualty": 1.0}), STREAM, decode_rows)
    with pytest.raises(ValueError, match="unknown reward 'beauty'"):
        Scorer(
            RewardConfig(weights={"motion_quality": 1.0}, held_out=("beauty",)), STREAM, decode_rows
        )
    for weights in ({}, {"motion_quality": 0.0}):
        with pytest.raises(ValueError, match="no reward to train on"):
            Scorer(RewardConfig(weights=weights), STREAM, decode_rows)
